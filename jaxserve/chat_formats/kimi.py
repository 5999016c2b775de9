"""Kimi K2 and K2.5; ids are part of the format and are kept.

<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0
<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>
"""

import re
from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Digits, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    json_arguments,
    text_until,
)
from jaxserve.chat_formats.tools import Tool

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
BEGIN, ARGUMENT, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
HEAD = re.compile(r"\s*((?:functions\.)?([A-Za-z0-9_.-]+?)(?::\d+)?)\s*")


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while True:
        mark = yield from text_until(source, (SECTION, SECTION_END, BEGIN))
        if mark is None:
            return
        if mark == BEGIN:
            yield from _one(source, tools)


def _one(source: Source, tools: Sequence[Tool]) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (ARGUMENT,))
    if found is None:
        yield Text(BEGIN)
        return
    head, _ = found
    match = HEAD.fullmatch(head)
    space = yield from blanks(source)
    name = _name(match, tools)
    if match is None or not name or not source.text.startswith("{"):
        yield Text(BEGIN + head + ARGUMENT + space)
        return
    index = source.next_call()
    yield CallStart(index, name, match[1])
    arguments, _ = yield from json_arguments(source, index)
    raw = BEGIN + head + ARGUMENT + space + arguments
    yield CallEnd(index, raw)
    yield from blanks(source)
    yield from follows(source, END)


def _name(head: "re.Match[str] | None", tools: Sequence[Tool]) -> str:
    """The tool of an id; of one that is nothing but a number, if there is one tool; else ""."""
    if head is None:
        return ""
    if not head[1].isdigit():
        return head[2]
    return tools[0].name if len(tools) == 1 else ""


def _call(tool: Tool) -> list[Part]:
    head = f"{BEGIN}functions.{tool.name}:"
    return [head, Digits(), ARGUMENT, parameters_of(tool), END]


FORMAT = ToolFormat(
    names=("kimi_k2",),
    parse=parse,
    pattern=CallPattern(_call, begin=SECTION, end=SECTION_END),
    detect=lambda template: SECTION in template,
    marks=(SECTION, SECTION_END, BEGIN, ARGUMENT, END),
    make_id=lambda index, name: f"functions.{name}:{index}",
)
