"""What a person sees while an answer comes: markdown that grows, then a quiet line of figures.

Blocks that are complete (paragraphs, lists, fenced code) are printed once and scroll away like any
output; only the block that still grows is redrawn. Without a terminal the text is printed as it is.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from jaxserve.cli.chat_client import Piece, Usage

FENCES = ("```", "~~~")
REDRAWS_PER_S = 12


@dataclass
class Shown:
    """An answer that was shown, to its end or until it was stopped."""

    text: str = ""
    usage: Usage = field(default_factory=Usage)
    was_stopped: bool = False
    finish_reason: str | None = None
    first_s: float = 0.0
    total_s: float = 0.0
    num_pieces: int = 0

    @property
    def tokens_per_s(self) -> float:
        later = (self.usage.completion_tokens or self.num_pieces) - 1
        return later / max(self.total_s - self.first_s, 1e-9) if later > 0 else 0.0

    def figures(self) -> str:
        """One line."""
        parts = ["stopped"] if self.was_stopped else []
        if self.finish_reason == "length":
            parts.append("cut at the token limit")
        num_tokens = self.usage.completion_tokens or self.num_pieces
        parts.append(f"{num_tokens} tokens")
        if self.first_s:
            parts.append(f"first after {self.first_s:.2f} s")
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.usage.cached_tokens:
            where = [s for s in self.usage.cached_by_source if s != "device"]
            source = f" ({', '.join(where)})" if where else ""
            cached = f"{self.usage.cached_tokens} of {self.usage.prompt_tokens}"
            parts.append(f"{cached} prompt tokens cached{source}")
        return ", ".join(parts)


def split_blocks(text: str) -> tuple[list[str], str]:
    """The blocks of markdown that can no longer change, and the rest.

    A block ends at an empty line outside of fenced code; what follows an empty line may still
    belong to a list, so a list ends only where a line begins that is no item and not indented.
    """
    lines = text.split("\n")
    fence, cut = "", 0
    for index, line in enumerate(lines[:-1]):
        stripped = line.lstrip()
        if fence:
            if stripped.startswith(fence):
                fence = ""
        elif stripped.startswith(FENCES):
            fence = stripped[:3]
        elif not stripped and _starts_block(lines[index + 1]):
            cut = index + 1
    done = "\n".join(lines[:cut])
    return [done] if done.strip() else [], "\n".join(lines[cut:])


def show_answer(console: Console, pieces: Iterator[Piece], *, markdown: bool) -> Shown:
    """Print an answer as it comes; Ctrl-C stops the answer, and what came is kept.

    Raises:
        JaxserveError: the server refused, or the connection broke.
    """
    shown = Shown()
    started_s = time.monotonic()
    painter = _Painter(console) if markdown and console.is_terminal else _Plain()
    try:
        for piece in pieces:
            if piece.usage is not None:
                shown.usage = piece.usage
            shown.finish_reason = piece.finish_reason or shown.finish_reason
            if piece.text or piece.reasoning:
                shown.first_s = shown.first_s or time.monotonic() - started_s
                shown.num_pieces += 1
                shown.text += piece.text
                painter.add(piece)
    except KeyboardInterrupt:
        shown.was_stopped = True
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
        painter.close()
    shown.total_s = time.monotonic() - started_s
    return shown


class _Plain:
    """Text as it comes."""

    def add(self, piece: Piece) -> None:
        print(piece.text, end="", flush=True)

    def close(self) -> None:
        print(flush=True)


class _Painter:
    """Markdown as it comes."""

    def __init__(self, console: Console):
        self._console = console
        self._reasoning = ""
        self._open = ""
        self._live = Live(
            console=console,
            auto_refresh=True,
            refresh_per_second=REDRAWS_PER_S,
            transient=True,
            vertical_overflow="ellipsis",
        )
        self._live.start()

    def add(self, piece: Piece) -> None:
        self._reasoning += piece.reasoning
        if piece.text and self._reasoning:
            self._console.print(Text(self._reasoning.strip(), style="dim italic"), "")
            self._reasoning = ""
        self._open += piece.text
        blocks, self._open = split_blocks(self._open)
        for block in blocks:
            self._console.print(Markdown(block), "", sep="\n", end="")
        self._live.update(self._growing())

    def close(self) -> None:
        self._live.update(Text(""))
        self._live.stop()
        if self._reasoning:
            self._console.print(Text(self._reasoning.strip(), style="dim italic"))
        if self._open.strip():
            self._console.print(Markdown(self._open))

    def _growing(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._reasoning:
            parts.append(Text(self._reasoning.strip(), style="dim italic"))
        if self._open.strip():
            parts.append(Markdown(self._open))
        return Group(*parts)


def _starts_block(line: str) -> bool:
    """Whether a line after an empty one cannot belong to the list before it."""
    if not line.strip() or line.startswith((" ", "\t", "-", "*", "+")):
        return False
    number = line.split(".", 1)[0].split(")", 1)[0]
    return not number.isdigit()


def new_console() -> Console:
    """On standard output, with colours if it is a terminal."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=False)
