"""A call as one JSON object with a name and arguments, which most formats wrap in their own way."""

import json
import re
from collections.abc import Generator

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, to_json
from jaxserve.chat_formats.source import (
    NEED_MORE,
    Source,
    blanks,
    follows,
    json_arguments,
    json_span,
)

HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""The usual order, for which arguments can be given out as they come."""


def json_call(
    source: Source, *, before: str, after: str = ""
) -> Generator[Event | None, None, bool]:
    """Read {"name": ..., "arguments": {...}}; False: it is no call, and nothing was used.

    Args:
        before: what was used for it already, `after`: what will be.
    """
    head = yield from _head(source)
    if head is None:
        return (yield from _whole_call(source, before, after))
    name = json.loads(head[1])
    index, raw = source.next_call(), before + source.take(len(head[0]))
    yield CallStart(index, name)
    arguments, complete = yield from json_arguments(source, index)
    raw += arguments
    if complete:
        raw += yield from blanks(source)
        if (yield from follows(source, "}")):
            raw += "}"
    yield CallEnd(index, raw + after)
    return True


def _head(source: Source) -> Generator[None, None, "re.Match[str] | None"]:
    """The head of a call in the usual order, once it is certain that it is one."""
    while True:
        match = HEAD.match(source.text)
        if match is not None:
            return match
        if source.is_final or len(source.text) > 1024 or not _may_become_head(source.text):
            return None
        yield NEED_MORE


def _may_become_head(text: str) -> bool:
    """Cheap: whether the beginning of a call in the usual order could look like this."""
    compact = re.sub(r"\s+", "", text)
    for start in ('{"name":"', '{"type":"function","name":"'):
        if start.startswith(compact):
            return True
        if compact.startswith(start):
            rest = re.fullmatch(r'(?:[^"\\]|\\.)*\\?("(.*))?', compact[len(start) :], re.DOTALL)
            if rest is None:
                return False
            tail = rest[2] or ""
            return any(f',"{key}":{{'.startswith(tail) for key in ("arguments", "parameters"))
    return False


def _whole_call(source: Source, before: str, after: str) -> Generator[Event | None, None, bool]:
    """A call in another order, or with arguments that are a text: read when all of it is there."""
    if not source.text.startswith("{"):
        return False
    span = yield from json_span(source)
    if span is None:
        return False
    call = read_call(span)
    if call is None:
        source.text = span + source.text
        return False
    name, arguments = call
    index = source.next_call()
    yield CallStart(index, name)
    yield CallArguments(index, arguments)
    yield CallEnd(index, before + span + after)
    return True


def read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is one JSON object; None: it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    if isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, to_json(arguments)
