"""The loop of the one thread that touches an engine: commands in, steps, events out.

Commands are functions in one queue and are carried out in order, between steps. Whoever runs the
loop says where events go. Knows nothing of asyncio, sockets, HTTP or text.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.llm import EngineLike
from jaxserve.types import Request, TokenEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_AGAIN_S = 1.0
"""How often whoever waits for the engine's thread looks whether it still lives."""


class EngineLoop:
    """Steps an engine as long as it has work.

    Args:
        engine: belongs to the thread that calls `run_until_stopped`.
        deliver: takes the events of each step that has any; called on that thread.
    """

    def __init__(self, engine: EngineLike, deliver: Callable[[list[TokenEvent]], None]):
        self._engine = engine
        self._deliver = deliver
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._has_ended = False

    # On the engine's thread.

    def run_until_stopped(self) -> Exception | None:
        """Serve until `stop`; closes the engine in any case.

        Returns:
            What the engine failed with; None: it was stopped.
        """
        failure = None
        try:
            while self._obey():
                if self._engine.has_work:
                    events = self._engine.step()
                    if events:
                        self._deliver(events)
        except Exception as error:
            logger.exception("the engine failed")
            failure = error
        return failure

    def close(self) -> None:
        """Close the engine, after the loop has ended."""
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine could not be closed")
        self._has_ended = True

    def add(self, requests: Sequence[Request]) -> RequestError | None:
        """Queue requests, all or none; returns why not."""
        added: list[str] = []
        try:
            for request in requests:
                self._engine.add(request)
                added.append(request.request_id)
        except RequestError as error:
            self.abort(added)
            return error
        return None

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

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

    # On any thread.

    def put(self, command: Callable[[], None]) -> None:
        """Have something done on the engine's thread, after what was put before."""
        self._inbox.put(command)

    def stop(self) -> None:
        """End the loop after the commands that were put before."""
        self._inbox.put(None)

    # On threads other than the engine's and an event loop's: these wait.

    def run(self, function: Callable[[], T]) -> T:
        """Run something short on the engine's thread, between steps; returns what it returned.

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
                if self._has_ended:
                    raise EngineDeadError("the engine has stopped") from None

    def wait(self, event: threading.Event) -> None:
        """Wait for something that the engine's thread will set.

        Raises:
            EngineDeadError: it never will.
        """
        while not event.wait(LOOK_AGAIN_S):
            if self._has_ended:
                raise EngineDeadError("the engine has stopped")


def _fulfil(outcome: "Future[T]", function: Callable[[], T]) -> None:
    try:
        outcome.set_result(function())
    except Exception as error:
        outcome.set_exception(error)
