"""Mistral, Ministral, Magistral, Devstral.

    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}                        tokenizer v11 and later
    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}] before

Ids are nine letters and digits. In a list a model may write one after the arguments. These have
been given out by then, and clients read the id of a call from its beginning: it gets one of ours.
"""

import json
import secrets
import string
from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.json_call import json_call, json_call_list
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    json_arguments,
    text_until,
)
from jaxserve.chat_formats.tools import NAME, Tool

BEGIN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
LETTERS = string.ascii_letters + string.digits


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while (yield from text_until(source, (BEGIN,))) is not None:
        space = yield from blanks(source)
        if (yield from follows(source, "[")):
            yield from json_call_list(source, before=BEGIN + space + "[", keeps_id=True)
        elif source.text.startswith("{"):
            if not (yield from json_call(source, before=BEGIN + space, keeps_id=True)):
                yield Text(BEGIN + space)
        else:
            yield from _named(source, BEGIN + space)


def _named(source: Source, before: str) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, ("{",))
    if found is None:
        yield Text(before)
        return
    head = found[0]
    source.text = "{" + source.text
    name, _, call_id = head.replace(ARGS, "").partition(CALL_ID)
    if not NAME.fullmatch(name.strip()):
        yield Text(before + head)
        return
    index = source.next_call()
    yield CallStart(index, name.strip(), call_id.strip() or None)
    arguments, _ = yield from json_arguments(source, index)
    yield CallEnd(index, before + head + arguments)


def _call(tool: Tool) -> list[Part]:
    return [BEGIN + tool.name + ARGS, parameters_of(tool)]


def _old_call(tool: Tool) -> list[Part]:
    return [f'{{"name": {json.dumps(tool.name)}, "arguments": ', parameters_of(tool), "}"]


def _make_id(index: int, name: str) -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(9))


FORMAT = ToolFormat(
    names=("mistral",),
    parse=parse,
    pattern=CallPattern(_call),
    detect=lambda template: BEGIN in template and ARGS in template,
    marks=(BEGIN, ARGS, CALL_ID),
    make_id=_make_id,
)

OLD_FORMAT = ToolFormat(
    names=("mistral_list",),
    parse=parse,
    pattern=CallPattern(_old_call, begin=BEGIN + "[", between=", ", end="]"),
    detect=lambda template: BEGIN in template,
    marks=(BEGIN, ARGS, CALL_ID),
    make_id=_make_id,
)
