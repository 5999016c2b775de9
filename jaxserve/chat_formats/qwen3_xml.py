"""Qwen3-Coder, Qwen 3.5, MiMo, Nemotron 3, and Seed-OSS with other tags.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Values have no types: the tool's schema says what they are. Seed-OSS has no line breaks around them.
Functionary, and Llama 3.1 where it is asked to, write JSON between the tags of the function.
"""

import json
from collections.abc import Generator, Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, ToolFormat
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    json_arguments,
    text_until,
)
from jaxserve.chat_formats.tagged import tagged_parts, tagged_value
from jaxserve.chat_formats.tools import NAME, Tool

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
VALUE_ENDS = (PARAMETER_END, FUNCTION_END, PARAMETER)


def parse_with(begin: str, end: str) -> Any:
    """A parser of calls between these tags."""

    def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
        known = {tool.name: tool for tool in tools}
        while True:
            mark = yield from text_until(source, (begin, FUNCTION))
            if mark is None:
                return
            before = mark
            if mark == begin:
                before += yield from blanks(source)
                if not (yield from follows(source, FUNCTION)):
                    yield Text(before)
                    continue
                before += FUNCTION
            yield from _function(source, known, before)
            yield from blanks(source)
            yield from follows(source, end)

    return parse


def _function(
    source: Source, known: dict[str, Tool], before: str
) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (">",))
    if found is None or not NAME.fullmatch(found[0].strip()):
        yield Text(before + ("".join(found) if found else ""))
        return
    name = found[0].strip()
    index, raw = source.next_call(), before + found[0] + ">"
    properties = known[name].properties if name in known else {}
    yield CallStart(index, name)
    raw += yield from blanks(source)
    if source.text.startswith("{"):
        arguments, _ = yield from json_arguments(source, index)
        yield CallEnd(index, raw + arguments)
        yield from blanks(source)
        yield from follows(source, FUNCTION_END)
        return
    yield CallArguments(index, "{")
    is_first = True
    while True:
        raw += yield from blanks(source)
        if (yield from follows(source, FUNCTION_END)):
            raw += FUNCTION_END
            break
        if not (yield from follows(source, PARAMETER)):
            break
        found = yield from head_until(source, (">",))
        if found is None:
            break
        key = found[0].strip()
        yield CallArguments(index, ("" if is_first else ", ") + json.dumps(key) + ": ")
        is_first = False
        raw += PARAMETER + found[0] + ">"
        raw += yield from tagged_value(
            source, index, properties.get(key), VALUE_ENDS, has_breaks=True
        )
        if (yield from follows(source, PARAMETER_END)):
            raw += PARAMETER_END
    yield CallArguments(index, "}")
    yield CallEnd(index, raw)


def _pattern(begin: str, end: str, around_value: str) -> CallPattern:
    def call(tool: Tool) -> Any:
        return tagged_parts(
            tool,
            head=f"{begin}\n{FUNCTION}{tool.name}>\n",
            before_key=PARAMETER,
            after_key=">" + around_value,
            after_value=around_value + PARAMETER_END + "\n",
            tail=f"{FUNCTION_END}\n{end}",
        )

    return CallPattern(call, between="\n")


FORMAT = ToolFormat(
    names=("qwen3_xml", "qwen3_coder", "step3p5"),
    parse=parse_with("<tool_call>", "</tool_call>"),
    pattern=_pattern("<tool_call>", "</tool_call>", "\n"),
    detect=lambda template: FUNCTION in template and "<seed:" not in template,
    marks=("<tool_call>", "</tool_call>", FUNCTION_END, PARAMETER_END),
)

SEED = ToolFormat(
    names=("seed_oss",),
    parse=parse_with("<seed:tool_call>", "</seed:tool_call>"),
    pattern=_pattern("<seed:tool_call>", "</seed:tool_call>", ""),
    detect=lambda template: "<seed:tool_call>" in template,
    marks=("<seed:tool_call>", "</seed:tool_call>", FUNCTION_END, PARAMETER_END),
)
