"""What the server's and the engine's process say to each other over a socket pair.

A frame is four bytes of length (little endian) and MessagePack. Every message is a typed struct:
what does not decode to one is an error, and nothing in a frame is ever executed.
"""

import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec
import numpy as np

import jaxserve.types
from jaxserve.config import Config
from jaxserve.errors import (
    ConfigError,
    EngineDeadError,
    JaxserveError,
    RequestError,
    StoreError,
    WeightsError,
)
from jaxserve.types import Request, StartupReport, TokenEvent

MAX_FRAME_BYTES = 1 << 30
LENGTH = struct.Struct("<I")


class Failure(msgspec.Struct, array_like=True):
    """An exception: its kind, and what a client may be told."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None


class EngineCard(msgspec.Struct, array_like=True):
    """What the server must know of an engine in another process.

    Attributes:
        config: with every "auto" resolved; its server section is not the server's.
        tokenizer_folder: where the checkpoint's tokenizer is.
        tiers: what is below the device, for people; empty: nothing.
    """

    config: Config
    model_name: str
    max_model_len: int
    vocab_size: int
    hidden_size: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    tokenizer_folder: str
    report: StartupReport
    tiers: str


# To the engine.


class Start(msgspec.Struct, tag="start", array_like=True):
    config: Config


class Add(msgspec.Struct, tag="add", array_like=True):
    ticket: int
    requests: list[Request]


class Abort(msgspec.Struct, tag="abort", array_like=True):
    request_ids: list[str]


class Call(msgspec.Struct, tag="call", array_like=True):
    ticket: int
    name: str
    arguments: dict[str, Any]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    pass


# From the engine.


class Doing(msgspec.Struct, tag="doing", array_like=True):
    """Progress while it starts."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, tag="ready", array_like=True):
    card: EngineCard


class Admitted(msgspec.Struct, tag="admitted", array_like=True):
    ticket: int
    failure: Failure | None


class Events(msgspec.Struct, tag="events", array_like=True):
    events: list[TokenEvent]


class Answer(msgspec.Struct, tag="answer", array_like=True):
    ticket: int
    result: msgspec.Raw
    failure: Failure | None


class Died(msgspec.Struct, tag="died", array_like=True):
    failure: Failure


ToEngine: TypeAlias = Start | Add | Abort | Call | Stop
FromEngine: TypeAlias = Doing | Ready | Admitted | Events | Answer | Died


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the socket."""
    payload = ENCODER.encode(message)
    assert len(payload) <= MAX_FRAME_BYTES, "a message larger than any that can be asked for"
    return LENGTH.pack(len(payload)) + payload


class Frames:
    """Cuts what arrives into payloads."""

    def __init__(self):
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take in bytes; yields every payload that is whole.

        Raises:
            EngineDeadError: the other side sends what is no frame.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH.size:
                (size,) = LENGTH.unpack_from(self._buffer, start)
                if size > MAX_FRAME_BYTES:
                    raise EngineDeadError(f"a frame of {size} bytes is larger than any there is")
                end = start + LENGTH.size + size
                if len(self._buffer) < end:
                    break
                payload = bytes(memoryview(self._buffer)[start + LENGTH.size : end])
                start = end
                yield payload
        finally:
            del self._buffer[:start]


KINDS: dict[str, type[JaxserveError]] = {
    "config": ConfigError,
    "weights": WeightsError,
    "store": StoreError,
    "dead": EngineDeadError,
}


def failure_of(error: Exception) -> Failure:
    """An exception for the other side; what is unexpected keeps its details to this side's log."""
    if isinstance(error, RequestError):
        return Failure("request", str(error), error.param, error.code)
    kind = next((kind for kind, known in KINDS.items() if isinstance(error, known)), "other")
    message = str(error) if kind != "other" else type(error).__name__
    return Failure(kind, message)


def exception_of(failure: Failure) -> Exception:
    if failure.kind == "request":
        return RequestError(
            failure.message, param=failure.param, code=failure.code or "invalid_value"
        )
    if failure.kind in KINDS:
        return KINDS[failure.kind](failure.message)
    return RuntimeError(f"{failure.message} in the engine's process; its log has the details")


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), value.tobytes()]
    raise NotImplementedError(f"{type(value).__name__} cannot be sent to another process")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    raise NotImplementedError(f"{kind.__name__} cannot come from another process")


# `types` names numpy for type checkers only; whoever decodes needs the name.
jaxserve.types.__dict__.setdefault("np", np)

ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_array)
TO_ENGINE: "msgspec.msgpack.Decoder[ToEngine]" = msgspec.msgpack.Decoder(
    ToEngine, dec_hook=_decode_array
)
FROM_ENGINE: "msgspec.msgpack.Decoder[FromEngine]" = msgspec.msgpack.Decoder(
    FromEngine, dec_hook=_decode_array
)
