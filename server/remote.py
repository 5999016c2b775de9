"""An engine in another process: starts it, and is the bridge's link to it.

The two processes share a socket pair and nothing else, so the end of either is seen by the other at
once. Everything here runs on the event loop, which reads whole steps: one message has the events of
all requests.
"""

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from jaxserve.config import Config, ServerConfig
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.server.bridge import EngineBridge
from jaxserve.server.engine_calls import EngineStats
from jaxserve.server.wire import (
    FROM_ENGINE,
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
    Ready,
    Start,
    Stop,
    ToEngine,
    exception_of,
    frame,
)
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Progress, Request, StartupReport

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "jaxserve.server.engine_process")
STOP_TIMEOUT_S = 30.0
RESULT_TYPES: dict[str, Any] = {"stats": EngineStats}
"""What calls return that is no plain JSON."""


@dataclass(frozen=True, slots=True)
class RemoteEngine:
    """What the server knows of an engine in another process. It cannot be called: see its link."""

    config: Config
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    hidden_size: int | None
    dtype: str
    report: StartupReport
    tiers: str

    @property
    def model(self) -> Any:
        """What limits and the ready line look at."""
        config = SimpleNamespace(vocab_size=self.vocab_size, hidden_size=self.hidden_size)
        return SimpleNamespace(dtype=self.dtype, config=config)

    @classmethod
    def of_card(cls, card: EngineCard, server: ServerConfig) -> "RemoteEngine":
        return cls(
            config=replace(card.config, server=server),
            tokenizer=Tokenizer.from_folder(card.tokenizer_folder),
            model_name=card.model_name,
            max_model_len=card.max_model_len,
            eos_token_ids=card.eos_token_ids,
            vocab_size=card.vocab_size,
            hidden_size=card.hidden_size,
            dtype=card.dtype,
            report=card.report,
            tiers=card.tiers,
        )


class EngineProcess(asyncio.Protocol):
    """The engine's process as an asyncio protocol: messages in, messages out.

    Until `ready` is done it starts up; then a bridge takes over through `link_to`.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", progress: Progress):
        self.process = process
        self.ready: asyncio.Future[EngineCard] = asyncio.get_running_loop().create_future()
        self._progress = progress
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._bridge: EngineBridge | None = None
        self._called: dict[int, str] = {}
        self._gone = asyncio.Event()
        self._death: Exception | None = None

    @classmethod
    async def start(
        cls, config: Config, progress: Progress, command: Sequence[str] = ENGINE_COMMAND
    ) -> "EngineProcess":
        """Start a process that builds the engine of `config`."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the server, which then stops it
            )
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        _, self = await loop.create_connection(lambda: cls(process, progress), sock=ours)
        # Its keys are none of the engine's business.
        self.send(Start(replace(config, server=ServerConfig())))
        return self

    def link_to(self, bridge: EngineBridge) -> "EngineProcess":
        """From now on tell a bridge what comes."""
        self._bridge = bridge
        if self._death is not None:
            bridge.on_death(self._death)
        return self

    def send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    # As a link.

    def add(self, ticket: int, requests: Sequence[Request]) -> None:
        self._send_given(Add(ticket, list(requests)))

    def abort(self, request_ids: Sequence[str]) -> None:
        self.send(Abort(list(request_ids)))

    def call(self, ticket: int, name: str, arguments: dict[str, Any]) -> None:
        self._send_given(Call(ticket, name, arguments))
        self._called[ticket] = name

    def _send_given(self, message: Add | Call) -> None:
        """Send what clients gave.

        Raises:
            RequestError: JSON has a form for it, MessagePack has not.
        """
        try:
            self.send(message)
        except (UnicodeEncodeError, OverflowError) as error:
            text = "a number is beyond 64 bits, or a text holds half a surrogate pair"
            raise RequestError(f"{text}; expected neither", code="invalid_value") from error

    async def stop(self) -> None:
        """End the process: by asking, and if that does not help by force."""
        if self._bridge is None:  # it is still starting, and hears no commands
            self.process.terminate()
        self.send(Stop())
        try:
            await asyncio.wait_for(self._gone.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the engine's process did not end in %.0f s: killed", STOP_TIMEOUT_S)
            self.process.kill()
        if self._transport is not None:
            self._transport.close()
        await asyncio.to_thread(self.process.wait)

    # As a protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._take(FROM_ENGINE.decode(payload))
        except (msgspec.DecodeError, EngineDeadError) as error:
            self._die(EngineDeadError(f"the engine's process sent what is no message: {error}"))
            self.process.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self._die(EngineDeadError("the engine's process has ended"))
        self._gone.set()

    def _take(self, message: Any) -> None:
        match message:
            case Events():
                assert self._bridge is not None
                self._bridge.on_events(message.events)
            case Admitted():
                assert self._bridge is not None
                failure = message.failure
                error = None if failure is None else exception_of(failure)
                self._bridge.on_admission(message.ticket, error)
            case Answer():
                self._answer(message)
            case Doing():
                self._progress(message.what, message.done, message.total)
            case Ready():
                if not self.ready.done():
                    self.ready.set_result(message.card)
            case Died():
                self._die(exception_of(message.failure))

    def _answer(self, answer: Answer) -> None:
        assert self._bridge is not None
        result, error = None, None
        kind = RESULT_TYPES.get(self._called.pop(answer.ticket, ""), Any)
        if answer.failure is not None:
            error = exception_of(answer.failure)
        else:
            result = msgspec.msgpack.decode(answer.result, type=kind)
        self._bridge.on_answer(answer.ticket, result, error)

    def _die(self, error: Exception) -> None:
        if self._death is not None:
            return
        self._death = error
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # whoever waits gets it; nobody may be waiting
        if self._bridge is not None:
            self._bridge.on_death(error)


async def connect(
    config: Config, progress: Progress, command: Sequence[str] = ENGINE_COMMAND
) -> "Connected":
    """Start an engine in a process of its own, and wait until it is ready.

    Raises:
        ConfigError, WeightsError: as `build_engine` does.
        EngineDeadError: the process ended before it was ready.
    """
    process = await EngineProcess.start(config, progress, command)
    try:
        card = await process.ready
    except BaseException:
        await process.stop()
        raise
    return Connected(RemoteEngine.of_card(card, config.server), process.link_to)


@dataclass(frozen=True, slots=True)
class Connected:
    """An engine and how a bridge reaches it."""

    engine: RemoteEngine
    link: Callable[[EngineBridge], EngineProcess]
