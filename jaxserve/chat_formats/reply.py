"""Reads a whole reply as it comes: reasoning first, then text and tool calls."""

import re
from collections.abc import Iterable, Sequence

from jaxserve.chat_formats.events import (
    CallEnd,
    CallStart,
    Event,
    Reasoning,
    Reply,
    Text,
    assemble,
)
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_formats.source import SpaceHolder, StreamParser
from jaxserve.chat_formats.thinking import ThinkFormat
from jaxserve.chat_formats.tools import Tool


class ReplyParser:
    """Turns the text of one reply into events; what they join to does not depend on its cuts.

    Args:
        tool_format: how calls are written; None: nothing is a call.
        think: how reasoning is marked; None: nothing is reasoning.
        begins_inside: the reply begins inside its reasoning.
        tools: what may be called.
        special: texts of special tokens, which are left out unless they are marks of a format.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        think: ThinkFormat | None,
        *,
        begins_inside: bool = False,
        tools: Sequence[Tool] = (),
        special: Iterable[str] = (),
    ):
        marks = {*(tool_format.marks if tool_format else ())}
        if think is not None:
            marks |= think.marks
        hidden = [text for text in special if text and not any(text in mark for mark in marks)]
        hidden.sort(key=len)
        self._hidden = re.compile("|".join(map(re.escape, reversed(hidden)))) if hidden else None
        self._think = None if think is None else StreamParser(think.parser(begins_inside))
        self._tools = None
        if tool_format is not None:
            self._tools = StreamParser(lambda source: tool_format.parse(source, tools))
        self._trim = _Trim()
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """Take a piece of text; return what is certain now."""
        if self._hidden is not None:
            text = self._hidden.sub("", text)
        events = self._trim.take(self._read([Text(text)] if text else []))
        self._events += events
        return events

    def finish(self) -> list[Event]:
        """The rest, when no text follows."""
        events = self._read([], is_final=True)
        events = self._trim.take(events) + self._trim.finish()
        self._events += events
        return events

    def reply(self) -> Reply:
        """Everything so far."""
        return assemble(self._events)

    def _read(self, events: list[Event], is_final: bool = False) -> list[Event]:
        for parser in (self._think, self._tools):
            if parser is None:
                continue
            read: list[Event] = []
            for event in events:
                read += parser.feed(event.text) if isinstance(event, Text) else [event]
            events = read + (parser.finish() if is_final else [])
        return events


class _Trim:
    """Leaves out white space between reasoning, text and calls."""

    def __init__(self) -> None:
        self._held = SpaceHolder()
        self._at_start = False
        self._any_calls = False

    def take(self, events: list[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                self._at_start = True
            elif isinstance(event, (CallStart, CallEnd)):
                self._held.release()
                self._at_start = self._any_calls = True
            elif isinstance(event, Text):
                event = self._text(event.text)
                if event is None:
                    continue
            kept.append(event)
        return kept

    def finish(self) -> list[Event]:
        """White space at the end is left out only after calls."""
        held = self._held.release()
        return [Text(held)] if held and not self._any_calls else []

    def _text(self, text: str) -> Text | None:
        if self._at_start:
            self._held.release()
            text = text.lstrip()
            self._at_start = not text
        certain = self._held.pass_on(text)
        return Text(certain) if certain else None


def parse_whole(parser: ReplyParser, text: str) -> Reply:
    """The reply of a text that is all there."""
    parser.feed(text)
    parser.finish()
    return parser.reply()
