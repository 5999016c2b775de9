"""What a tool-call format is: how its calls are read, and how they are enforced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxserve.chat_formats.source import Parsing, Source
from jaxserve.chat_formats.tools import Tool


@dataclass(frozen=True, slots=True)
class Json:
    """JSON that fits a schema, in a pattern."""

    schema: Any


@dataclass(frozen=True, slots=True)
class TextBefore:
    """Any text, and the mark that ends it, in a pattern."""

    mark: str


@dataclass(frozen=True, slots=True)
class Optional:
    """What may be left out, in a pattern."""

    parts: "tuple[Part, ...]"


@dataclass(frozen=True, slots=True)
class Either:
    """One of several, in a pattern."""

    choices: "tuple[tuple[Part, ...], ...]"


@dataclass(frozen=True, slots=True)
class Digits:
    """A number, in a pattern."""


Part: TypeAlias = str | Json | TextBefore | Optional | Either | Digits
"""A text stands for itself; names of special tokens in it mean these tokens."""


@dataclass(frozen=True, slots=True)
class CallPattern:
    """How calls are written, for grammars.

    Attributes:
        call: the parts of one call.
        begin, between, end: around and between calls. Grammars read without looking back: where
            `end` begins with `between`, no second call is possible.
    """

    call: Callable[[Tool], Sequence[Part]]
    begin: str = ""
    between: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One format.

    Attributes:
        names: what --tool-call-parser calls it; the first is the usual one.
        parse: reads calls out of text.
        pattern: how calls are enforced.
        detect: whether a chat template uses it.
        marks: texts that must not be left out of the text as special tokens.
        make_id: the id of a call from its number, where the format has rules for it.
        before_text: stands before an answer that is no call, also where there are no tools.
        fit: the format with the tags of a chat template, where each checkpoint has its own.
    """

    names: tuple[str, ...]
    parse: Callable[[Source, Sequence[Tool]], Parsing]
    pattern: CallPattern
    detect: Callable[[str], bool]
    marks: tuple[str, ...] = ()
    make_id: Callable[[int, str], str] | None = None
    before_text: str = ""
    fit: "Callable[[str], ToolFormat] | None" = None


def parameters_of(tool: Tool) -> Json:
    """A tool's arguments as JSON."""
    return Json({"type": "object", **tool.parameters})
