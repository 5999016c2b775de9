"""Between asyncio and an engine, wherever it runs: requests go in, events come out per request.

Everything here runs on the event loop. A `Link` carries commands to the engine and calls the bridge
back; `ThreadLink` is the way to an engine in this process, `remote.ProcessLink` to one in another.
Events come once per step, with one wake-up of the event loop however many requests they belong to.
Knows nothing of HTTP or text.

When the engine fails, every request that is under way gets EngineDeadError, and so does every
later one.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from jaxserve.config import Config
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.llm import EngineLike
from jaxserve.server.engine_calls import EngineCalls, EngineStats
from jaxserve.server.engine_loop import EngineLoop
from jaxserve.server.watch import Watch
from jaxserve.types import Request, TokenEvent

logger = logging.getLogger(__name__)


class EventQueue:
    """The events of one or several requests that belong together, such as the n answers of one."""

    def __init__(self, request_ids: Iterable[str]):
        self.unfinished = set(request_ids)
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: EngineDeadError | None = None

    async def get(self) -> list[TokenEvent]:
        """All events that arrived since the last call; waits for at least one.

        Raises:
            EngineDeadError: the engine failed and no event is left.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Link(Protocol):
    """The way to an engine. Answers come through the bridge's `on_*`, on the event loop."""

    def add(self, ticket: int, requests: Sequence[Request]) -> None: ...
    def abort(self, request_ids: Sequence[str]) -> None: ...
    def call(self, ticket: int, name: str, arguments: dict[str, Any]) -> None: ...
    async def stop(self) -> None: ...


class EngineBridge:
    """Serves one engine on the running event loop; made inside it, and stopped by `stop`.

    Args:
        engine: one in this process, which from now on belongs to a thread of the bridge; or
            anything with its config, if `connect` is given.
        connect: makes the link; default: a thread of this process.
    """

    def __init__(
        self,
        engine: EngineLike | Any,
        connect: "Callable[[EngineBridge], Link] | None" = None,
    ):
        config: Config = engine.config
        self.max_live = config.scheduler.max_num_seqs + config.scheduler.max_num_waiting
        self.error: Exception | None = None
        self.watch = Watch()
        self._queues: dict[str, EventQueue] = {}
        self._tickets = itertools.count()
        self._admissions: dict[int, asyncio.Future[None]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._loop = asyncio.get_running_loop()
        self.link: Link = ThreadLink(engine, self) if connect is None else connect(self)

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
        self._check_alive()
        if self.num_live + len(requests) > self.max_live:
            raise RequestError(
                f"{self.num_live} requests are running or waiting and {self.max_live} may; try "
                "again later",
                code="queue_full",
            )
        queue = EventQueue(request.request_id for request in requests)
        ticket = next(self._tickets)
        admitted = self._admissions[ticket] = self._loop.create_future()
        for request in requests:
            self._queues[request.request_id] = queue
        self.watch.begin(requests)
        try:
            self.link.add(ticket, requests)
            await admitted
        except BaseException as error:  # refused, or the caller was cancelled while it waited
            self.abort(queue.unfinished, "error" if isinstance(error, RequestError) else "abort")
            raise
        finally:
            del self._admissions[ticket]
        return queue

    def abort(self, request_ids: Iterable[str], reason: str = "abort") -> None:
        """End requests that nobody waits for any more; ids that have ended are ignored.

        Args:
            reason: "stop" if the answer is complete, because of a stop string.
        """
        live = [request_id for request_id in request_ids if request_id in self._queues]
        self.watch.end(live, reason)
        for request_id in live:
            self._queues.pop(request_id).unfinished.discard(request_id)
        if live and self.error is None:
            self.link.abort(live)

    async def call(self, name: str, **arguments: Any) -> Any:
        """Ask the engine's side something beside requests; see `engine_calls` for what there is.

        Raises:
            RequestError: the engine has no such thing, or refuses the arguments.
            EngineDeadError: the engine has failed.
        """
        self._check_alive()
        ticket = next(self._tickets)
        answered = self._calls[ticket] = self._loop.create_future()
        try:
            self.link.call(ticket, name, arguments)
            return await answered
        finally:
            del self._calls[ticket]

    async def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return await self.call("stats")

    async def stop(self) -> None:
        """End all requests, stop and close the engine."""
        if self.error is None:
            self.on_death(EngineDeadError("the server is shutting down"))
        await self.link.stop()

    def _check_alive(self) -> None:
        if self.error is not None:
            raise EngineDeadError("the engine has stopped")

    # What the link calls.

    def on_admission(self, ticket: int, error: Exception | None) -> None:
        """The engine took the requests of a ticket, or refused them."""
        _settle(self._admissions.get(ticket), None, error)

    def on_answer(self, ticket: int, result: Any, error: Exception | None) -> None:
        """A call has ended."""
        _settle(self._calls.get(ticket), result, error)

    def on_events(self, events: list[TokenEvent]) -> None:
        """A step has ended."""
        self.watch.note(events)
        for event in events:
            queue = self._queues.get(event.request_id)
            if queue is None:
                continue  # aborted while the event was on its way
            queue.put(event)
            if event.finish_reason is not None:
                del self._queues[event.request_id]
                queue.unfinished.discard(event.request_id)

    def on_death(self, error: Exception) -> None:
        """The engine has failed, or is gone."""
        if self.error is not None:
            return
        self.error = error
        told = (
            error if isinstance(error, EngineDeadError) else EngineDeadError("the engine stopped")
        )
        queues = set(self._queues.values())
        self.watch.end(self._queues, "error")
        self._queues.clear()
        for queue in queues:
            queue.unfinished.clear()
            queue.fail(told)
        for waiter in (*self._admissions.values(), *self._calls.values()):
            _settle(waiter, None, told)


class ThreadLink:
    """An engine in this process, on a thread of its own."""

    def __init__(self, engine: EngineLike, bridge: EngineBridge):
        self._bridge = bridge
        self._asyncio = asyncio.get_running_loop()
        self._loop = EngineLoop(engine, lambda events: self._post(bridge.on_events, events))
        self._calls = EngineCalls(engine, self._loop)
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def add(self, ticket: int, requests: Sequence[Request]) -> None:
        def add() -> None:
            self._post(self._bridge.on_admission, ticket, self._loop.add(requests))

        self._loop.put(add)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._loop.put(lambda: self._loop.abort(request_ids))

    def call(self, ticket: int, name: str, arguments: dict[str, Any]) -> None:
        def work() -> None:
            result, failure = None, None
            try:
                result = self._calls(name, arguments)
            except Exception as error:
                failure = error
            self._post(self._bridge.on_answer, ticket, result, failure)

        threading.Thread(target=work, name=f"jaxserve-{name}", daemon=True).start()

    async def stop(self) -> None:
        self._loop.stop()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        failure = self._loop.run_until_stopped()
        if failure is not None:
            self._post(self._bridge.on_death, failure)
        self._loop.close()

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._asyncio.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has gone: nobody is left to tell
            logger.debug("an event came after the end of the event loop")


def _settle(waiter: "asyncio.Future[Any] | None", result: Any, error: Exception | None) -> None:
    if waiter is None or waiter.done():
        return
    if error is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(error)
