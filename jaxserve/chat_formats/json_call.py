"""A call as one JSON object with a name and arguments, which most formats wrap in their own way."""

import json
import re
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Any, TypeGuard

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text, to_json
from jaxserve.chat_formats.source import (
    NEED_MORE,
    Source,
    blanks,
    follows,
    json_arguments,
    json_span,
)

HEAD = re.compile(
    r'\{\s*(?:"(type|id|tool_call_id)"\s*:\s*"([^"\\]*)"\s*,\s*)?'
    r'"(?:tool_)?name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""The usual order, for which arguments can be given out as they come."""

LEAD = re.compile(r'\{"(?:type|id|tool_call_id)":"[^"\\]*(?:(",)|"?$)')
"""What may stand before the name, without white space: all of it, or its beginning."""

MAX_NAME_CHARS = 1024
"""Longest head in the usual order; a longer one is read like those in another order."""


@dataclass(frozen=True, slots=True)
class JsonCall:
    """A call that was read whole; `arguments` is JSON."""

    name: str
    arguments: str
    call_id: str | None = None
    has_arguments: bool = True


def json_call(
    source: Source,
    *,
    before: str,
    after: str = "",
    keeps_id: bool = False,
    needs_arguments: bool = False,
    known: Collection[str] = (),
) -> Generator[Event | None, None, bool]:
    """Read {"name": ..., "arguments": {...}}; False: it is no call, and nothing was used.

    Args:
        before: what was used for it already, `after`: what will be.
        keeps_id: the call's "id" is its id, unless it comes after the arguments: by then they have
            been given out, and clients want the id before them.
        needs_arguments: an object that has only a name is none.
        known: the only names that calls have; empty: any.
    """
    head = yield from _head(source)
    name = None if head is None else _read_name(head[3])
    if known and name is not None and name not in known:
        return False
    if head is None or not _is_name(name):
        return (yield from _whole_call(source, before, after, keeps_id, needs_arguments, known))
    index, raw = source.next_call(), before + source.take(len(head[0]))
    yield CallStart(index, name, head[2] if keeps_id and head[1] == "id" else None)
    arguments, complete = yield from json_arguments(source, index)
    raw += arguments
    if complete:
        raw += yield from _rest(source)
    yield CallEnd(index, raw + after)
    return True


def json_call_list(
    source: Source, *, before: str, keeps_id: bool = False
) -> Generator[Event | None, None, None]:
    """Read calls from after the "[" of a JSON list to its "]"; what is none is text."""
    while True:
        before += yield from blanks(source)
        if not (yield from json_call(source, before=before, keeps_id=keeps_id)):
            yield Text(before)
            return
        before = yield from blanks(source)
        if (yield from follows(source, ",")):
            before += ","
            continue
        if not (yield from follows(source, "]")):
            yield Text(before)
        return


def _rest(source: Source) -> Generator[None, None, str]:
    """Use what follows the arguments: other members, and the bracket that closes the call."""
    used = yield from blanks(source)
    if source.text.startswith(","):
        span = yield from json_span(source, depth=1)
        if span is None and source.is_final:
            span = source.take(len(source.text))
        return used + (span or "")
    if (yield from follows(source, "}")):
        used += "}"
    return used


def _head(source: Source) -> Generator[None, None, "re.Match[str] | None"]:
    """The head of a call in the usual order, once it is certain that it is one."""
    while True:
        match = HEAD.match(source.text, 0, MAX_NAME_CHARS)
        if match is not None:
            return match
        is_over = source.is_final or len(source.text) >= MAX_NAME_CHARS
        if is_over or not _may_become_head(source.text):
            return None
        yield NEED_MORE


def _may_become_head(text: str) -> bool:
    """Cheap: whether the beginning of a call in the usual order could look like this."""
    compact = re.sub(r"\s+", "", text)
    lead = LEAD.match(compact)
    if lead is not None:
        if not lead[1]:
            return True
        compact = "{" + compact[lead.end() :]
    elif any(f'{{"{key}":"'.startswith(compact) for key in ("type", "id", "tool_call_id")):
        return True
    for start in ('{"name":"', '{"tool_name":"'):
        if start.startswith(compact):
            return True
        if compact.startswith(start):
            rest = re.fullmatch(r'(?:[^"\\]|\\.)*\\?("(.*))?', compact[len(start) :], re.DOTALL)
            if rest is None:
                return False
            tail = rest[2] or ""
            return any(f',"{key}":{{'.startswith(tail) for key in ("arguments", "parameters"))
    return False


def _whole_call(
    source: Source,
    before: str,
    after: str,
    keeps_id: bool,
    needs_arguments: bool,
    known: Collection[str],
) -> Generator[Event | None, None, bool]:
    """A call in another order, or with arguments that are a text: read when all of it is there."""
    if not source.text.startswith("{"):
        return False
    span = yield from json_span(source)
    if span is None:
        return False
    call = read_call(span)
    if call is not None and known and call.name not in known:
        call = None
    if call is None or needs_arguments and not call.has_arguments:
        source.text = span + source.text
        return False
    index = source.next_call()
    yield CallStart(index, call.name, call.call_id if keeps_id else None)
    yield CallArguments(index, call.arguments)
    yield CallEnd(index, before + span + after)
    return True


def read_call(text: str) -> JsonCall | None:
    """The call that one JSON object is; None: it is none."""
    try:
        return as_call(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _read_name(written: str) -> str | None:
    """A name from JSON; None: a line break or a wrong escape, such as in "get\\_time"."""
    try:
        return json.loads(written)
    except ValueError:
        return None


def _is_name(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and bool(name) and name.isprintable()


def as_call(call: Any) -> JsonCall | None:
    """The call that a value from JSON is; None: it is none."""
    if not isinstance(call, dict):
        return None
    call_id = call.get("id")
    if isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name", call.get("tool_name"))
    arguments = call.get("arguments", call.get("parameters"))
    has_arguments = arguments is not None
    if not has_arguments:
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not _is_name(name) or not isinstance(arguments, dict):
        return None
    call_id = call_id if isinstance(call_id, str) else None
    return JsonCall(name, to_json(arguments), call_id, has_arguments)
