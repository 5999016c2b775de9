"""GLM-4.5 to GLM-5, and with other tags Hunyuan HY-V3 and V4 and some of LongCat.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

Later ones leave the line breaks out. Values that are no texts are JSON.
"""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, ToolFormat
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    text_until,
)
from jaxserve.chat_formats.tagged import tagged_parts, tagged_value
from jaxserve.chat_formats.tools import NAME, Tool


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one family.

    Attributes:
        prefix, suffix: what the names of the tags begin and end with.
        after_name: stands between the name of the tool and the arguments.
        section, section_end: around all calls.
    """

    prefix: str = ""
    suffix: str = ""
    after_name: str = ""
    section: str = ""
    section_end: str = ""

    @property
    def begin(self) -> str:
        return f"<{self.prefix}tool_call{self.suffix}>"

    @property
    def end(self) -> str:
        return f"</{self.prefix}tool_call{self.suffix}>"

    @property
    def key(self) -> str:
        return f"<{self.prefix}arg_key{self.suffix}>"

    @property
    def key_end(self) -> str:
        return f"</{self.prefix}arg_key{self.suffix}>"

    @property
    def value(self) -> str:
        return f"<{self.prefix}arg_value{self.suffix}>"

    @property
    def value_end(self) -> str:
        return f"</{self.prefix}arg_value{self.suffix}>"

    @property
    def marks(self) -> tuple[str, ...]:
        inner = (self.begin, self.end, self.key, self.key_end, self.value, self.value_end)
        return tuple(filter(None, (*inner, self.after_name, self.section, self.section_end)))


def parse_with(tags: Tags) -> Any:
    """A parser of calls with these tags."""
    marks = tuple(filter(None, (tags.begin, tags.section, tags.section_end)))

    def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
        known = {tool.name: tool for tool in tools}
        while (mark := (yield from text_until(source, marks))) is not None:
            if mark == tags.begin:
                yield from read_call(source, tags, known, tags.begin)

    return parse


def read_call(
    source: Source, tags: Tags, known: dict[str, Tool], before: str
) -> Generator[Event | None, None, None]:
    """Read a call from its name on; `before` is what was used for it."""
    found = yield from head_until(source, (tags.key, tags.end))
    name = found[0].strip() if found else ""
    if tags.after_name:
        name = name.removesuffix(tags.after_name).strip()
    if found is None or not NAME.fullmatch(name):
        yield Text(before + ("".join(found) if found else ""))
        return
    head, mark = found
    index, raw = source.next_call(), before + head + mark
    properties = known[name].properties if name in known else {}
    yield CallStart(index, name)
    yield CallArguments(index, "{")
    is_first = True
    while mark == tags.key:
        found = yield from head_until(source, (tags.key_end,))
        if found is None:
            break
        key = found[0].strip()
        raw += found[0] + tags.key_end
        raw += yield from blanks(source)
        if not (yield from follows(source, tags.value)):
            break
        yield CallArguments(index, ("" if is_first else ", ") + json.dumps(key) + ": ")
        is_first = False
        raw += tags.value
        raw += yield from tagged_value(source, index, properties.get(key), (tags.value_end,))
        if (yield from follows(source, tags.value_end)):
            raw += tags.value_end
        raw += yield from blanks(source)
        if (yield from follows(source, tags.key)):
            raw += tags.key
        else:
            mark = tags.end
            if (yield from follows(source, tags.end)):
                raw += tags.end
    yield CallArguments(index, "}")
    yield CallEnd(index, raw)


def pattern_with(tags: Tags, line_break: str) -> CallPattern:
    """How calls with these tags are written."""

    def call(tool: Tool) -> Any:
        return tagged_parts(
            tool,
            head=tags.begin + tool.name + tags.after_name + line_break,
            before_key=tags.key,
            after_key=tags.key_end + line_break + tags.value,
            after_value=tags.value_end + line_break,
            tail=tags.end + (line_break if tags.section else ""),
        )

    if not tags.section:
        return CallPattern(call, between=line_break)
    return CallPattern(call, begin=tags.section + line_break, end=tags.section_end)


TAGS = Tags()

FORMAT = ToolFormat(
    names=("glm45",),
    parse=parse_with(TAGS),
    pattern=pattern_with(TAGS, "\n"),
    detect=lambda template: TAGS.key in template,
    marks=TAGS.marks,
)

WITHOUT_BREAKS = ToolFormat(
    names=("glm47",),
    parse=parse_with(TAGS),
    pattern=pattern_with(TAGS, ""),
    detect=lambda template: TAGS.key_end + TAGS.value in template,
    marks=TAGS.marks,
)
