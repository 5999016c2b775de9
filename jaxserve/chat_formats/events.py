"""What a reply consists of: text, reasoning, tool calls; as events, and as a whole.

Neighbouring `Text`, `Reasoning` or `CallArguments` events may be cut anywhere; what they join to
does not depend on how the model's text was cut.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; `call_id` is None if the format has none."""

    index: int
    name: str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, which join to the text of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A tool call is complete; `raw` is what the model wrote for it."""

    index: int
    raw: str


Event: TypeAlias = Text | Reasoning | CallStart | CallArguments | CallEnd


@dataclass(slots=True)
class ToolCall:
    """One call of a reply; `arguments` is JSON."""

    name: str
    call_id: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Reply:
    """A whole reply."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def assemble(events: Iterable[Event]) -> Reply:
    """The reply of these events. A call whose arguments are no JSON object is text."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case Text(text):
                texts.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index, name, call_id):
                calls[index], arguments[index] = ToolCall(name, call_id), []
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallEnd(index, raw):
                if not is_object("".join(arguments[index])):
                    texts.append(raw)
                    del calls[index]
    for index, call in calls.items():
        call.arguments = "".join(arguments[index])
    return Reply("".join(texts), "".join(reasoning), list(calls.values()))


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def to_json(value: Any) -> str:
    """Arguments as JSON that can be encoded: halves of characters are escaped."""
    written = json.dumps(value, ensure_ascii=False)
    if any("\ud800" <= char <= "\udfff" for char in written):
        return json.dumps(value)
    return written
