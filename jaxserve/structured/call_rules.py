"""Turns the pattern of a format's calls into rules of a grammar (llguidance's Lark dialect)."""

import json
import re
from collections.abc import Mapping, Sequence

from jaxserve.chat_formats.format import (
    CallPattern,
    Digits,
    Either,
    Json,
    Optional,
    Part,
    TextBefore,
)
from jaxserve.chat_formats.tools import Tool
from jaxserve.structured.grammar import json_rule

ANY_TEXT = "/(?s:.*)/"


class RuleWriter:
    """Writes parts as rules; collects the rules that they need beside them.

    Args:
        markup: ids of special tokens by their text: text in a pattern that is one means the token.
    """

    def __init__(self, markup: Mapping[str, int]):
        self._markup = dict(markup)
        names = sorted(markup, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        """A text as it stands, special tokens in it as tokens."""
        if self._split is None:
            return json.dumps(text)
        pieces = [piece for piece in self._split.split(text) if piece]
        return " ".join(
            f"<[{self._markup[piece]}]>" if piece in self._markup else json.dumps(piece)
            for piece in pieces
        )

    def before(self, mark: str) -> str:
        """Any text that ends with the first `mark`, which is part of it."""
        pieces = [mark]
        if self._split is not None:
            pieces = [piece for piece in self._split.split(mark) if piece]
        first, rest = pieces[0], "".join(pieces[1:])
        if first in self._markup:
            return f"{ANY_TEXT} {self.text(mark)}"
        if rest:
            # A token follows, which is in no text: what stands before it alone ends nothing.
            name = f"BEFORE_{len(self.rules)}"
            self.rules.append(f"{name}: {ANY_TEXT} {json.dumps(first)}")
            return f"{name} {self.text(rest)}"
        name = f"before_{len(self.rules)}"
        self.rules.append(f"{name}[suffix={json.dumps(first)}]: {ANY_TEXT}")
        return name

    def parts(self, parts: Sequence[Part]) -> str:
        """Parts one after the other."""
        return " ".join(filter(None, (self._part(part) for part in parts))) or '""'

    def calls(self, pattern: CallPattern, tools: Sequence[Tool], *, several: bool) -> str:
        """One call of any of the tools, or one and more."""
        names = []
        for tool in tools:
            name = f"call_{len(self.rules)}"
            self.rules.append(f"{name}: {self.parts(pattern.call(tool))}")
            names.append(name)
        one = "(" + " | ".join(names) + ")"
        between = self.text(pattern.between) if pattern.between else ""
        more = f" ({between} {one})*" if several else ""
        return (
            " ".join(
                filter(None, (self.parts([pattern.begin]), one + more, self.parts([pattern.end])))
            )
            .replace('"" ', "")
            .removesuffix(' ""')
        )

    def _part(self, part: Part) -> str:
        match part:
            case str():
                return self.text(part) if part else ""
            case Json(schema):
                return self._json(schema)
            case TextBefore(mark):
                return self.before(mark)
            case Optional(parts):
                return f"({self.parts(parts)})?"
            case Either(choices):
                return "(" + " | ".join(self.parts(parts) for parts in choices) + ")"
            case Digits():
                return "/[0-9]{1,6}/"

    def _json(self, schema: object) -> str:
        name = f"json_{len(self.rules)}"
        self.rules.append(f"{name}: {json_rule(schema if isinstance(schema, Mapping) else {})}")
        return name
