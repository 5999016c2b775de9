"""The output of /v1/responses while it grows: its items, and the events that tell of them.

Events are numbered and typed as OpenAI's client reads them. Knows nothing of HTTP or the engine.
"""

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from jaxserve.server.chat import chat_logprobs
from jaxserve.server.parts import Part, Piece, part_of

Event = dict[str, Any]

PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}
CONTENT = {"text": "output_text", "reasoning": "reasoning_text"}


class OutputItems:
    """Turns pieces into items and events.

    Attributes:
        items: those that are complete.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._part: Part | None = None
        self._item_id = ""
        self._next_number = 0

    def numbered(self, kind: str, **fields: Any) -> Event:
        """An event of any kind, with the next number."""
        event = {"type": kind, "sequence_number": self._next_number, **fields}
        self._next_number += 1
        return event

    def add(self, pieces: Iterable[Piece]) -> Iterator[Event]:
        """Take in pieces; yields what happened."""
        for piece in pieces:
            if self._part is None or not self._part.holds(piece):
                yield from self._end("completed")
                yield from self._begin(piece)
            assert self._part is not None
            self._part.add(piece)
            if piece.text:
                yield self._delta(piece)

    def finish(self, status: str) -> Iterator[Event]:
        """End the last item; an answer without any gets an empty message.

        Args:
            status: "completed" or "incomplete".
        """
        if self._part is None and not self.items:
            yield from self._begin(Piece("text", ""))
        yield from self._end(status)

    def _place(self) -> dict[str, Any]:
        assert self._part is not None
        place = {"item_id": self._item_id, "output_index": len(self.items)}
        return place if self._part.kind == "call" else {**place, "content_index": 0}

    def _begin(self, piece: Piece) -> Iterator[Event]:
        self._part = part_of(piece)
        self._item_id = f"{PREFIX[piece.kind]}_{uuid.uuid4().hex}"
        item = _item(self._part, self._item_id, "in_progress")
        if self._part.kind != "call":
            item["content"] = []
        yield self.numbered("response.output_item.added", output_index=len(self.items), item=item)
        if self._part.kind != "call":
            content = _content(self._part)
            yield self.numbered("response.content_part.added", **self._place(), part=content)

    def _delta(self, piece: Piece) -> Event:
        if piece.kind == "call":
            kind = "response.function_call_arguments.delta"
            return self.numbered(kind, **self._place(), delta=piece.text)
        kind = f"response.{CONTENT[piece.kind]}.delta"
        event = self.numbered(kind, **self._place(), delta=piece.text)
        return event | _logprobs(piece)

    def _end(self, status: str) -> Iterator[Event]:
        part = self._part
        if part is None:
            return
        if part.kind == "call":
            kind = "response.function_call_arguments.done"
            yield self.numbered(kind, **self._place(), name=part.name, arguments=part.text)
        else:
            kind = f"response.{CONTENT[part.kind]}.done"
            yield self.numbered(kind, **self._place(), text=part.text) | _logprobs(part)
            kind = "response.content_part.done"
            yield self.numbered(kind, **self._place(), part=_content(part))
        item, index = _item(part, self._item_id, status), len(self.items)
        yield self.numbered("response.output_item.done", output_index=index, item=item)
        self.items.append(item)
        self._part = None


def _item(part: Part, item_id: str, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": item_id, "status": status}
    if part.kind == "call":
        names = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
        return {**item, "type": "function_call", **names}
    if part.kind == "reasoning":
        return {**item, "type": "reasoning", "summary": [], "content": [_content(part)]}
    return {**item, "type": "message", "role": "assistant", "content": [_content(part)]}


def _content(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {
        "type": "output_text",
        "text": part.text,
        "annotations": [],
        "logprobs": chat_logprobs(part.logprobs),
    }


def _logprobs(part: Part | Piece) -> dict[str, Any]:
    return {"logprobs": chat_logprobs(part.logprobs)} if part.kind == "text" else {}
