"""Hermes, Qwen 2.5/3, Granite 4, SmolLM3 and many others, and LongCat with other tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
from collections.abc import Sequence

from jaxserve.chat_formats.events import Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.json_call import json_call
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, text_until
from jaxserve.chat_formats.tools import Tool


def format_with(begin: str, end: str, names: tuple[str, ...]) -> ToolFormat:
    """The format of calls between these tags."""

    def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
        while (yield from text_until(source, (begin,))) is not None:
            space = yield from blanks(source)
            understood = yield from json_call(source, before=begin + space)
            if not understood:
                yield Text(begin + space)
                continue
            space = yield from blanks(source)
            if not (yield from follows(source, end)):
                yield Text(space)

    def call(tool: Tool) -> list[Part]:
        head = f'{begin}\n{{"name": {json.dumps(tool.name)}, "arguments": '
        return [head, parameters_of(tool), "}\n" + end]

    return ToolFormat(
        names=names,
        parse=parse,
        pattern=CallPattern(call, between="\n"),
        detect=lambda template: begin in template,
        marks=(begin, end),
    )


FORMAT = format_with("<tool_call>", "</tool_call>", ("hermes", "qwen", "granite4", "ernie45"))

LONGCAT = format_with("<longcat_tool_call>", "</longcat_tool_call>", ("longcat",))
