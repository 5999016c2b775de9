"""Runs a server from the first second to the last: listens, loads, serves, drains.

    listening   at once; /health tells how far loading is, everything else gets 503
    ready       when the engine is, in its own process or on a thread of this one
    draining    from SIGTERM or Ctrl-C on: who is inside may finish, nobody else comes in
    over        when all have finished or their time is up; at once on a second signal

Knows nothing of the command line: what it says goes through `on_ready`.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
import uvloop

from jaxserve.config import Config
from jaxserve.server.app import make_app
from jaxserve.server.context import Context
from jaxserve.server.engine_process import Build
from jaxserve.server.lifecycle import Lifecycle, Phase
from jaxserve.server.protocol import Connection
from jaxserve.server.remote import ENGINE_COMMAND, connect
from jaxserve.server.traces import Tracer
from jaxserve.server.watch import slow_request_log
from jaxserve.types import Progress

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5
KEEP_ALIVE_S = 75
BACKLOG = 2048
FORCED_EXIT = 130


def serve(
    config: Config,
    listener: socket.socket,
    progress: Progress,
    on_ready: Callable[[Any], None],
    *,
    command: Sequence[str] = ENGINE_COMMAND,
    build: Build | None = None,
) -> None:
    """Serve until a signal says stop.

    Args:
        listener: bound, not yet listening.
        on_ready: told the engine when it is there.
        command: starts the engine's process.
        build: makes an engine for this process; default: `build_engine`.

    Raises:
        ConfigError, WeightsError: the engine cannot be built.
        EngineDeadError: its process ended before it was ready.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Launch(config, listener, progress, on_ready, command, build).run())


class Launch:
    """One server; see `serve`."""

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        progress: Progress,
        on_ready: Callable[[Any], None],
        command: Sequence[str],
        build: Build | None,
    ):
        self._config = config
        self._listener = listener
        self._progress = progress
        self._on_ready = on_ready
        self._command = command
        self._build = build
        self._lifecycle = Lifecycle()
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(config.server, self._lifecycle),  # pyright: ignore[reportArgumentType]
                http=Connection,
                ws="none",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )
        self._listeners = [slow_request_log(config.server.slow_request_s)]
        self._tracer: Tracer | None = None
        if config.server.otlp_endpoint is not None:
            self._tracer = Tracer.to_collector(config.server.otlp_endpoint)
            self._listeners.append(self._tracer.listen)
        self._opening: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve from now to the end."""
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not each broken request
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._opening = asyncio.create_task(self._open())
        self._opening.add_done_callback(self._on_opened)
        await serving
        if not self._opening.done():
            self._opening.cancel()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        with contextlib.suppress(asyncio.CancelledError):
            await self._opening

    async def _open(self) -> None:
        """Build the engine, here or in a process of its own."""

        def report(what: str, done: int, total: int) -> None:
            self._lifecycle.report(what, done, total)
            self._progress(what, done, total)

        if self._config.server.engine_process:
            connected = await connect(self._config, report, self._command)
            engine, link = connected.engine, connected.link
        else:
            engine, link = await self._build_here(report), None
        context = Context.of_engine(engine, link)
        context.bridge.watch.listeners += self._listeners
        self._lifecycle.become_ready(context)
        self._on_ready(engine)

    async def _build_here(self, progress: Progress) -> Any:
        """The engine on a thread of this process, so that the event loop can answer meanwhile."""
        from jaxserve.engine import build_engine

        loop = asyncio.get_running_loop()
        built: asyncio.Future[Any] = loop.create_future()

        def build() -> None:
            try:
                engine = (self._build or build_engine)(self._config, progress)
            except BaseException as error:
                loop.call_soon_threadsafe(built.set_exception, error)
            else:
                loop.call_soon_threadsafe(built.set_result, engine)

        threading.Thread(target=build, name="jaxserve-build", daemon=True).start()
        return await built

    def _on_opened(self, opening: "asyncio.Task[None]") -> None:
        if opening.cancelled() or opening.exception() is not None:
            self._server.should_exit = True

    def _on_signal(self) -> None:
        if self._draining is not None:
            logger.warning("second signal: ending at once")
            os._exit(FORCED_EXIT)  # the engine's process sees that we are gone
        if self._lifecycle.phase is Phase.LOADING and not self._config.server.engine_process:
            os._exit(FORCED_EXIT)  # loading in this process cannot be interrupted
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if self._lifecycle.phase is Phase.READY:
            num_ended = await self._lifecycle.drain(self._config.server.drain_timeout_s)
            if num_ended:
                logger.warning("%d requests were ended: they took too long", num_ended)
        self._server.should_exit = True
