"""Server-sent events, and noticing that a client has gone.

Chunks are bytes already: framing costs nothing per token but the text itself.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Protocol, TypeAlias, TypeVar

from starlette.responses import Response

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
COMMENT_EVERY_S = 15.0

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


def sse(data: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + to_json(data) + b"\n\n"


def named_event(event: dict[str, Any]) -> bytes:
    """An event whose name is the `type` of what it carries."""
    return b"event: %s\n" % event["type"].encode() + sse(event)


def to_json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).encode()


class Chunks(Protocol):
    """What an event stream sends: an async generator, for one."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def aclose(self) -> Awaitable[None]: ...


class EventStream(Response):
    """Sends chunks as they come, a comment if none comes for long, and closes the generator.

    The generator is closed before the response ends in every case: end, failure, client gone.

    Args:
        on_close: called then, too. A generator that nobody has advanced yet does not run its own
            `finally`, so what was taken before it began is given back here.
    """

    def __init__(
        self,
        chunks: Chunks,
        headers: dict[str, str] | None = None,
        *,
        on_close: Callable[[], None] = lambda: None,
    ):
        super().__init__(b"", 200, HEADERS | (headers or {}), "text/event-stream")
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_close = on_close

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await self._send(receive, send)
        finally:
            try:
                await self._chunks.aclose()
            finally:
                self._on_close()

    async def _send(self, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(wait_until_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):  # OSError: client gone
                await pump

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last_s = loop.time()

        async def comment() -> None:
            while True:
                await asyncio.sleep(COMMENT_EVERY_S)
                if loop.time() - last_s >= COMMENT_EVERY_S:
                    await send({"type": "http.response.body", "body": COMMENT, "more_body": True})

        commenter = asyncio.create_task(comment())
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last_s = loop.time()
        finally:
            commenter.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def or_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work, but cancel it if the client goes away meanwhile.

    Args:
        receive: the ASGI callable of a request whose body has been read.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(wait_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
