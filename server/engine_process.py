"""The engine's own process: serves one engine to the process that started it, over a socket.

    python -m jaxserve.server.engine_process FD

Ends when the other side stops it or goes away. A thread reads commands, the main thread runs the
engine; what it says goes out at once if the socket takes it, else from a third thread, so that a
slow server never holds up a step until MAX_BACKLOG_BYTES wait.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from jaxserve.config import Config
from jaxserve.errors import JaxserveError
from jaxserve.llm import EngineLike, limits_of
from jaxserve.server.engine_calls import EngineCalls
from jaxserve.server.engine_loop import EngineLoop
from jaxserve.server.wire import (
    ENCODER,
    TO_ENGINE,
    Abort,
    Add,
    Admitted,
    Answer,
    Call,
    Died,
    Doing,
    EngineCard,
    Events,
    Frames,
    FromEngine,
    Ready,
    Start,
    Stop,
    failure_of,
    frame,
)
from jaxserve.types import Progress

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
MAX_BACKLOG_BYTES = 64 << 20
LAST_WORDS_S = 20.0
"""How long the engine may take to close after the server has gone."""

Build = Callable[[Config, Progress], EngineLike]


def main() -> None:
    from jaxserve.engine import build_engine

    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve_engine(connection, build_engine)


def serve_engine(connection: socket.socket, build: Build) -> None:
    """Build the engine that the other side asks for, and serve it until that stops or goes.

    Args:
        connection: a connected stream socket, blocking.
        build: makes an engine of a config.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which stops us
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    outbox = Outbox(connection)
    frames = Frames()
    start = _first_message(connection, frames)
    if start is None:
        return
    # Nothing else reads meanwhile: the server going away must end this process, however busy.
    is_built = threading.Event()
    watch = threading.Thread(
        target=_exit_when_gone, args=(connection, is_built), name="jaxserve-watch", daemon=True
    )
    watch.start()
    try:
        engine = build(start.config, lambda *report: outbox.put(Doing(*report)))
    except JaxserveError as error:
        outbox.put(Died(failure_of(error)))
        outbox.flush()
        return
    is_built.set()
    loop = EngineLoop(engine, lambda events: outbox.put(Events(events)))
    reader = _Reader(connection, frames, loop, EngineCalls(engine, loop), outbox)
    threading.Thread(target=reader.read, name="jaxserve-reader", daemon=True).start()
    outbox.put(Ready(card_of(engine)))
    failure = loop.run_until_stopped()
    if failure is not None:
        outbox.put(Died(failure_of(failure)))
    loop.close()
    outbox.flush()


def card_of(engine: Any) -> EngineCard:
    """What the server must know of the engine."""
    limits = limits_of(engine)
    return EngineCard(
        config=engine.config,
        model_name=engine.model_name,
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        hidden_size=limits.hidden_size,
        eos_token_ids=limits.eos_token_ids,
        dtype=str(engine.model.dtype),
        tokenizer_folder=str(engine.model.path),
        report=engine.report,
        tiers=tiers_of(engine),
    )


def tiers_of(engine: Any) -> str:
    """What is below the device, for people; empty: nothing."""
    lower = getattr(engine, "lower", None)
    if lower is None:
        return ""
    stores = [worker.name for worker in lower.cascade.workers] if lower.cascade else []
    size = f"{lower.pool.num_bytes / 2**20:,.0f} MiB in {lower.pool.num_slots:,} slots"
    return f"host {size}" + "".join(f", {name}" for name in stores)


class Outbox:
    """Sends messages in order; `put` may be called on any thread, and rarely waits."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._backlog: deque[memoryview] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._is_broken = False
        threading.Thread(target=self._drain, name="jaxserve-outbox", daemon=True).start()

    def put(self, message: FromEngine) -> None:
        """Send a message now, or as soon as the socket takes it; waits only behind a full backlog.

        Nothing is raised when the other side has gone: the reader sees that, too.
        """
        data = memoryview(frame(message))
        with self._changed:
            while self._num_bytes > MAX_BACKLOG_BYTES and not self._is_broken:
                self._changed.wait()
            if self._is_broken:
                return
            if not self._backlog:
                try:
                    data = data[self._connection.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    self._is_broken = True
                    return
            if data:
                self._backlog.append(data)
                self._num_bytes += len(data)
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything has been sent, or cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_broken or not self._backlog, LAST_WORDS_S)

    def _drain(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._backlog))
                data = self._backlog[0]
            try:
                self._connection.sendall(data)
            except OSError:
                with self._changed:
                    self._is_broken = True
                    self._changed.notify_all()
                return
            with self._changed:
                self._backlog.popleft()
                self._num_bytes -= len(data)
                self._changed.notify_all()


class _Reader:
    """Reads commands and hands them to the engine's loop, until the other side goes."""

    def __init__(
        self,
        connection: socket.socket,
        frames: Frames,
        loop: EngineLoop,
        calls: EngineCalls,
        outbox: Outbox,
    ):
        self._connection = connection
        self._frames = frames
        self._loop = loop
        self._calls = calls
        self._outbox = outbox

    def read(self) -> None:
        try:
            while data := self._connection.recv(READ_BYTES):
                for payload in self._frames.feed(data):
                    self._take(TO_ENGINE.decode(payload))
        except Exception:  # a broken connection, or what is no message: either way the end
            logger.exception("the connection to the server broke")
        self._loop.stop()
        threading.Event().wait(LAST_WORDS_S)
        os._exit(1)

    def _take(self, message: Any) -> None:
        match message:
            case Add():
                self._loop.put(lambda: self._add(message))
            case Abort():
                self._loop.put(lambda: self._loop.abort(message.request_ids))
            case Call():
                threading.Thread(target=self._call, args=(message,), daemon=True).start()
            case Stop():
                self._loop.stop()

    def _add(self, message: Add) -> None:
        error = self._loop.add(message.requests)
        self._outbox.put(Admitted(message.ticket, None if error is None else failure_of(error)))

    def _call(self, message: Call) -> None:
        result, failure = None, None
        try:
            result = self._calls(message.name, message.arguments)
        except Exception as error:
            failure = failure_of(error)
            if failure.kind == "other":
                logger.exception("the call %s failed", message.name)
        raw = msgspec.Raw(ENCODER.encode(result))
        self._outbox.put(Answer(message.ticket, raw, failure))


def _first_message(connection: socket.socket, frames: Frames) -> Start | None:
    """What to start with; None if the other side has gone."""
    while data := connection.recv(READ_BYTES):
        for payload in frames.feed(data):
            message = TO_ENGINE.decode(payload)
            assert isinstance(message, Start), "the server says what to start first"
            return message
    return None


def _exit_when_gone(connection: socket.socket, is_built: threading.Event) -> None:
    """End the process if the server goes while the engine is being built, which may take long."""
    while not is_built.wait(0.5):
        try:
            if connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                os._exit(1)
        except BlockingIOError:
            continue
        except OSError:
            os._exit(1)
        if not is_built.is_set():
            threading.Event().wait(0.5)  # a command came early; it is read when there is an engine


if __name__ == "__main__":
    main()
