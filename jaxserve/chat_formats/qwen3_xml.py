"""Qwen3-Coder, Qwen 3.5, MiMo, Nemotron 3, and Seed-OSS with other tags.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Values have no types: the tool's schema says what they are. Seed-OSS has no line breaks around them.
"""

import json
from collections.abc import Generator, Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text, to_json
from jaxserve.chat_formats.format import CallPattern, ToolFormat
from jaxserve.chat_formats.source import (
    NEED_MORE,
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    held_back,
    text_until,
)
from jaxserve.chat_formats.tagged import tagged_parts
from jaxserve.chat_formats.tools import NAME, Tool, cast_value, is_text

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


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
        raw += yield from _value(source, index, properties.get(key))
    yield CallArguments(index, "}")
    yield CallEnd(index, raw)


def _value(source: Source, index: int, schema: Any) -> Generator[Event | None, None, str]:
    """One value; texts are given out as they come. Returns what was used."""
    ends = (PARAMETER_END, FUNCTION_END, PARAMETER)
    raw, streams, is_first = "", is_text(schema), True
    pending = ""
    if streams:
        yield CallArguments(index, '"')
    while True:
        found = [at for end in ends if (at := source.text.find(end)) >= 0]
        held = 0 if source.is_final else max(held_back(source.text, end) for end in ends)
        certain = min(found) if found else len(source.text) - held
        piece = source.take(certain)
        raw += piece
        pending += piece
        is_over = bool(found) or source.is_final
        if is_first and pending:  # one line break belongs to the tag
            pending, is_first = pending.removeprefix("\n"), False
        if is_over:
            pending = pending.removesuffix("\n")
        if streams:
            keep = 0 if is_over else pending.endswith("\n")
            text, pending = pending[: len(pending) - keep], pending[len(pending) - keep :]
            if text:
                yield CallArguments(index, to_json(text)[1:-1])
        if is_over:
            break
        yield NEED_MORE
    yield CallArguments(index, '"' if streams else to_json(cast_value(pending, schema)))
    if (yield from follows(source, PARAMETER_END)):
        raw += PARAMETER_END
    return raw


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
    names=("qwen3_xml", "qwen3_coder"),
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
