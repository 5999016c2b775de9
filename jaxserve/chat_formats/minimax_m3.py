"""MiniMax M3: every tag begins with a mark of its own, and an argument is an element.

    ]<]minimax[>[<tool_call>
    ]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Paris]<]minimax[>[</city>
    ]<]minimax[>[<tags>]<]minimax[>[<item>a]<]minimax[>[</item>]<]minimax[>[</tags>
    ]<]minimax[>[</invoke>                                      (an invocation is on one line)
    ]<]minimax[>[</tool_call>

Objects have an element for each key, lists an `item` for each value; JSON is read in their place,
and is what demanded calls have. Values have no types: the tool's schema says what they are.
"""

import json
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text, to_json
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat
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
from jaxserve.chat_formats.tagged import tagged_parts, tagged_value
from jaxserve.chat_formats.tools import NAME, Tool, cast_value, is_text, types_of

MARK = "]<]minimax[>["
BEGIN, END = MARK + "<tool_call>", MARK + "</tool_call>"
INVOKE, INVOKE_END = MARK + "<invoke name=", MARK + "</invoke>"
ELEMENT = MARK + "<"
TAG = re.compile(re.escape(MARK) + r"<(/?)([^<>]+)>")
ITEM = "item"
MAX_DEPTH = 32


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    known = {tool.name: tool for tool in tools}
    while (yield from text_until(source, (BEGIN,))) is not None:
        before = BEGIN
        while True:
            before += yield from blanks(source)
            if not (yield from follows(source, INVOKE)):
                break
            yield from _invoke(source, known, before + INVOKE)
            before = ""
        if not (yield from follows(source, END)):
            yield Text(before)


def _invoke(
    source: Source, known: dict[str, Tool], before: str
) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (">",))
    name = found[0].strip().strip("\"'") if found else ""
    if found is None or not NAME.fullmatch(name):
        yield Text(before + ("".join(found) if found else ""))
        return
    index, raw = source.next_call(), before + "".join(found)
    properties = known[name].properties if name in known else {}
    yield CallStart(index, name)
    yield CallArguments(index, "{")
    is_first = True
    while True:
        raw += yield from blanks(source)
        if (yield from follows(source, INVOKE_END)):
            raw += INVOKE_END
            break
        if not (yield from follows(source, ELEMENT)):
            break
        raw += ELEMENT
        found = yield from head_until(source, (">",))
        if found is None or not found[0] or found[0].startswith("/"):
            raw += "".join(found) if found else ""
            break
        key = found[0]
        raw += key + ">"
        lead = json.dumps(key, ensure_ascii=False)
        yield CallArguments(index, ("" if is_first else ", ") + lead + ": ")
        is_first = False
        raw += yield from _value(source, index, key, properties.get(key))
        if (yield from follows(source, f"{MARK}</{key}>")):
            raw += f"{MARK}</{key}>"
    yield CallArguments(index, "}")
    yield CallEnd(index, raw)


def _value(source: Source, index: int, key: str, schema: Any) -> Generator[Event | None, None, str]:
    """Give out a value up to the tag that ends it, texts as they come. Returns what was used."""
    begin, end = f"{ELEMENT}{key}>", f"{MARK}</{key}>"
    if is_text(schema):
        return (yield from tagged_value(source, index, schema, (end, INVOKE_END)))
    used, depth = "", 0
    while True:
        places = [(source.text.find(mark), mark) for mark in (end, INVOKE_END)]
        found = [place for place in places if place[0] >= 0]
        spare = max(held_back(source.text, mark) for mark in (begin, end, INVOKE_END))
        at, mark = min(found) if found else (len(source.text) - spare, "")
        if source.is_final and not found:
            at = len(source.text)
        piece = source.take(at)
        used, depth = used + piece, depth + piece.count(begin)
        if mark == end and depth:  # of an element with the same name within this one
            used, depth = used + source.take(len(end)), depth - 1
        elif mark or source.is_final:
            yield CallArguments(index, to_json(read_value(used, schema)))
            return used
        elif not found:
            yield NEED_MORE


def read_value(written: str, schema: Any) -> Any:
    """The value of an element's content; a text if its elements do not fit together."""
    pieces = TAG.split(written)  # text, then a slash or "", a name and text for each tag
    if len(pieces) == 1:
        return _leaf(written, schema)
    stack = [_Element("", schema, pieces[0])]
    for slash, name, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if not slash:
            if len(stack) > MAX_DEPTH or stack[-1].text.strip():
                return written
            stack.append(_Element(name, stack[-1].schema_of(name), text))
            continue
        element = stack.pop()
        if not stack or element.name != name or text.strip():
            return written
        stack[-1].children.append((name, element.value()))
    return stack[0].value() if len(stack) == 1 else written


class _Element:
    """An element that has begun."""

    def __init__(self, name: str, schema: Any, text: str = ""):
        self.name = name
        self.schema = schema
        self.text = text
        self.children: list[tuple[str, Any]] = []

    def schema_of(self, name: str) -> Any:
        """What the schema says of a child."""
        if not isinstance(self.schema, Mapping):
            return {}
        if name == ITEM and "array" in types_of(self.schema):
            return self.schema.get("items")
        properties = self.schema.get("properties")
        return properties.get(name) if isinstance(properties, Mapping) else {}

    def value(self) -> Any:
        if not self.children:
            return _leaf(self.text, self.schema)
        is_list = all(name == ITEM for name, _ in self.children)
        if is_list and types_of(self.schema) != {"object"}:
            return [value for _, value in self.children]
        return dict(self.children)


def _leaf(written: str, schema: Any) -> Any:
    kinds = types_of(schema)
    if not written.strip() and "string" not in kinds and kinds & {"array", "object"}:
        return [] if "array" in kinds else {}
    return cast_value(written, schema)


def _call(tool: Tool) -> list[Part]:
    return tagged_parts(
        tool,
        head=f'{INVOKE}"{tool.name}">',
        before_key=ELEMENT,
        after_key=">",
        after_value=lambda key: f"{MARK}</{key}>",
        tail=INVOKE_END + "\n",
    )


FORMAT = ToolFormat(
    names=("minimax_m3",),
    parse=parse,
    pattern=CallPattern(_call, begin=BEGIN + "\n", end=END),
    detect=lambda template: MARK in template,
    marks=(MARK, BEGIN, END),
)
