"""Kimi K3: channels between marks of their own, with attributes.

    <|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>
    <|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>
    <|close|>call<|sep|><|close|>tools<|sep|>                               (all on one line)

The type says whether a value is a text or JSON. All arguments may also be JSON in one `json`
element. Thoughts and answer stand in channels too, which `thinking` reads.
"""

import json
import re
from collections.abc import Generator, Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Digits, Part, ToolFormat
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
from jaxserve.chat_formats.tools import NAME, Tool, is_text, types_of

OPEN, CLOSE, SEP = "<|open|>", "<|close|>", "<|sep|>"
SECTION, SECTION_END = f"{OPEN}tools{SEP}", f"{CLOSE}tools{SEP}"
CALL, CALL_END = f"{OPEN}call ", f"{CLOSE}call{SEP}"
ARGUMENT, ARGUMENT_END = f"{OPEN}argument ", f"{CLOSE}argument{SEP}"
OBJECT, OBJECT_END = f"{OPEN}json ", f"{CLOSE}json{SEP}"
ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while (mark := (yield from text_until(source, (SECTION, SECTION_END, CALL)))) is not None:
        if mark == CALL:
            yield from _call(source)


def _call(source: Source) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (SEP,))
    name = _attributes(found[0]).get("tool", "") if found else ""
    if found is None or not NAME.fullmatch(name):
        yield Text(CALL + ("".join(found) if found else ""))
        return
    index, raw = source.next_call(), CALL + "".join(found)
    yield CallStart(index, name)
    raw += yield from blanks(source)
    if (yield from follows(source, OBJECT)):
        raw += OBJECT + (yield from _object(source, index))
    else:
        yield CallArguments(index, "{")
        raw += yield from _arguments(source, index)
        yield CallArguments(index, "}")
    yield CallEnd(index, raw)
    yield from blanks(source)
    yield from follows(source, CALL_END)


def _object(source: Source, index: int) -> Generator[Event | None, None, str]:
    """Arguments as one JSON object; returns what was used."""
    found = yield from head_until(source, (SEP,))
    used = "".join(found) if found else ""
    used += yield from blanks(source)
    if not source.text.startswith("{"):
        return used
    arguments, _ = yield from json_arguments(source, index)
    used += arguments + (yield from blanks(source))
    if (yield from follows(source, OBJECT_END)):
        used += OBJECT_END
    return used


def _arguments(source: Source, index: int) -> Generator[Event | None, None, str]:
    """Arguments one by one; returns what was used."""
    used, is_first = "", True
    while True:
        used += yield from blanks(source)
        if not (yield from follows(source, ARGUMENT)):
            return used
        found = yield from head_until(source, (SEP,))
        attributes = _attributes(found[0]) if found else {}
        if found is None or "key" not in attributes:
            return used + ARGUMENT + ("".join(found) if found else "")
        lead = json.dumps(attributes["key"], ensure_ascii=False)
        yield CallArguments(index, ("" if is_first else ", ") + lead + ": ")
        is_first = False
        schema = {"type": "string"} if attributes.get("type", "string") == "string" else {}
        used += ARGUMENT + "".join(found)
        used += yield from tagged_value(source, index, schema, (ARGUMENT_END, CALL_END))
        if (yield from follows(source, ARGUMENT_END)):
            used += ARGUMENT_END


def _attributes(written: str) -> dict[str, str]:
    return {
        key: value.replace("&quot;", '"').replace("&amp;", "&")
        for key, value in ATTRIBUTE.findall(written)
    }


def _type_of(schema: Any) -> str:
    """What the template calls the type of a value; a value of several types is written as JSON."""
    if is_text(schema):
        return "string"
    kinds = types_of(schema) - {"string", "null"}
    kind = min(kinds) if kinds else "object"
    return "number" if kind == "integer" else kind


def _pattern(tool: Tool) -> list[Part]:
    lead, *arguments = tagged_parts(
        tool,
        head=f'{CALL}tool="{tool.name}" index="',
        before_key=f'{ARGUMENT}key="',
        after_key=lambda schema: f'" type="{_type_of(schema)}"{SEP}',
        after_value=ARGUMENT_END,
        tail=CALL_END,
        write_key=lambda key: key.replace("&", "&amp;").replace('"', "&quot;"),
    )
    return [lead, Digits(), f'"{SEP}', *arguments]


FORMAT = ToolFormat(
    names=("kimi_k3",),
    parse=parse,
    pattern=CallPattern(_pattern, begin=SECTION, end=SECTION_END),
    detect=lambda template: OPEN in template and SEP in template,
    marks=(SECTION, SECTION_END, CALL, CALL_END, ARGUMENT, ARGUMENT_END, OBJECT, OBJECT_END),
)
