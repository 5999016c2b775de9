"""MiniMax M2, and with tags of their own Step 3 and DeepSeek V3.2 and V4 (DSML).

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

    <｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>
    <steptml:invoke name="get_weather"><steptml:parameter name="city">Paris</steptml:parameter>
    </steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>                      (all on one line)

DeepSeek says of each value whether it is a text or JSON; for the others the tool's schema says it.
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
        begin, end: around all calls.
        prefix: what the names of the other tags begin with.
        says_text: parameters tell whether their value is a text.
        before, after: around each call.
        line_break: follows each tag.
    """

    begin: str
    end: str
    prefix: str = ""
    says_text: bool = False
    before: str = ""
    after: str = ""
    line_break: str = "\n"

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
                if tags.before and (yield from follows(source, tags.before)):
                    before += tags.before + (yield from blanks(source))
                if not (yield from follows(source, tags.invoke)):
                    break
                yield from _invoke(source, tags, known, before + tags.invoke)
                before = ""
                if tags.after:
                    before = yield from blanks(source)
                    if (yield from follows(source, tags.after)):
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
            head=f'{tags.before}{tags.invoke}"{tool.name}">{tags.line_break}',
            before_key=tags.parameter + '"',
            after_key=after_key,
            after_value=tags.parameter_end + tags.line_break,
            tail=tags.invoke_end + tags.after + tags.line_break,
        )

    return CallPattern(call, begin=tags.begin + tags.line_break, end=tags.end)


MINIMAX_TAGS = Tags("<minimax:tool_call>", "</minimax:tool_call>")
V32_TAGS = Tags(f"<{DSML}function_calls>", f"</{DSML}function_calls>", DSML, says_text=True)
V4_TAGS = Tags(f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", DSML, says_text=True)
STEP_TAGS = Tags(
    "<｜tool_calls_begin｜>",
    "<｜tool_calls_end｜>",
    "steptml:",
    before="<｜tool_call_begin｜>function<｜tool_sep｜>",
    after="<｜tool_call_end｜>",
    line_break="",
)

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

STEP3 = ToolFormat(
    names=("step3",),
    parse=parse_with(STEP_TAGS),
    pattern=_pattern(STEP_TAGS),
    detect=lambda template: STEP_TAGS.begin in template or "<steptml:" in template,
    marks=(STEP_TAGS.begin, STEP_TAGS.end, STEP_TAGS.before, STEP_TAGS.after),
)
