"""One HTTP connection: uvicorn's protocol, and the limits it lacks.

    headers    MAX_HEADER_BYTES, and HEADER_TIMEOUT_S for the whole of them
    reading    a client that takes nothing for `SLOW_READER_S` while much waits for it is cut off
    closing    a connection that is to be closed, but whose client takes nothing, is cut off, too
    number     no more connections than there are file descriptors for

uvicorn offers a class to be replaced and no other way to these, so this is the one place that
overrides: each method does its part and passes on.
"""

import asyncio
import logging
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jaxserve.server.errors import ApiError
from jaxserve.server.guard import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

HEADER_TIMEOUT_S = 30.0
SLOW_READER_S = 60.0
LINGER_S = 30.0
SPARE_FILES = 64
"""File descriptors kept for everything that is not a client's connection."""


class Connection(HttpToolsProtocol):
    """Made by uvicorn for each connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._num_header_bytes = 0
        self._is_in_headers = True
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            logger.warning("%d connections are open: one more is refused", len(self.connections))
            transport.abort()
            return
        self._after("headers", HEADER_TIMEOUT_S, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._cancel(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers:
            self._num_header_bytes += len(data)
            if "headers" not in self._timers:  # the first bytes after another request
                self._after("headers", HEADER_TIMEOUT_S, self._headers_late)
        super().data_received(data)
        # What came with the end of the headers was body: it is counted elsewhere.
        if self._is_in_headers and self._num_header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"the headers are larger than {MAX_HEADER_BYTES >> 10} KiB")

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._num_header_bytes = 0
        self._cancel("headers")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_headers = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after("slow", SLOW_READER_S, self._cut_off)

    def resume_writing(self) -> None:
        self._cancel("slow")
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._after("linger", LINGER_S, self._cut_off)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._after("linger", LINGER_S, self._cut_off)

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._after("linger", LINGER_S, self._cut_off)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no valid HTTP request")

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that never became one, and close."""
        if self.transport.is_closing():
            return
        body = ApiError(status, message).json()
        if self.cycle is None or self.cycle.response_complete:
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: "
            lines = [STATUS_LINE[status], head, b"%d\r\n\r\n" % len(body), body]
            self.transport.write(b"".join(lines))
        self.transport.close()
        self._after("linger", LINGER_S, self._cut_off)

    def _headers_late(self) -> None:
        self._refuse(408, f"the headers did not arrive within {HEADER_TIMEOUT_S:g} s")

    def _cut_off(self) -> None:
        self.transport.abort()

    def _after(self, name: str, delay_s: float, function: Any) -> None:
        self._cancel(name)
        self._timers[name] = self.loop.call_later(delay_s, function)

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def max_connections() -> int:
    """As many as may be open before other parts of the server lack file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft - SPARE_FILES) if soft != resource.RLIM_INFINITY else 1 << 30
