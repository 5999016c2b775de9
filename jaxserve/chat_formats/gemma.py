"""Gemma 4, and FunctionGemma with other tags.

    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>
    <start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>

Keys have no quotes, texts have a mark of their own, though some words come without; names of
Python or JSON stand for true, false and null. JSON is read too: it is what demanded calls have
within lists and objects. A call is given out when all of it is there.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, CallEnd, CallStart, Text, to_json
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat
from jaxserve.chat_formats.listed import listed_parts
from jaxserve.chat_formats.source import Parsing, Source, head_until, text_until
from jaxserve.chat_formats.tagged import definitions_of, value_parts
from jaxserve.chat_formats.tools import Tool, is_text

ENDS = {"<|tool_call>": "<tool_call|>", "<start_function_call>": "<end_function_call>"}
QUOTES = ('<|"|>', "<escape>")
HEAD = re.compile(r"\s*call:([A-Za-z0-9_.-]{1,64})\s*(?=\{)")
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
WORD = re.compile(r"[^\s,{}\[\]<][^,{}\[\]<]*")
WORDS = {"true": True, "false": False, "null": None, "none": None}
KEY = re.compile(r"[^\s:{}\[\],]+")
MAX_CHARS = 262144
MAX_DEPTH = 32


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while (begin := (yield from text_until(source, tuple(ENDS)))) is not None:
        found = yield from head_until(source, (ENDS[begin],), MAX_CHARS)
        if found is None and source.is_final:
            found = source.take(MAX_CHARS), ""
        if found is None:
            yield Text(begin)
            continue
        inside, end = found
        call = _read_call(inside)
        if call is None:
            # Only the last mark before the end may begin a call; to try them all takes too long.
            last = max(inside.rfind(mark) for mark in ENDS)
            text, again = (inside[:last], inside[last:]) if last >= 0 else (inside, "")
            yield Text(begin + text + ("" if again else end))
            source.text = again + (end if again else "") + source.text
            continue
        name, arguments = call
        index = source.next_call()
        yield CallStart(index, name)
        yield CallArguments(index, arguments)
        yield CallEnd(index, begin + inside + end)


def _read_call(text: str) -> tuple[str, str] | None:
    head = HEAD.match(text)
    if head is None:
        return None
    try:
        value, end = _read(text, head.end(), 0)
    except (ValueError, IndexError):
        return None
    if text[end:].strip():
        return None
    return head[1], to_json(value)


def _read(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A value at a place in the text, and where it ends. ValueError or IndexError: it is none."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    at = _skip(text, at)
    if quoted := _read_quoted(text, at):
        return quoted
    if text[at] == "{":
        return _read_object(text, at + 1, depth)
    if text[at] == "[":
        return _read_list(text, at + 1, depth)
    return _read_word(text, at)


def _read_quoted(text: str, at: int) -> tuple[str, int] | None:
    for quote in QUOTES:
        if text.startswith(quote, at):
            end = text.index(quote, at + len(quote))
            return text[at + len(quote) : end], end + len(quote)
    if text[at] == '"':
        try:
            return json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            return None
    return None


def _read_word(text: str, at: int) -> tuple[Any, int]:
    """A value without quotes: a number, a name of Python or JSON, or a text."""
    match = WORD.match(text, at)
    if match is None:
        raise ValueError("no value")
    word = match[0].rstrip()
    if word.lower() in WORDS:
        return WORDS[word.lower()], match.end()
    number = NUMBER.fullmatch(word)
    if number is None:
        return word, match.end()
    if not (number[1] or number[2]):
        return int(word), match.end()
    if math.isinf(value := float(word)):
        raise ValueError("JSON has no such number")
    return value, match.end()


def _read_object(text: str, at: int, depth: int) -> tuple[Any, int]:
    found: dict[str, Any] = {}
    while text[at := _skip(text, at)] != "}":
        key, at = _read_quoted(text, at) or _read_key(text, at)
        at = _skip(text, at)
        if text[at] != ":":
            raise ValueError("no key")
        found[key], at = _read(text, at + 1, depth + 1)
        at = _skip(text, at)
        at += text[at] == ","
    return found, at + 1


def _read_key(text: str, at: int) -> tuple[str, int]:
    key = KEY.match(text, at)
    if key is None:
        raise ValueError("no key")
    return key[0], key.end()


def _read_list(text: str, at: int, depth: int) -> tuple[Any, int]:
    found = []
    while text[at := _skip(text, at)] != "]":
        value, at = _read(text, at, depth + 1)
        found.append(value)
        at = _skip(text, at)
        at += text[at] == ","
    return found, at + 1


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _format(name: str, begin: str, quote: str) -> ToolFormat:
    def call(tool: Tool) -> list[Part]:
        definitions = definitions_of(tool)

        def argument(key: str, schema: Any) -> list[Part]:
            if is_text(schema):
                return [f"{key}:{quote}", *value_parts(schema, quote, definitions)]
            return [f"{key}:", *value_parts(schema, "", definitions)]

        keys = sorted(tool.properties, key=str.lower)  # as the chat templates have them
        arguments = listed_parts(tool, argument, ",", keys)
        return [f"{begin}call:{tool.name}{{", *arguments, "}" + ENDS[begin]]

    return ToolFormat(
        names=(name,),
        parse=parse,
        pattern=CallPattern(call),
        detect=lambda template: begin in template,
        marks=(*ENDS, *ENDS.values(), *QUOTES),
    )


FORMAT = _format("gemma4", "<|tool_call>", QUOTES[0])
FUNCTION_GEMMA = _format("functiongemma", "<start_function_call>", QUOTES[1])
