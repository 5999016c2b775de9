"""Where a model's reasoning begins and ends in its text."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from jaxserve.chat_formats.events import Event, Reasoning, Text
from jaxserve.chat_formats.source import NEED_MORE, Parsing, Source, blanks, follows, held_back


@dataclass(frozen=True, slots=True)
class ThinkFormat:
    """One way to mark reasoning.

    Attributes:
        names: what --reasoning-parser calls it.
        begin, end: the marks.
        is_open: the reply begins inside, whatever the prompt ends with.
        also_ends: marks of what follows reasoning that was not closed; they belong to the answer.
    """

    names: tuple[str, ...]
    begin: str
    end: str
    is_open: bool = False
    also_ends: tuple[str, ...] = ()

    def detect(self, template: str) -> bool:
        """Whether a chat template knows these marks."""
        return self.begin in template and self.end in template

    def begins_inside(self, prompt: str) -> bool:
        """Whether a reply to this prompt begins inside the reasoning."""
        return self.is_open or prompt.rstrip().endswith(self.begin.rstrip())

    def parser(self, begins_inside: bool) -> Callable[[Source], Parsing]:
        """Reads reasoning, and then the answer as text."""

        def parse(source: Source) -> Parsing:
            space = yield from blanks(source)
            is_inside = yield from follows(source, self.begin)
            if is_inside or begins_inside:
                yield from self._reasoning(source, "" if is_inside else space)
                yield from blanks(source)
            elif space:
                yield Text(space)
            while True:
                if source.text:
                    yield Text(source.take(len(source.text)))
                if source.is_final:
                    return
                yield NEED_MORE

        return parse

    def _reasoning(self, source: Source, before: str) -> Generator[Event | None, None, None]:
        marks = (self.end, *self.also_ends)
        is_first, spare = True, ""
        while True:
            found = [(source.text.find(mark), mark) for mark in marks if mark in source.text]
            held = 0 if source.is_final else max(held_back(source.text, mark) for mark in marks)
            at, mark = min(found) if found else (len(source.text) - held, "")
            piece = spare + source.take(at)
            if is_first:
                piece = piece.lstrip("\r\n")
            is_first = is_first and not piece
            # Line breaks before the end mark belong to it.
            text = piece.rstrip("\r\n")
            spare = piece[len(text) :]
            if text:
                yield Reasoning(text)
            if mark == self.end:
                source.take(len(mark))
            if mark or source.is_final:
                return
            yield NEED_MORE


THINK = ThinkFormat(
    ("think", "qwen3", "glm45", "deepseek_v3", "ernie45", "smollm3", "exaone4", "olmo3"),
    "<think>",
    "</think>",
)
THINK_FORMATS = (
    ThinkFormat(("mistral",), "[THINK]", "[/THINK]"),
    ThinkFormat(("seed_oss",), "<seed:think>", "</seed:think>"),
    ThinkFormat(("gemma4",), "<|channel>thought\n", "<channel|>"),
    ThinkFormat(("cohere",), "<|START_THINKING|>", "<|END_THINKING|>"),
    ThinkFormat(("kimi_k2",), "<think>", "</think>", also_ends=("<|tool_calls_section_begin|>",)),
    ThinkFormat(("deepseek_r1", "minimax_m2", "nemotron"), "<think>", "</think>", is_open=True),
    THINK,
)
"""In the order in which a template is tried; formats that are always open are chosen by name."""
