"""LongCat: as Hermes, and as GLM, with tags of its own. Both are read; the chat template shows
which of them is demanded.

    <longcat_tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</longcat_tool_call>

    <longcat_tool_call>get_weather
    <longcat_arg_key>city</longcat_arg_key>
    <longcat_arg_value>Paris</longcat_arg_value>
    </longcat_tool_call>
"""

from collections.abc import Sequence

from jaxserve.chat_formats import glm, hermes
from jaxserve.chat_formats.events import Text
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_formats.json_call import json_call
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, text_until
from jaxserve.chat_formats.tools import Tool

TAGS = glm.Tags(prefix="longcat_")


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    known = {tool.name: tool for tool in tools}
    while (yield from text_until(source, (TAGS.begin,))) is not None:
        before = TAGS.begin + (yield from blanks(source))
        if not source.text.startswith("{"):
            yield from glm.read_call(source, TAGS, known, before)
            continue
        if not (yield from json_call(source, before=before)):
            yield Text(before)
            continue
        space = yield from blanks(source)
        if not (yield from follows(source, TAGS.end)):
            yield Text(space)


FORMAT = ToolFormat(
    names=("longcat",),
    parse=parse,
    pattern=hermes.pattern_with(TAGS.begin, TAGS.end),
    detect=lambda template: TAGS.begin in template,
    marks=TAGS.marks,
)

TAGGED = ToolFormat(
    names=("longcat_xml",),
    parse=parse,
    pattern=glm.pattern_with(TAGS, "\n"),
    detect=lambda template: TAGS.begin in template and TAGS.key in template,
    marks=TAGS.marks,
)
