"""Llama 3.1 to 4: the reply is a bare call, or several after each other.

    {"name": "get_weather", "parameters": {"city": "Paris"}}

It may begin with <|python_tag|>; `;`, `,` or a line break may stand between calls. Llama 4 writes
<|python_start|> and <|python_end|> around a call or around the text before it.
"""

import json
from collections.abc import Collection, Generator, Sequence

from jaxserve.chat_formats.events import Event, Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.json_call import json_call
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, text_until
from jaxserve.chat_formats.tools import Tool

TAG, START, END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    space = yield from blanks(source)
    if source.text.startswith("{"):
        # Nothing marks it: an object that names no tool is an answer in JSON.
        yield from _calls(source, space, {tool.name for tool in tools})
    else:
        yield Text(space)
    # Text before calls is not the rule, but after a tag they are certain.
    while (tag := (yield from text_until(source, (TAG, START, END)))) is not None:
        yield from _calls(source, tag if tag == TAG else "")


def _calls(
    source: Source, before: str, known: Collection[str] = ()
) -> Generator[Event | None, None, None]:
    while True:
        before += yield from blanks(source)
        # Any answer in JSON may have a name.
        is_call = yield from json_call(source, before=before, needs_arguments=True, known=known)
        if not is_call:
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
    detect=lambda template: (
        '"parameters": ' in template
        and ("<|start_header_id|>" in template or "<|header_start|>" in template)
    ),
    marks=(TAG, START, END),
)
