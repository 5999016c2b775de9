"""Functionary 3.2: a reply is a row of messages, each with its recipient.

    >>>all
    Let me look.>>>get_weather
    {"city": "Paris"}

The prompt ends with the first mark, so that the reply begins with a recipient. `all` is the user.
"""

from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    head_until,
    json_arguments,
    text_until,
)
from jaxserve.chat_formats.tools import NAME, Tool

MARK, USER = ">>>", "all"
MAX_RECIPIENT_CHARS = 66


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    known = {tool.name for tool in tools}
    yield from blanks(source)
    yield from _message(source, "", known)
    while (yield from text_until(source, (MARK,))) is not None:
        yield from _message(source, MARK, known)


def _message(source: Source, before: str, known: set[str]) -> Generator[Event | None, None, None]:
    """Read a message from its recipient on; its text is left. `before` is what was used for it."""
    found = yield from head_until(source, ("\n",), MAX_RECIPIENT_CHARS)
    name = found[0].strip() if found else ""
    if found is None or name == USER:
        yield Text("" if found else before)
        return
    before += "".join(found)
    before += yield from blanks(source)
    # Nothing marks the first one.
    is_name = NAME.fullmatch(name) if before.startswith(MARK) else name in known
    if not is_name or not source.text.startswith("{"):
        yield Text(before)
        return
    index = source.next_call()
    yield CallStart(index, name)
    arguments, _ = yield from json_arguments(source, index)
    yield CallEnd(index, before + arguments)


def _call(tool: Tool) -> list[Part]:
    return [tool.name + "\n", parameters_of(tool)]


FORMAT = ToolFormat(
    names=("functionary_v3",),
    parse=parse,
    pattern=CallPattern(_call, between=MARK),
    detect=lambda template: MARK + USER in template,
    before_text=USER + "\n",
)
