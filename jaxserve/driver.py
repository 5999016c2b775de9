"""Steps an engine of this process for whoever waits for an answer.

Any thread may ask; one at a time touches the engine. Whoever needs a token steps the engine, and
the events go to everybody they are for: so threads and coroutines that wait side by side share
every step. Knows nothing of prompts or text.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from jaxserve.config import Config
from jaxserve.errors import EngineDeadError
from jaxserve.interrupts import interrupts_held
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request, TokenEvent

T = TypeVar("T")
Sink = Callable[[TokenEvent], None]

IDLE_S = 0.01
"""How long to wait for something else when the engine has nothing to do."""


class EngineLike(Protocol):
    """What `LLM` and the server need of an engine; one thread at a time may use it."""

    config: Config
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def close(self) -> None: ...


class Driver:
    """The only one who touches its engine."""

    def __init__(self, engine: EngineLike):
        self.config = engine.config
        self._engine = engine
        self._sinks: dict[str, Sink] = {}
        self._closed_because: str | None = None
        self._lock = threading.RLock()  # sinks may retire requests

    def admit(self, request: Request, sink: Sink) -> None:
        """Queue a request; `sink` gets its events, on whatever thread steps the engine.

        Raises:
            RequestError: it can never be served, or too many wait already.
            EngineDeadError: the engine was closed, or has failed.
        """
        with self._lock:
            self._check_open()
            self._engine.add(request)
            self._sinks[request.request_id] = sink

    def retire(self, request_id: str, *, abort: bool) -> None:
        """Stop listening to a request, and stop the engine's work on it if there is any."""
        with self._lock:
            if self._sinks.pop(request_id, None) and abort and self._closed_because is None:
                self._engine.abort(request_id)

    def step_unless(self, is_done: Callable[[], object]) -> None:
        """Step the engine, unless another's step has done what this one is for.

        Raises:
            EngineDeadError: the engine was closed, has failed, or has nothing to do.
        """
        with self._lock:
            if not is_done():
                self._step()

    def call(self, function: Callable[[], T]) -> T:
        """Run something short that touches the engine, between steps."""
        with self._lock:
            self._check_open()
            return function()

    def wait_for(self, event: threading.Event) -> None:
        """Step the engine until an event is set."""
        while not event.is_set():
            with self._lock:
                has_work = self._engine.has_work
                if has_work:
                    self._step()
            if not has_work:
                event.wait(IDLE_S)

    def close(self) -> None:
        """End everything and free the engine's memory; what waits gets EngineDeadError."""
        with self._lock:
            if self._closed_because is None:
                self._closed_because = "the LLM was closed"
                self._engine.close()

    def _step(self) -> None:
        self._check_open()
        if not self._engine.has_work:
            raise EngineDeadError("the engine has nothing to do, but requests are unanswered")
        with interrupts_held():
            try:
                events = self._engine.step()
            except Exception as error:
                self._closed_because = f"the engine failed: {error}"
                raise
            for event in events:
                if sink := self._sinks.get(event.request_id):
                    sink(event)

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise EngineDeadError(f"{self._closed_because}; make a new LLM")


class _End:
    """What an iterator gives when there is nothing more; a StopIteration cannot leave a thread."""


async def beside_the_loop(iterator: Iterator[T]) -> "T | type[_End]":
    """The next of an iterator, computed in a thread, so that the event loop goes on; or END.

    A coroutine that is cancelled meanwhile waits until that is done: a step cannot be interrupted,
    and the iterator can be closed then.
    """
    task = asyncio.ensure_future(asyncio.to_thread(next, iterator, END))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


END = _End
