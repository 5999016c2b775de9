"""The parts of a chat answer while it comes: text, reasoning, tool calls.

/v1/responses and /v1/messages read answers through this, part by part, whatever format the model
writes them in. Knows nothing of HTTP or events.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxserve.chat_formats import CallArguments, CallStart, Event, Reasoning, Text
from jaxserve.conversation import ChatPlan
from jaxserve.outputs import PositionLogprobs
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


async def pieces_of(answers: Answers) -> AsyncGenerator[list[Piece], None]:
    """The pieces of the only answer, as they come; ends when it has ended.

    Raises:
        EngineDeadError: the engine failed.
    """
    plan = answers.plan
    parser = None if plan is None else plan.parser()
    names: dict[int, Piece] = {}
    async with aclosing(answers.deltas()) as deltas:
        async for _, delta in deltas:
            if plan is not None and parser is not None:
                events = parser.feed(delta.text)
                events += parser.finish() if delta.finish_reason is not None else []
                if pieces := list(_pieces(plan, events, names, delta.logprobs)):
                    yield pieces
            elif delta.text or delta.logprobs:
                yield [Piece("text", delta.text, logprobs=delta.logprobs)]


def _pieces(
    plan: ChatPlan,
    events: Iterable[Event],
    calls: dict[int, Piece],
    logprobs: tuple[PositionLogprobs, ...],
) -> Iterator[Piece]:
    """What the events of a reply add; log-probabilities go with the first text there is.

    Args:
        calls: the beginnings of the calls so far; new ones are added.
    """
    for event in events:
        match event:
            case Text(text):
                yield Piece("text", text, logprobs=logprobs)
                logprobs = ()
            case Reasoning(text):
                yield Piece("reasoning", text)
            case CallStart(index, name, call_id):
                call_id = plan.call_id(index, name, call_id)
                calls[index] = Piece("call", "", index, call_id, name)
                yield calls[index]
            case CallArguments(index, text):
                yield calls[index]._replace(text=text)
