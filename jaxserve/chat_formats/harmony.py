"""gpt-oss: a reply is a row of messages in channels, reasoning and calls among them.

    <|channel|>analysis<|message|>I should look.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>
    {"city": "Paris"}<|call|>                                       (all on one line)
    <|start|>assistant<|channel|>final<|message|>It rains.<|return|>

The recipient may also stand before the channel. `analysis` is reasoning; `commentary` without a
recipient is meant for the user, like `final`.
"""

import re
from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    Reasoning,
    Text,
)
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.source import (
    NEED_MORE,
    Parsing,
    Source,
    head_until,
    held_back,
    text_until,
)
from jaxserve.chat_formats.tools import Tool

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
RECIPIENT = re.compile(r"to=(?:functions\.)?([A-Za-z0-9_.-]+)")


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    recipient = ""
    if source.text.startswith(" ") or not source.text:
        while len(source.text) < len(" to=") and not source.is_final:
            yield NEED_MORE
    if source.text.startswith(" to="):  # the prompt ended with "<|start|>assistant"
        found = yield from head_until(source, (CHANNEL, MESSAGE))
        if found is None:
            yield Text(source.take(len(source.text)))
        else:
            yield from _message(source, *found, before="")
    while (mark := (yield from text_until(source, (START, CHANNEL, *ENDS)))) is not None:
        recipient = ""
        if mark in ENDS:
            continue
        if mark == START:
            found = yield from head_until(source, (CHANNEL, MESSAGE))
            if found is None:
                yield Text(mark)
                continue
            recipient, mark = found
            if mark == MESSAGE:
                yield from _message(source, recipient, mark, before=START)
                continue
        yield from _message(source, recipient, CHANNEL, before="")


def _message(
    source: Source, head: str, mark: str, *, before: str
) -> Generator[Event | None, None, None]:
    """A message after its head, or after `<|channel|>` with the rest of its head before it."""
    if mark == CHANNEL:
        found = yield from head_until(source, (MESSAGE,))
        if found is None:
            yield Text(before + CHANNEL)
            return
        head, before = f"{head} {found[0]}", before + CHANNEL + found[0] + MESSAGE
    words = head.replace(CONSTRAIN, " ").split()
    recipient = RECIPIENT.search(head)
    if recipient is not None:
        index = source.next_call()
        yield CallStart(index, recipient[1])
        raw = yield from _content(source, lambda text: CallArguments(index, text))
        if not raw.strip():  # no arguments
            yield CallArguments(index, "{}")
        yield CallEnd(index, before + raw)
    elif "analysis" in words:
        yield from _content(source, Reasoning)
    else:
        yield from _content(source, Text)


def _content(source: Source, make) -> Generator[Event | None, None, str]:
    """Give out what a message says; returns it. The mark that ends it is used."""
    used, marks = "", (*ENDS, START)
    while True:
        found = [(source.text.find(mark), mark) for mark in marks if mark in source.text]
        held = 0 if source.is_final else max(held_back(source.text, mark) for mark in marks)
        at, mark = min(found) if found else (len(source.text) - held, "")
        piece = source.take(at)
        used += piece
        if piece:
            yield make(piece)
        if mark in ENDS:
            source.take(len(mark))
        if mark or source.is_final:
            return used
        yield NEED_MORE


def _call(tool: Tool) -> list[Part]:
    head = f"{CHANNEL}commentary to=functions.{tool.name} {CONSTRAIN}json{MESSAGE}"
    return [head, parameters_of(tool), "<|call|>"]


FORMAT = ToolFormat(
    names=("openai", "openai_gptoss", "harmony"),
    parse=parse,
    pattern=CallPattern(_call, between=START + "assistant"),
    detect=lambda template: CHANNEL in template and MESSAGE in template,
    marks=(START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS),
)
