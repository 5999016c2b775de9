"""GLM-4.5 to GLM-5.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

Later ones leave the line breaks out. Values that are no texts are JSON.
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

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
MARKS = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    known = {tool.name: tool for tool in tools}
    while (yield from text_until(source, (BEGIN,))) is not None:
        yield from _one(source, known)


def _one(source: Source, known: dict[str, Tool]) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (KEY, END))
    if found is None or not NAME.fullmatch(found[0].strip()):
        yield Text(BEGIN + ("".join(found) if found else ""))
        return
    head, mark = found
    name = head.strip()
    index, raw = source.next_call(), BEGIN + head + mark
    properties = known[name].properties if name in known else {}
    yield CallStart(index, name)
    yield CallArguments(index, "{")
    is_first = True
    while mark == KEY:
        found = yield from head_until(source, (KEY_END,))
        if found is None:
            break
        key = found[0].strip()
        raw += found[0] + KEY_END
        raw += yield from blanks(source)
        if not (yield from follows(source, VALUE)):
            break
        yield CallArguments(index, ("" if is_first else ", ") + json.dumps(key) + ": ")
        is_first = False
        raw += VALUE
        raw += yield from _value(source, index, properties.get(key))
        raw += yield from blanks(source)
        if (yield from follows(source, KEY)):
            raw += KEY
        else:
            mark = END
            if (yield from follows(source, END)):
                raw += END
    yield CallArguments(index, "}")
    yield CallEnd(index, raw)


def _value(source: Source, index: int, schema: Any) -> Generator[Event | None, None, str]:
    """One value; texts are given out as they come. Returns what was used."""
    raw, streams, pending = "", is_text(schema), ""
    if streams:
        yield CallArguments(index, '"')
    while True:
        at = source.text.find(VALUE_END)
        held = 0 if source.is_final else held_back(source.text, VALUE_END)
        piece = source.take(at if at >= 0 else len(source.text) - held)
        raw += piece
        if streams and piece:
            yield CallArguments(index, to_json(piece)[1:-1])
        pending += piece
        if at >= 0 or source.is_final:
            break
        yield NEED_MORE
    yield CallArguments(index, '"' if streams else to_json(cast_value(pending, schema)))
    if (yield from follows(source, VALUE_END)):
        raw += VALUE_END
    return raw


def _pattern(line_break: str) -> CallPattern:
    def call(tool: Tool) -> Any:
        return tagged_parts(
            tool,
            head=BEGIN + tool.name + line_break,
            before_key=KEY,
            after_key=KEY_END + line_break + VALUE,
            after_value=VALUE_END + line_break,
            tail=END,
        )

    return CallPattern(call, between=line_break)


FORMAT = ToolFormat(
    names=("glm45",),
    parse=parse,
    pattern=_pattern("\n"),
    detect=lambda template: KEY in template,
    marks=MARKS,
)

WITHOUT_BREAKS = ToolFormat(
    names=("glm47",),
    parse=parse,
    pattern=_pattern(""),
    detect=lambda template: KEY_END + VALUE in template,
    marks=MARKS,
)
