"""Calls as one JSON list after a mark: Granite 3, Phi-4-mini, Hunyuan, Jamba, Nemotron 2, Command.

    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]                Granite 3
    functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]                   Phi-4-mini
    <tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>      Hunyuan
    <TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>         Nemotron
    <|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city":
    "Paris"}}]<|END_ACTION|>                                             (on one line)      Command

The first Command R writes `Action:` and a code fence around the list, and no ids. Calls may stand
without the list's brackets, as MiniMax M1 has them. GigaChat 3 writes them only so, one a reply,
after `function call<|role_sep|>`, 3.1 after <|function_call|>.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.chat_formats.events import Text
from jaxserve.chat_formats.format import CallPattern, Digits, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.json_call import json_call, json_call_list
from jaxserve.chat_formats.source import Parsing, Source, blanks, follows, text_until
from jaxserve.chat_formats.tools import Tool


def parse_with(tags: Mapping[str, str]) -> Any:
    """A parser of lists after one of these marks, each with what ends it ("": nothing)."""

    def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
        while (begin := (yield from text_until(source, tuple(tags)))) is not None:
            before = begin + (yield from blanks(source))
            if begin.endswith("["):
                yield from json_call_list(source, before=before)
            elif (yield from follows(source, "[")):
                yield from json_call_list(source, before=before + "[")
            elif not (yield from json_call(source, before=before)):
                yield Text(before)
                continue
            space = yield from blanks(source)
            while not begin.endswith("[") and (yield from json_call(source, before=space)):
                space = yield from blanks(source)
            if not (yield from follows(source, tags[begin])):
                yield Text(space)

    return parse


def _call(tool: Tool) -> list[Part]:
    return [f'{{"name": {json.dumps(tool.name)}, "arguments": ', parameters_of(tool), "}"]


def _old_action(tool: Tool) -> list[Part]:
    return [f'{{"tool_name": {json.dumps(tool.name)}, "parameters": ', parameters_of(tool), "}"]


def _action(tool: Tool) -> list[Part]:
    name = json.dumps(tool.name)
    head = f'", "tool_name": {name}, "parameters": '
    return ['{"tool_call_id": "', Digits(), head, parameters_of(tool), "}"]


def _format(
    names: tuple[str, ...],
    tags: Mapping[str, str],
    detect: Callable[[str], bool],
    call: Callable[[Tool], Sequence[Part]] = _call,
    *,
    marks: tuple[str, ...] = (),
    breaks: tuple[str, str] = ("", ""),
    is_list: bool = True,
) -> ToolFormat:
    """The format with these marks; the first is the one in which calls are demanded.

    Args:
        marks: special tokens within these marks.
        breaks: white space before each call, and after the last.
    """
    begin, end = next(iter(tags.items()))
    before, after = breaks
    pattern = CallPattern(
        call,
        begin=begin.removesuffix("[") + "[" + before,
        between="," + (before or " "),
        end=after + "]" + end,
    )
    if not is_list:
        pattern = CallPattern(lambda tool: [begin, *call(tool), end])
    return ToolFormat(
        names=names,
        parse=parse_with(tags),
        pattern=pattern,
        detect=detect,
        marks=tuple(filter(None, (*tags, *tags.values(), *marks))),
    )


PHI = _format(
    ("phi4_mini_json", "phi4_mini"),
    {"functools[": "", "<|tool_call|>": "<|/tool_call|>"},
    lambda template: "functools[" in template or "<|/tool|>" in template,
)
GRANITE = _format(("granite",), {"<|tool_call|>": ""}, lambda template: "<|tool_call|>" in template)
HUNYUAN = _format(
    ("hunyuan_a13b", "jamba"),
    {"<tool_calls>": "</tool_calls>"},
    lambda template: "<tool_calls>" in template,
)
NEMOTRON = _format(
    ("nemotron_json",), {"<TOOLCALL>": "</TOOLCALL>"}, lambda template: "<TOOLCALL>" in template
)
GIGACHAT = _format(
    ("gigachat3",),
    {"function call<|role_sep|>": ""},
    lambda template: "function call" in template and "<|role_sep|>" in template,
    marks=("<|role_sep|>",),
    is_list=False,
)
GIGACHAT_31 = _format(
    ("gigachat31",),
    {"<|function_call|>": ""},
    lambda template: "<|function_call|>" in template,
    is_list=False,
)
COMMAND = _format(
    ("cohere", "cohere_command"),
    {"<|START_ACTION|>": "<|END_ACTION|>"},
    lambda template: "<|START_ACTION|>" in template,
    _action,
    breaks=("\n    ", "\n"),
)
OLD_COMMAND = _format(
    ("command_r",),
    {"Action:\n```json\n[": "```", "Action:\n```json": "```", "Action: ```json": "```"},
    lambda template: "Action:" in template and "```json" in template and "tool_name" in template,
    _old_action,
    breaks=("\n    ", "\n"),
)
