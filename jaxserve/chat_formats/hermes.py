"""Hermes, Qwen 2.5/3, Granite 4, SmolLM3 and many others:

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>

Between the tags there may also be a list of calls.
"""

import json
from collections.abc import Sequence

from jaxserve.chat_formats.events import Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.json_call import json_call, json_call_list
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, text_until
from jaxserve.chat_formats.tools import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while (yield from text_until(source, (BEGIN,))) is not None:
        before = BEGIN + (yield from blanks(source))
        if (yield from follows(source, "[")):
            yield from json_call_list(source, before=before + "[")
        elif not (yield from json_call(source, before=before)):
            yield Text(before)
            continue
        space = yield from blanks(source)
        if not (yield from follows(source, END)):
            yield Text(space)


def pattern_with(begin: str, end: str) -> CallPattern:
    """How calls between these tags are written."""

    def call(tool: Tool) -> list[Part]:
        head = f'{begin}\n{{"name": {json.dumps(tool.name)}, "arguments": '
        return [head, parameters_of(tool), "}\n" + end]

    return CallPattern(call, between="\n")


FORMAT = ToolFormat(
    names=("hermes", "qwen", "granite4", "ernie45"),
    parse=parse,
    pattern=pattern_with(BEGIN, END),
    detect=lambda template: BEGIN in template,
    marks=(BEGIN, END),
)
