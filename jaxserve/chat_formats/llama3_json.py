"""Llama 3.1 to 3.3: the reply is a bare call, or several after each other.

    {"name": "get_weather", "parameters": {"city": "Paris"}}

It may begin with <|python_tag|>; `;`, `,` or a line break may stand between calls.
"""

import json
from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import Event, Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.json_call import json_call
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, text_until
from jaxserve.chat_formats.tools import Tool

TAG = "<|python_tag|>"


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    space = yield from blanks(source)
    if source.text.startswith("{") or (yield from follows(source, TAG)):
        yield from _calls(source, space)
    else:
        yield Text(space)
    # Text before calls is not the rule, but after a tag they are certain.
    while (yield from text_until(source, (TAG,))) is not None:
        yield from _calls(source, TAG)


def _calls(source: Source, before: str) -> Generator[Event | None, None, None]:
    while True:
        before += yield from blanks(source)
        if not (yield from json_call(source, before=before)):
            yield Text(before)
            return
        before = yield from blanks(source)
        for separator in (";", ","):
            if (yield from follows(source, separator)):
                before += separator
                break
        else:
            if not source.text.startswith("{"):
                yield Text(before)
                return


def _call(tool: Tool) -> list[Part]:
    return [f'{{"name": {json.dumps(tool.name)}, "parameters": ', parameters_of(tool), "}"]


FORMAT = ToolFormat(
    names=("llama3_json", "llama4_json"),
    parse=parse,
    pattern=CallPattern(_call, between="; "),
    detect=lambda template: '"parameters": ' in template and "<|start_header_id|>" in template,
    marks=(TAG,),
)
