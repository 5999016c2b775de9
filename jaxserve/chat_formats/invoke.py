"""MiniMax M2, and DeepSeek V3.2 and V4 with tags of their own (DSML).

    <minimax:tool_call>
    <invoke name="get_weather">
    <parameter name="city">Paris</parameter>
    </invoke>
    </minimax:tool_call>

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

DeepSeek says of each value whether it is a text or JSON; for MiniMax the tool's schema says it.
"""

import json
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, ToolFormat
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, head_until, text_until
from jaxserve.chat_formats.tagged import tagged_parts, tagged_value
from jaxserve.chat_formats.tools import NAME, Tool, is_text

QUOTES = "\"'"
DSML = "｜DSML｜"
ATTRIBUTES = re.compile(
    r"""("[^">]+"|'[^'>]+'|[^"'>\s]+)(?:\s+string\s*=\s*["'](true|false)["'])?"""
)
"""What follows `name=`: the name, and DeepSeek's word on the value."""


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one family.

    Attributes:
        section: the name of the tag around all calls.
        prefix: what the names of the other tags begin with.
        says_text: parameters tell whether their value is a text.
    """

    section: str
    prefix: str = ""
    says_text: bool = False

    @property
    def begin(self) -> str:
        return f"<{self.section}>"

    @property
    def end(self) -> str:
        return f"</{self.section}>"

    @property
    def invoke(self) -> str:
        return f"<{self.prefix}invoke name="

    @property
    def invoke_end(self) -> str:
        return f"</{self.prefix}invoke>"

    @property
    def parameter(self) -> str:
        return f"<{self.prefix}parameter name="

    @property
    def parameter_end(self) -> str:
        return f"</{self.prefix}parameter>"


def parse_with(tags: Tags) -> Any:
    """A parser of calls with these tags."""

    def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
        known = {tool.name: tool for tool in tools}
        while (yield from text_until(source, (tags.begin,))) is not None:
            before = tags.begin
            while True:
                before += yield from blanks(source)
                if not (yield from follows(source, tags.invoke)):
                    break
                yield from _invoke(source, tags, known, before + tags.invoke)
                before = ""
            if not (yield from follows(source, tags.end)):
                yield Text(before)

    return parse


def _invoke(
    source: Source, tags: Tags, known: dict[str, Tool], before: str
) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (">",))
    match = ATTRIBUTES.fullmatch(found[0].strip()) if found else None
    if found is None or match is None or not NAME.fullmatch(match[1].strip(QUOTES)):
        yield Text(before + ("".join(found) if found else ""))
        return
    name = match[1].strip(QUOTES)
    index, raw = source.next_call(), before + "".join(found)
    properties = known[name].properties if name in known else {}
    yield CallStart(index, name)
    yield CallArguments(index, "{")
    is_first = True
    while True:
        raw += yield from blanks(source)
        if (yield from follows(source, tags.invoke_end)):
            raw += tags.invoke_end
            break
        if not (yield from follows(source, tags.parameter)):
            break
        found = yield from head_until(source, (">",))
        match = ATTRIBUTES.fullmatch(found[0].strip()) if found else None
        if found is None or match is None:
            break
        key = match[1].strip(QUOTES)
        schema = properties.get(key)
        if match[2]:
            schema = {"type": "string"} if match[2] == "true" else {}
        yield CallArguments(index, ("" if is_first else ", ") + json.dumps(key) + ": ")
        is_first = False
        raw += tags.parameter + "".join(found)
        ends = (tags.parameter_end, tags.invoke_end)
        raw += yield from tagged_value(source, index, schema, ends)
        if (yield from follows(source, tags.parameter_end)):
            raw += tags.parameter_end
    yield CallArguments(index, "}")
    yield CallEnd(index, raw)


def _pattern(tags: Tags) -> CallPattern:
    def after_key(schema: Any) -> str:
        if not tags.says_text:
            return '">'
        return f'" string="{"true" if is_text(schema) else "false"}">'

    def call(tool: Tool) -> Any:
        return tagged_parts(
            tool,
            head=f'{tags.invoke}"{tool.name}">\n',
            before_key=tags.parameter + '"',
            after_key=after_key,
            after_value=tags.parameter_end + "\n",
            tail=tags.invoke_end + "\n",
        )

    return CallPattern(call, begin=tags.begin + "\n", end=tags.end)


MINIMAX_TAGS = Tags("minimax:tool_call")
V32_TAGS = Tags(DSML + "function_calls", DSML, says_text=True)
V4_TAGS = Tags(DSML + "tool_calls", DSML, says_text=True)

MINIMAX = ToolFormat(
    names=("minimax_m2",),
    parse=parse_with(MINIMAX_TAGS),
    pattern=_pattern(MINIMAX_TAGS),
    detect=lambda template: MINIMAX_TAGS.begin in template,
    marks=(MINIMAX_TAGS.begin, MINIMAX_TAGS.end),
)

DEEPSEEK_V32 = ToolFormat(
    names=("deepseek_v32",),
    parse=parse_with(V32_TAGS),
    pattern=_pattern(V32_TAGS),
    detect=lambda template: DSML in template and "function_calls" in template,
    marks=(V32_TAGS.begin, V32_TAGS.end, DSML),
)

DEEPSEEK_V4 = ToolFormat(
    names=("deepseek_v4",),
    parse=parse_with(V4_TAGS),
    pattern=_pattern(V4_TAGS),
    detect=lambda template: DSML in template,
    marks=(V4_TAGS.begin, V4_TAGS.end, DSML),
)
