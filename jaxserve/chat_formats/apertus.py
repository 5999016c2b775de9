"""Apertus: a JSON list, in which the name of a tool is the key of its arguments.

<|tools_prefix|>[{"get_weather": {"city": "Paris"}}, {"get_time": {}}]<|tools_suffix|>
"""

import json
import re
from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    json_arguments,
    text_until,
)
from jaxserve.chat_formats.tools import NAME, Tool

BEGIN, END = "<|tools_prefix|>", "<|tools_suffix|>"
HEAD = re.compile(r'\s*"([^"\\]*)"\s*')


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while (yield from text_until(source, (BEGIN,))) is not None:
        before = BEGIN + (yield from blanks(source))
        is_list = yield from follows(source, "[")
        before += "[" if is_list else ""
        while True:
            before += yield from blanks(source)
            if not (yield from _one(source, before)):
                break
            before = yield from blanks(source)
            if not (is_list and (yield from follows(source, ","))):
                if is_list and (yield from follows(source, "]")):
                    before = ""
                yield Text(before)
                break
            before += ","
        space = yield from blanks(source)
        if not (yield from follows(source, END)):
            yield Text(space)


def _one(source: Source, before: str) -> Generator[Event | None, None, bool]:
    """Read {"name": {...}}; False: it is no call and is given out as text."""
    if not (yield from follows(source, "{")):
        yield Text(before)
        return False
    found = yield from head_until(source, (":",))
    match = HEAD.fullmatch(found[0]) if found else None
    raw = before + "{" + ("".join(found) if found else "")
    space = (yield from blanks(source)) if match else ""
    if match is None or not NAME.fullmatch(match[1]) or not source.text.startswith("{"):
        yield Text(raw + space)
        return False
    index = source.next_call()
    yield CallStart(index, match[1])
    arguments, _ = yield from json_arguments(source, index)
    raw += space + arguments + (yield from blanks(source))
    if (yield from follows(source, "}")):
        raw += "}"
    yield CallEnd(index, raw)
    return True


def _call(tool: Tool) -> list[Part]:
    return [f"{{{json.dumps(tool.name)}: ", parameters_of(tool), "}"]


FORMAT = ToolFormat(
    names=("apertus",),
    parse=parse,
    pattern=CallPattern(_call, begin=BEGIN + "[", between=", ", end="]" + END),
    detect=lambda template: BEGIN in template,
    marks=(BEGIN, END),
)
