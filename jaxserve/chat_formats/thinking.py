"""Where a model's reasoning begins and ends in its text."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from jaxserve.chat_formats.events import Event, Reasoning, Text
from jaxserve.chat_formats.source import (
    NEED_MORE,
    Parsing,
    Source,
    SpaceHolder,
    blanks,
    follows,
    held_back,
    text_until,
)


@dataclass(frozen=True, slots=True)
class ThinkFormat:
    """One way to mark reasoning.

    Attributes:
        names: what --reasoning-parser calls it.
        begin, end: the marks.
        is_open: the reply begins inside, unless the prompt has closed the reasoning already.
        also_begins: other ends of a prompt after which a reply begins inside.
        also_ends: marks of what follows reasoning that was not closed; they belong to the answer.
        wraps: marks that may stand around the answer and are left out of it; the first may be "".
        needs: a text that its chat templates have beside a mark.
        unless: a text that they do not have.
        shown_by: a text by which they are known, where they put the marks together from parts.
        fit: the format with the marks of a chat template, where each checkpoint has its own.
        always_wraps: the first of `wraps` stands around every answer, an empty one before calls.
        tail: what ends a reply and is left out.
    """

    names: tuple[str, ...]
    begin: str
    end: str
    is_open: bool = False
    also_begins: tuple[str, ...] = ()
    also_ends: tuple[str, ...] = ()
    wraps: tuple[tuple[str, str], ...] = ()
    needs: str = ""
    unless: str = ""
    shown_by: str = ""
    fit: "Callable[[str], ThinkFormat] | None" = None
    always_wraps: bool = False
    tail: tuple[str, ...] = ()

    def detect(self, template: str) -> bool:
        """Whether a chat template shows this way. Those that are always open are named instead.

        One mark is enough: OLMo 3's template only opens, the first R1's only closes.
        """
        if self.shown_by:
            return self.shown_by in template
        if self.is_open or self.needs not in template:
            return False
        if self.unless and self.unless in template:
            return False
        return self.begin.rstrip() in template or self.end in template

    def begins_inside(self, prompt: str) -> bool:
        """Whether a reply to this prompt begins inside the reasoning."""
        prompt = prompt.rstrip()
        if prompt.endswith(self.end):
            return False
        return self.is_open or prompt.endswith((self.begin.rstrip(), *self.also_begins))

    @property
    def marks(self) -> set[str]:
        """Texts that must not be left out of a reply as special tokens."""
        around = {mark for pair in self.wraps for mark in pair}
        return {self.begin.strip(), self.end, *self.also_ends, *around, *self.tail}

    def parser(self, begins_inside: bool) -> Callable[[Source], Parsing]:
        """Reads reasoning, and then the answer as text."""

        def parse(source: Source) -> Parsing:
            space = yield from blanks(source)
            is_inside = yield from follows(source, self.begin)
            if is_inside or begins_inside:
                yield from self._reasoning(source, "" if is_inside else space)
                yield from blanks(source)
                space = ""
            for begin, end in self.wraps:
                if (yield from follows(source, begin)):
                    yield from _wrapped(source, end)
                    space = ""
                    break
            if space:
                yield Text(space)
            while (yield from text_until(source, self.tail)) is not None:
                pass

        return parse

    def _reasoning(self, source: Source, before: str) -> Generator[Event | None, None, None]:
        marks = (self.end, *self.also_ends)
        is_first, held = True, SpaceHolder("\r\n")
        while True:
            found = [(source.text.find(mark), mark) for mark in marks if mark in source.text]
            spare = 0 if source.is_final else max(held_back(source.text, mark) for mark in marks)
            at, mark = min(found) if found else (len(source.text) - spare, "")
            piece = source.take(at)
            if is_first:
                piece = piece.lstrip("\r\n")
                is_first = not piece
            # Line breaks before the end mark belong to it.
            if text := held.pass_on(piece):
                yield Reasoning(text)
            if mark == self.end:
                source.take(len(mark))
            if mark or source.is_final:
                return
            yield NEED_MORE


def _wrapped(source: Source, end: str) -> Parsing:
    """An answer up to the mark that ends it; the white space next to the marks belongs to them."""
    yield from blanks(source)
    held = SpaceHolder()
    while True:
        at = source.text.find(end)
        certain = at if at >= 0 else len(source.text) - held_back(source.text, end)
        if source.is_final and at < 0:
            certain = len(source.text)
        if text := held.pass_on(source.take(certain)):
            yield Text(text)
        if at >= 0:
            source.take(len(end))
            yield from blanks(source)
            return
        if source.is_final:
            yield Text(held.release())
            return
        yield NEED_MORE


KIMI_SECTION = "<|tool_calls_section_begin|>"

THINK = ThinkFormat(
    ("think", "qwen3", "glm45", "deepseek_v3", "smollm3", "exaone4", "olmo3"),
    "<think>",
    "</think>",
)
THINK_FORMATS = (
    ThinkFormat(
        ("kimi_k3",),
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        wraps=(
            ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
            ("", "<|close|>response<|sep|>"),  # the prompt may have begun it
        ),
        shown_by="<|open|>",
        always_wraps=True,
        tail=("<|close|>message<|sep|>",),
    ),
    ThinkFormat(("minimax_m3",), "<mm:think>", "</mm:think>"),
    ThinkFormat(
        ("apertus",), "<|inner_prefix|>", "<|inner_suffix|>", also_ends=("<|tools_prefix|>",)
    ),
    ThinkFormat(("mistral",), "[THINK]", "[/THINK]"),
    ThinkFormat(
        ("seed_oss",),
        "<seed:think>",
        "</seed:think>",
        also_begins=("<seed:think><seed:cot_budget_reflect>",),
    ),
    ThinkFormat(("gemma4",), "<|channel>thought\n", "<channel|>"),
    ThinkFormat(
        ("cohere",),
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        wraps=(
            ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
            ("<|START_TEXT|>", "<|END_TEXT|>"),
            ("", "<|END_RESPONSE|>"),  # the prompt may have begun it
        ),
    ),
    ThinkFormat(
        ("apriel",),
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        wraps=(("", "[END FINAL RESPONSE]"),),
    ),
    ThinkFormat(("longcat",), "<longcat_think>", "</longcat_think>"),
    ThinkFormat(
        ("kimi_k2",),
        "<think>",
        "</think>",
        also_ends=(KIMI_SECTION,),
        needs=KIMI_SECTION,
    ),
    ThinkFormat(
        ("ernie45", "granite33"),
        "<think>",
        "</think>",
        wraps=(("<response>", "</response>"),),
        needs="<response>",
        unless="<minimax:tool_call>",  # there it is what a tool said
    ),
    ThinkFormat(
        ("hunyuan_a13b",),
        "<think>",
        "</think>",
        wraps=(("<answer>", "</answer>"),),
        needs="<answer>",
    ),
    ThinkFormat(
        ("deepseek_r1", "minimax_m2", "nemotron", "step3"), "<think>", "</think>", is_open=True
    ),
    THINK,
)
"""In the order in which a template is tried; formats that are always open are chosen by name."""
