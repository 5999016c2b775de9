"""Between asyncio and the engine: the engine runs in a thread of its own, which alone touches it.

Commands go to the thread through one queue, in order. Events come back once per step, with one
wake-up of the event loop however many requests they belong to. Everything else here runs on the
event loop. Knows nothing of HTTP or text.

When the engine fails, every request that is under way gets EngineDeadError, and so does every
later one.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.llm import EngineLike
from jaxserve.types import Request, TokenEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_AGAIN_S = 1.0
"""How often whoever waits for the engine's thread looks whether it still lives."""


class EventQueue:
    """The events of one or several requests that belong together, such as the n answers of one."""

    def __init__(self, request_ids: Iterable[str]):
        self.unfinished = set(request_ids)
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()
        self._error: EngineDeadError | None = None

    async def get(self) -> list[TokenEvent]:
        """All events that arrived since the last call; waits for at least one.

        Raises:
            EngineDeadError: the engine failed and no event is left.
        """
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        if not events and self._error is not None:
            raise self._error
        if self._error is not None:
            self._arrived.set()
        return events

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._arrived.set()


class EngineBridge:
    """Serves one engine on the running event loop; made inside it, and stopped by `stop`.

    Args:
        engine: from now on belongs to the bridge's thread.
    """

    def __init__(self, engine: EngineLike):
        scheduler = engine.config.scheduler
        self.max_live = scheduler.max_num_seqs + scheduler.max_num_waiting
        self.error: Exception | None = None
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, EventQueue] = {}
        self._admissions: set[asyncio.Future[None]] = set()
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    @property
    def num_live(self) -> int:
        """Requests that have been submitted and have not ended."""
        return len(self._queues)

    async def submit(self, requests: Sequence[Request]) -> EventQueue:
        """Hand requests to the engine, all or none; returns when the engine has taken them.

        Raises:
            RequestError: the queue is full, or the engine cannot serve one of them.
            EngineDeadError: the engine has failed.
        """
        if self.error is not None:
            raise EngineDeadError("the engine has stopped")
        if self.num_live + len(requests) > self.max_live:
            raise RequestError(
                f"{self.num_live} requests are running or waiting and {self.max_live} may; try "
                "again later",
                code="queue_full",
            )
        queue = EventQueue(request.request_id for request in requests)
        admitted: asyncio.Future[None] = self._loop.create_future()
        for request in requests:
            self._queues[request.request_id] = queue
        self._admissions.add(admitted)
        self._inbox.put(lambda: self._add(requests, admitted))
        try:
            await admitted
        except BaseException:  # refused, or the caller was cancelled while it waited
            self.abort(queue.unfinished)
            raise
        finally:
            self._admissions.discard(admitted)
        return queue

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests that nobody waits for any more; ids that have ended are ignored."""
        live = [request_id for request_id in request_ids if request_id in self._queues]
        for request_id in live:
            self._queues.pop(request_id).unfinished.discard(request_id)
        if live:
            self._inbox.put(lambda: self._abort(live))

    def run(self, function: Callable[[], T]) -> T:
        """Run something short on the engine's thread, between steps; returns what it returned.

        Waits, so it is for threads other than the event loop's and the engine's.

        Raises:
            EngineDeadError: the engine has failed or is being closed.
            Exception: whatever the function raised; the engine goes on.
        """
        outcome: Future[T] = Future()
        self._inbox.put(lambda: _fulfil(outcome, function))
        while True:
            try:
                return outcome.result(timeout=LOOK_AGAIN_S)
            except TimeoutError:
                if outcome.done():  # it is the function's own
                    raise
                if not self._thread.is_alive():
                    raise EngineDeadError("the engine has stopped") from None

    def wait(self, event: threading.Event) -> None:
        """Wait for something that the engine's thread will set.

        Raises:
            EngineDeadError: it never will.
        """
        while not event.wait(LOOK_AGAIN_S):
            if not self._thread.is_alive():
                raise EngineDeadError("the engine has stopped")

    async def stop(self) -> None:
        """End all requests, stop the thread and close the engine."""
        self.error = self.error or EngineDeadError("the server is shutting down")
        self._fail_all(EngineDeadError("the server is shutting down"))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    events = self._engine.step()
                    if events:
                        self._post(self._deliver, events)
        except Exception as error:
            logger.exception("the engine failed")
            self._post(self._die, error)
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine could not be closed")

    def _obey(self) -> bool:
        """Carry out all commands; waits for one if there is nothing else to do. False: stop."""
        must_wait = not self._engine.has_work
        while True:
            try:
                command = self._inbox.get(block=must_wait)
            except Empty:
                return True
            if command is None:
                return False
            command()
            must_wait = False

    def _add(self, requests: Sequence[Request], admitted: "asyncio.Future[None]") -> None:
        added: list[str] = []
        try:
            for request in requests:
                self._engine.add(request)
                added.append(request.request_id)
        except RequestError as error:
            for request_id in added:
                self._engine.abort(request_id)
            self._post(_settle, admitted, error)
        else:
            self._post(_settle, admitted, None)

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has gone: nobody is left to tell
            logger.debug("an event came after the end of the event loop")

    # On the event loop.

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            queue = self._queues.get(event.request_id)
            if queue is None:
                continue  # aborted while the event was on its way
            queue.put(event)
            if event.finish_reason is not None:
                del self._queues[event.request_id]
                queue.unfinished.discard(event.request_id)

    def _die(self, error: Exception) -> None:
        self.error = error
        self._fail_all(EngineDeadError("the engine stopped"))

    def _fail_all(self, error: EngineDeadError) -> None:
        queues = set(self._queues.values())
        self._queues.clear()
        for queue in queues:
            queue.unfinished.clear()
            queue.fail(error)
        for admitted in self._admissions:
            _settle(admitted, error)


def _fulfil(outcome: "Future[T]", function: Callable[[], T]) -> None:
    try:
        outcome.set_result(function())
    except Exception as error:
        outcome.set_exception(error)


def _settle(admitted: "asyncio.Future[None]", error: Exception | None) -> None:
    if admitted.done():
        return
    if error is None:
        admitted.set_result(None)
    else:
        admitted.set_exception(error)
