"""The parts of a chat answer while it comes: text, reasoning, tool calls.

/v1/responses and /v1/messages read answers through this, part by part, whatever format the model
writes them in. Knows nothing of HTTP or events.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxserve.chat_formats import CallArguments, CallStart, Event, Reasoning, Text
from jaxserve.outputs import OutputDelta, PositionLogprobs
from jaxserve.server.answers import Answers

Kind = Literal["text", "reasoning", "call"]


class Piece(NamedTuple):
    """More of a part. A piece of another part than the one before ends that one.

    Attributes:
        kind: what it is a part of.
        text: of the answer, the reasoning, or a call's arguments (JSON).
        call_index: which call of the answer; 0 for other kinds.
        call_id, name: of a call; on all of its pieces.
        logprobs: of the text's tokens.
    """

    kind: Kind
    text: str
    call_index: int = 0
    call_id: str = ""
    name: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(slots=True)
class Part:
    """A whole part, or one that is still growing."""

    kind: Kind
    text: str = ""
    call_index: int = 0
    call_id: str = ""
    name: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()

    def holds(self, piece: Piece) -> bool:
        """Whether a piece belongs to this part."""
        return (self.kind, self.call_index) == (piece.kind, piece.call_index)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs


def part_of(piece: Piece) -> Part:
    """The part that begins with a piece; the piece itself is not added yet."""
    return Part(piece.kind, "", piece.call_index, piece.call_id, piece.name)


class PieceReader:
    """Reads the pieces out of the only answer to a conversation.

    Attributes:
        num_reasoning_tokens: tokens that came with nothing but reasoning.
    """

    def __init__(self, answers: Answers):
        self.num_reasoning_tokens = 0
        self._answers = answers
        self._parser = None if answers.plan is None else answers.plan.parser()
        self._logprobs: tuple[PositionLogprobs, ...] = ()
        self._num_tokens = 0
        self._calls: dict[int, Piece] = {}

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """The pieces as they come; ends when the answer has ended.

        Raises:
            EngineDeadError: the engine failed.
        """
        async with aclosing(self._answers.deltas()) as deltas:
            async for _, delta in deltas:
                if pieces := self._read(delta):
                    yield pieces

    def _read(self, delta: OutputDelta) -> list[Piece]:
        """What came, as pieces; log-probabilities go with the first text that there is."""
        self._logprobs += delta.logprobs
        self._num_tokens += len(delta.token_ids)
        if self._parser is None:
            pieces = [Piece("text", delta.text)] if delta.text else []
        else:
            events = self._parser.feed(delta.text)
            if delta.finish_reason is not None:
                events += self._parser.finish()
            pieces = [piece for event in events if (piece := self._piece(event)) is not None]
        if pieces:
            if all(piece.kind == "reasoning" for piece in pieces):
                self.num_reasoning_tokens += self._num_tokens
            self._num_tokens = 0
        for i, piece in enumerate(pieces):
            if piece.kind == "text":
                pieces[i] = piece._replace(logprobs=self._logprobs)
                self._logprobs = ()
                break
        return pieces

    def _piece(self, event: Event) -> Piece | None:
        match event:
            case Text(text):
                return Piece("text", text)
            case Reasoning(text):
                return Piece("reasoning", text)
            case CallStart(index, name, call_id):
                assert self._answers.plan is not None, "only a plan has a parser"
                call_id = self._answers.plan.call_id(index, name, call_id)
                self._calls[index] = piece = Piece("call", "", index, call_id, name)
                return piece
            case CallArguments(index, text):
                return self._calls[index]._replace(text=text)
        return None
