"""The text of a reply as it comes, and the moves from which the formats' parsers are made.

A parser is a generator over a `Source`: it yields events, and NEED_MORE when what has come does
not decide how to go on. So it is written as if the whole text were there, and works for any cut.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

from jaxserve.chat_formats.events import CallArguments, Event, Text

NEED_MORE = None
Parsing: TypeAlias = Generator[Event | None, None, None]
"""Yields events and NEED_MORE."""

MAX_HEAD_CHARS = 4096
"""Longest head of a call, up to its arguments; more is text."""

JSON_CHARS = frozenset(":, \t\r\n0123456789+-.eE" + "true" + "false" + "null")
"""What JSON has outside its strings, beside brackets."""


class Source:
    """Text that has come and has not been used.

    Attributes:
        text: from the first character that has not been used.
        is_final: nothing will follow.
        num_calls: calls so far, which number the next one.
    """

    def __init__(self) -> None:
        self.text = ""
        self.is_final = False
        self.num_calls = 0

    def take(self, count: int) -> str:
        """Use characters."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def next_call(self) -> int:
        self.num_calls += 1
        return self.num_calls - 1


class SpaceHolder:
    """Keeps white space back until more than white space follows.

    Attributes:
        chars: what is white space here; None: all that is.
    """

    def __init__(self, chars: str | None = None):
        self.chars = chars
        self._held: list[str] = []

    def pass_on(self, piece: str) -> str:
        """What is certain now."""
        text = piece.rstrip(self.chars)
        space = piece[len(text) :]
        if text:
            text = self.release() + text
        if space:
            self._held.append(space)
        return text

    def release(self) -> str:
        """What was kept back, which is no more then."""
        held, self._held = "".join(self._held), []
        return held


class StreamParser:
    """Runs a parser over text that comes in pieces."""

    def __init__(self, parse: Callable[[Source], Parsing]):
        self._source = Source()
        self._parsing = parse(self._source)

    def feed(self, text: str) -> list[Event]:
        """Take a piece of text; return what is certain now."""
        self._source.text += text
        return self._drain()

    def finish(self) -> list[Event]:
        """The rest, when no text follows."""
        self._source.is_final = True
        return self._drain()

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        for event in self._parsing:
            if event is None:  # NEED_MORE
                break
            events.append(event)
        return events


def text_until(source: Source, marks: Sequence[str]) -> Generator[Event | None, None, str | None]:
    """Give out text up to the first of `marks` and use that too; returns it, None at the end."""
    while True:
        found = [(source.text.find(mark), mark) for mark in marks if mark in source.text]
        if found:
            at, mark = min(found, key=lambda item: (item[0], -len(item[1])))
            if at:
                yield Text(source.take(at))
            # A longer mark may begin at the same place.
            longer = [m for m in marks if len(m) > len(mark) and m.startswith(source.text)]
            if longer and not source.is_final:
                yield NEED_MORE
                continue
            source.take(len(mark))
            return mark
        spare = [held_back(source.text, mark) for mark in marks]
        held = 0 if source.is_final else max(spare, default=0)
        if certain := len(source.text) - held:
            yield Text(source.take(certain))
        if source.is_final:
            return None
        yield NEED_MORE


def head_until(
    source: Source, marks: Sequence[str], max_chars: int = MAX_HEAD_CHARS
) -> Generator[None, None, tuple[str, str] | None]:
    """Wait for the first of `marks` and use it, with the text before it; returns (text, mark).

    None: it does not come within `max_chars`, and nothing was used.
    """
    searched = 0
    while True:
        starts = [(max(0, searched - len(mark) + 1), mark) for mark in marks]
        places = [(source.text.find(mark, start, max_chars), mark) for start, mark in starts]
        if found := [place for place in places if place[0] >= 0]:
            at, mark = min(found, key=lambda item: (item[0], -len(item[1])))
            head = source.take(at)
            source.take(len(mark))
            return head, mark
        searched = len(source.text)
        if source.is_final or searched >= max_chars:
            return None
        yield NEED_MORE


def blanks(source: Source) -> Generator[None, None, str]:
    """Use white space; returns it. After it there is a character, or the end."""
    used = ""
    while True:
        rest = source.text.lstrip()
        used += source.take(len(source.text) - len(rest))
        if rest or source.is_final:
            return used
        yield NEED_MORE


def follows(source: Source, mark: str) -> Generator[None, None, bool]:
    """Whether `mark` comes next, which is used then."""
    while not source.is_final and len(source.text) < len(mark) and mark.startswith(source.text):
        yield NEED_MORE
    if source.text.startswith(mark):
        source.take(len(mark))
        return True
    return False


def json_arguments(source: Source, index: int) -> Generator[Event | None, None, tuple[str, bool]]:
    """Give out a JSON object as the arguments of a call; returns its text, and if it is complete.

    Ends where its brackets close; what is wrong inside them is given out as it is.
    """
    used, depth, in_string, escaped = "", 0, False, False
    while True:
        end = None
        for i, char in enumerate(source.text):
            if in_string:
                if escaped:
                    escaped = False
                elif char == "\\":
                    escaped = True
                elif char == '"':
                    in_string = False
            elif char == '"':
                in_string = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
                if depth <= 0:
                    end = i + 1
                    break
        piece = source.take(len(source.text) if end is None else end)
        used += piece
        if piece:
            yield CallArguments(index, piece)
        if end is not None or source.is_final:
            return used, end is not None
        yield NEED_MORE


def json_span(source: Source, depth: int = 0) -> Generator[None, None, str | None]:
    """Wait for a whole JSON object or array and use it; None: it is not closed, or no JSON.

    With `depth` brackets open already, it is what is left up to the last one's end.
    """
    in_string, escaped, i = False, False, 0
    while True:
        while i < len(source.text):
            char = source.text[i]
            i += 1
            if in_string:
                in_string = escaped or char != '"'
                escaped = char == "\\" and not escaped
            elif char == '"':
                in_string, escaped = True, False
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
                if depth <= 0:
                    return source.take(i)
            elif char not in JSON_CHARS:  # a mark within what is no JSON is looked at in its turn
                return None
        if source.is_final:
            return None
        yield NEED_MORE


def held_back(text: str, mark: str) -> int:
    """How much of the end of `text` may be the beginning of `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
