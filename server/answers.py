"""The answers to one HTTP request: events from the bridge, turned into text, answer by answer.

Whoever makes an `Answers` closes it; closing aborts what is not finished. Knows nothing of HTTP.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from jaxserve.conversation import ChatPlan
from jaxserve.outputs import OutputDelta, OutputProcessor, merge_deltas
from jaxserve.server.bridge import EngineBridge, EventQueue
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request


class AnswerDelta(NamedTuple):
    answer_index: int
    delta: OutputDelta


class Answers:
    """Admitted requests and what has been generated for each, in the order of the requests."""

    def __init__(
        self,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        bridge: EngineBridge,
        queue: EventQueue,
    ):
        self.plan: ChatPlan | None = None
        """How answers to a conversation are read; None: as plain text."""
        self.processors = [OutputProcessor(request, tokenizer) for request in requests]
        self._index = {request.request_id: i for i, request in enumerate(requests)}
        self._bridge = bridge
        self._queue = queue

    @classmethod
    async def submit(
        cls, bridge: EngineBridge, requests: Sequence[Request], tokenizer: Tokenizer
    ) -> "Answers":
        """Hand requests to the engine; returns once it has taken them (see EngineBridge.submit)."""
        return cls(requests, tokenizer, bridge, await bridge.submit(requests))

    async def deltas(self) -> AsyncGenerator[AnswerDelta, None]:
        """What comes out, until all answers have ended: a row of tokens is one delta if it can be.

        Raises:
            EngineDeadError: the engine failed.
        """
        num_left = sum(not processor.finished for processor in self.processors)
        held: dict[int, list[OutputDelta]] = {}
        while num_left:
            ended: list[str] = []
            touched: dict[int, None] = {}
            for event in await self._queue.get():
                index = self._index[event.request_id]
                processor = self.processors[index]
                if processor.finished:
                    continue
                delta = processor.process(event)
                held.setdefault(index, []).append(delta)
                touched[index] = None
                if processor.finished:
                    num_left -= 1
                    if delta.must_abort:
                        ended.append(event.request_id)
            if ended:
                self._bridge.abort(ended, "stop")
            for index in touched:
                delta = merge_deltas(held[index])
                if delta.text or delta.logprobs or delta.finish_reason is not None:
                    del held[index]
                    yield AnswerDelta(index, delta)

    async def finish(self) -> None:
        """Wait until all answers have ended."""
        async for _ in self.deltas():
            pass

    def close(self) -> None:
        """Abort what is not finished; to be called whatever happens, and more often if need be."""
        self._bridge.abort(self._queue.unfinished)
