"""Finds the part of a JSON schema that cannot be enforced, so that an error can name it."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxserve.structured.grammar import Body, json_rule
from jaxserve.structured.schemas import LISTS, MAPS, SINGLES

MAX_TRIES = 60
MAX_SEARCH_S = 0.5


def find_bad_part(
    schema: Any, error_of: Callable[[Body], str], reason: str
) -> tuple[tuple[str, ...], str]:
    """The path of the smallest schema inside `schema` that fails alone, and why it fails.

    Args:
        error_of: why something cannot be compiled; empty if it can.
        reason: why the whole schema cannot.
    """
    definitions = {}
    if isinstance(schema, Mapping):
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    path: tuple[str, ...] = ()
    tries, until_s = 0, time.monotonic() + MAX_SEARCH_S
    found = True
    while found:
        found = False
        for step, part in _parts(schema):
            if not isinstance(part, Mapping):
                continue
            tries += 1
            if tries > MAX_TRIES or time.monotonic() > until_s:
                return path, reason
            alone = {**definitions, **part} if "$ref" in str(part) else part
            if error := error_of(Body(json_rule(alone))):
                path, schema, reason, found = (*path, *step), part, error, True
                break
    return path, reason


def _parts(schema: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(schema, Mapping):
        return
    for key in MAPS:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield (key, str(name)), part
    for key in LISTS:
        if isinstance(schema.get(key), list):
            for i, part in enumerate(schema[key]):
                yield (key, str(i)), part
    for key in SINGLES:
        if key in schema:
            yield (key,), schema[key]
