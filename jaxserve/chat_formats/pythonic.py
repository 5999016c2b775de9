"""Calls as Python: Llama 3.2 and 4, OLMo 3, LFM2.

    [get_weather(city="Paris"), get_time(zone="CET")]

Llama 4 may put <|python_start|> and <|python_end|> around, LFM2 <|tool_call_start|> and
<|tool_call_end|>; OLMo 3 writes one call a line between <function_calls> tags. Between tags, JSON
is taken too: LFM2 writes it where it is told to. A list is given out when all of it is there.
"""

import json
import re
from collections.abc import Generator, Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Json, Part, ToolFormat
from jaxserve.chat_formats.json_call import JsonCall, as_call
from jaxserve.chat_formats.listed import listed_parts
from jaxserve.chat_formats.python_calls import MAX_CHARS, read_calls
from jaxserve.chat_formats.source import (
    MAX_HEAD_CHARS,
    NEED_MORE,
    Parsing,
    Source,
    blanks,
    head_until,
    text_until,
)
from jaxserve.chat_formats.tools import Tool

TAGS = {
    "<|python_start|>": "<|python_end|>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<function_calls>": "</function_calls>",
}
MARKS = (*TAGS, *TAGS.values())
START = re.compile(r"\[\s*[A-Za-z_][\w.-]*\s*\(")
MAY_START = re.compile(r"\[\s*([A-Za-z_][\w.-]*\s*)?")


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    space = yield from blanks(source)
    if not (yield from _list(source, space, {tool.name for tool in tools})):
        yield Text(space)
    while True:
        mark = yield from text_until(source, tuple(TAGS))
        if mark is None:
            return
        found = yield from head_until(source, (TAGS[mark],), MAX_CHARS)
        if found is None:
            yield Text(mark)
            continue
        inside, end = found
        calls = _read_json(inside) or read_calls(inside)
        if calls is None:
            yield Text(mark + inside + end)
        else:
            yield from _give(source, calls, mark + inside + end)


def _list(source: Source, before: str, known: set[str]) -> Generator[Event | None, None, bool]:
    """A bare list of calls at the beginning of the reply; False: it is none.

    Nothing marks it, so that a list with none of the `known` tools is an answer in Python.
    """
    while not START.match(source.text, 0, MAX_HEAD_CHARS):
        is_long = len(source.text) >= MAX_HEAD_CHARS
        if source.is_final or is_long or not MAY_START.fullmatch(source.text):
            return False
        yield NEED_MORE
    end = yield from _span(source)
    calls = None if end is None else read_calls(source.text[:end])
    if end is None or calls is None:
        return False
    if known and not any(call.name in known for call in calls):
        return False
    yield from _give(source, calls, before + source.take(end))
    return True


def _span(source: Source) -> Generator[None, None, int | None]:
    """Length of a list, once its brackets close; None: they do not."""
    depth, quote, escaped, i = 0, "", False, 0
    while True:
        while i < len(source.text):
            char = source.text[i]
            i += 1
            if quote:
                if not escaped and char == quote:
                    quote = ""
                escaped = char == "\\" and not escaped
            elif char in "\"'":
                quote, escaped = char, False
            elif char in "([{":
                depth += 1
            elif char in ")]}":
                depth -= 1
                if depth == 0:
                    return i
        if source.is_final or len(source.text) > MAX_CHARS:
            return None
        yield NEED_MORE


def _read_json(text: str) -> list[JsonCall] | None:
    """The calls of a text that is JSON; None: it is something else."""
    try:
        given = json.loads(text)
        calls = [as_call(item) for item in (given if isinstance(given, list) else [given])]
    except (ValueError, RecursionError):
        return None
    known = [call for call in calls if call is not None]
    return known if len(known) == len(calls) else None


def _give(source: Source, calls: list[JsonCall], raw: str) -> Generator[Event, None, None]:
    for i, call in enumerate(calls):
        index = source.next_call()
        yield CallStart(index, call.name)
        yield CallArguments(index, call.arguments)
        yield CallEnd(index, raw if i == 0 else "")


def _call(tool: Tool) -> list[Part]:
    def argument(key: str, schema: Any) -> list[Part]:
        return [key + "=", Json(schema)]

    arguments = listed_parts(tool, argument, ", ", list(tool.properties))
    return [tool.name + "(", *arguments, ")"]


def _line(tool: Tool) -> list[Part]:
    return [*_call(tool), "\n"]


def _format(names: tuple[str, ...], pattern: CallPattern, shown_by: tuple[str, ...]) -> ToolFormat:
    """What differs is how calls are demanded; all of them are read in every way."""
    return ToolFormat(
        names=names,
        parse=parse,
        pattern=pattern,
        detect=lambda template: any(text in template for text in shown_by),
        marks=MARKS,
    )


FORMAT = _format(
    ("pythonic", "llama4_pythonic"),
    CallPattern(_call, begin="[", between=", ", end="]"),
    ("[func_name1(params_name1=",),
)
LFM2 = _format(
    ("lfm2",),
    CallPattern(_call, begin="<|tool_call_start|>[", between=", ", end="]<|tool_call_end|>"),
    ("<|tool_call_start|>", "<|tool_list_start|>", "List of tools: ["),
)
OLMO3 = _format(
    ("olmo3",),
    CallPattern(_line, begin="<function_calls>\n", end="</function_calls>"),
    ("<function_calls>",),
)
