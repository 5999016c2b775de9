"""The outermost ASGI layer: who may come in, with what, and for how long. No request passes it by.

    phase   loading and draining refuse all but health checks
    keys    every path but health checks and the page's own files; /admin wants the admin key
    origin  without keys, only pages of this machine and allowed origins may ask
    body    size while it arrives, patience, nesting; it is whole before a handler runs
    turn    one request begins after the other; whose client has gone meanwhile does not
    time    a request that takes too long, or outlives the drain, ends with an error

Decides on the path the server routes by, never on a rebuilt URL. Knows nothing of the endpoints but
their prefixes.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np

from jaxserve.server.errors import ApiError, unavailable
from jaxserve.server.lifecycle import Lifecycle, Phase
from jaxserve.server.streaming import named_event
from jaxserve.server.watch import CURRENT, HttpRequest

logger = logging.getLogger(__name__)

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 32 << 20
MAX_HEADERS = 256
MAX_HEADER_BYTES = 64 << 10
MAX_DEPTH = 64
MAX_TRACEPARENT = 128
BODY_PAUSE_S = 30.0
"""Longest pause in the middle of a body."""
BODY_TOTAL_S = 300.0
REQUEST_TIMEOUT_S = 3600.0
NUM_LOOKS = 3
"""Rounds of the event loop before a request begins: the end of a connection is read one round after
its last bytes, and told one later."""

JSON = b"application/json"
OPEN_PATHS = frozenset({"/health", "/ping", "/"})
OPEN_BELOW = "/web/"
RESPONSES = "/v1/responses"
"""Its streams have numbered events with names, and no [DONE]."""
ADMIN, METRICS = "/admin", "/metrics"
REQUEST_ID = "jaxserve.request_id"
STREAM_ERROR = "jaxserve.stream_error"
"""In the message that ends a stream early: the error, for layers that have their own form of it."""
GOOD_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""One scan whatever the input: an unfinished string reaches to the end."""
STEP_OF = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")
"""How a bracket changes the depth, as a signed byte."""
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Access:
    """Who may come in.

    Attributes:
        api_keys: what clients must send as a bearer token, any of these; none: all may come.
        admin_key: what /admin asks for; None: there is nothing below it. It opens /metrics, too.
        origins: web pages that may ask without a key, beside those of this machine; "*": all.
    """

    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    origins: tuple[str, ...] = ()


class Guard:
    """Wraps an ASGI app.

    Args:
        lifecycle: whether requests are served now.
        request_timeout_s: longest time from a request's headers to the end of its answer.
    """

    def __init__(
        self,
        app: App,
        access: Access,
        lifecycle: Lifecycle,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ):
        self._app = app
        self._lifecycle = lifecycle
        self._origins = access.origins
        self._digests = tuple(_digest(key.encode()) for key in access.api_keys)
        self._admin_digests = (
            () if access.admin_key is None else (_digest(access.admin_key.encode()),)
        )
        self._max_body_bytes = max_body_bytes
        self._timeout_s = request_timeout_s
        self._turns = asyncio.Lock()
        """Of requests whose body is there: however many come at once, streams go on between them,
        and those whose clients leave meanwhile cost nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = scope[REQUEST_ID] = _request_id(headers)
        reply = _Reply(send, request_id)
        CURRENT.set(_http_request(request_id, scope, headers))
        started_s = time.monotonic()
        try:
            await self._admit(scope, receive, reply, headers)
        finally:
            _log(scope, reply, time.monotonic() - started_s)

    async def _admit(
        self, scope: Scope, receive: Receive, reply: "_Reply", headers: dict[bytes, bytes]
    ) -> None:
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response()(scope, receive, reply.send)
            return
        if b"content-type" not in headers:
            scope["headers"] = [*scope["headers"], (b"content-type", JSON)]
        timeout = asyncio.timeout(self._timeout_s)
        try:
            async with timeout:
                is_counted = not _is_open(scope["path"])
                if is_counted:
                    self._lifecycle.enter(timeout)
                try:
                    await self._serve(scope, receive, reply)
                finally:
                    if is_counted:
                        self._lifecycle.leave(timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            await reply.end(self._too_late(), scope, receive)

    async def _serve(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        if scope["method"] in ("POST", "PUT", "PATCH"):
            body = await self._read(receive)
            if body is None:
                return  # the client has gone
            if isinstance(body, ApiError):
                await body.response()(scope, receive, reply.send)
                return
            async with self._turns:
                for _ in range(NUM_LOOKS):
                    await asyncio.sleep(0)
            if _has_gone(receive):
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, reply.send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        path, method = scope["path"], scope["method"]
        if len(scope["headers"]) > MAX_HEADERS:
            return ApiError(431, f"more than {MAX_HEADERS} headers", headers=CLOSE)
        # The connection stops counting where they end, so those that come in one piece pass it.
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            text = f"the headers are larger than {MAX_HEADER_BYTES >> 10} KiB"
            return ApiError(431, text, headers=CLOSE)
        is_admin = path == ADMIN or path.startswith(ADMIN + "/")
        if is_admin and not self._admin_digests:
            return ApiError(404, f"{method} {path[:200]}: Not Found")
        if not self._may_pass(path, is_admin, headers):
            return ApiError(
                401,
                f"a valid {'admin' if is_admin else 'API'} key is required: send it as "
                "'Authorization: Bearer KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        origin = headers.get(b"origin")
        if origin is not None and not self._digests and not self._is_known(origin):
            return ApiError(
                403,
                "this server has no API key, so it answers web pages of this machine only: name "
                "the page's origin with --allowed-origins, or set a key",
                "origin_not_allowed",
            )
        if not _is_open(path) and (refusal := self._not_now()) is not None:
            return refusal
        if method != "POST":
            return None
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if content_type and content_type != JSON:
            return ApiError(415, "the body must be JSON: send 'Content-Type: application/json'")
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            return ApiError(415, "the body must not be compressed: leave out 'Content-Encoding'")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        return None

    def _not_now(self) -> ApiError | None:
        """The refusal of a server that is loading, draining or dead."""
        if self._lifecycle.phase is Phase.READY and not self._lifecycle.is_dead:
            return None
        return unavailable(self._lifecycle.health()["status"])

    def _may_pass(self, path: str, is_admin: bool, headers: dict[bytes, bytes]) -> bool:
        if is_admin:
            return _has_key(headers, self._admin_digests)
        if _is_open(path) or not self._digests:
            return True
        is_known = _has_key(headers, self._digests)
        return is_known or (path == METRICS and _has_key(headers, self._admin_digests))

    def _is_known(self, origin: bytes) -> bool:
        text = origin.decode("latin-1")
        if text in self._origins or "*" in self._origins:
            return True
        try:
            host = urlsplit(text).hostname or ""
        except ValueError:
            return False
        return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None

    async def _read(self, receive: Receive) -> bytes | ApiError | None:
        """The whole body, counted while it arrives: a length may be missing or wrong."""
        parts: list[bytes] = []
        num_bytes, more = 0, True
        try:
            async with asyncio.timeout(BODY_TOTAL_S):
                while more:
                    async with asyncio.timeout(BODY_PAUSE_S):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    num_bytes += len(parts[-1])
                    if num_bytes > self._max_body_bytes:
                        return self._too_large()
        except TimeoutError:
            return ApiError(408, "the body did not arrive in time", "timeout", headers=CLOSE)
        body = b"".join(parts)
        if is_deeper_than(body, MAX_DEPTH):
            return ApiError(
                400, f"the body is nested more than {MAX_DEPTH} levels deep", "invalid_json"
            )
        return body

    def _too_large(self) -> ApiError:
        size = self._max_body_bytes
        shown = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} bytes"
        return ApiError(413, f"the body is larger than {shown}", headers=CLOSE)

    def _too_late(self) -> ApiError:
        if self._lifecycle.phase is Phase.DRAINING:
            return unavailable(str(Phase.DRAINING))
        return ApiError(
            408,
            f"the answer was not complete within {self._timeout_s:g} s: ask for fewer tokens, or "
            "raise --request-timeout-s",
            "deadline_exceeded",
        )


CLOSE = {"Connection": "close"}


class _Reply:
    """Passes a response on, and knows how far it is."""

    def __init__(self, send: Send, request_id: str):
        self._send = send
        self._id_header = (b"x-request-id", request_id.encode())
        self._is_stream = self._has_begun = self._has_ended = False
        self._num_events = 0
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), self._id_header]
            message = {**message, "headers": headers}
            self._has_begun = True
            self.status = message["status"]
            self._is_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in headers
            )
        else:
            self._num_events += message.get("body", b"").startswith(b"event: ")
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error, or end the stream that has begun with one."""
        if not self._has_begun:
            await error.response()(scope, receive, self.send)
        elif self._is_stream and not self._has_ended:
            body = b"data: " + error.json() + b"\n\ndata: [DONE]\n\n"
            if scope["path"] == RESPONSES:
                body = named_event(self._event(error))
            end = {"type": "http.response.body", "body": body, "more_body": False}
            await self.send({**end, STREAM_ERROR: error})

    def _event(self, error: ApiError) -> dict[str, Any]:
        """The error as an event of a response."""
        told = {name: error.body()["error"][name] for name in ("code", "message", "param")}
        return {"type": "error", "sequence_number": self._num_events, **told}


def is_deeper_than(body: bytes, limit: int) -> bool:
    """Whether arrays and objects in a JSON text are nested deeper than that anywhere.

    Takes out strings, then adds up what is left: as quick for deep texts as for flat ones, because
    nobody else is served meanwhile. Ends at the first piece that is too deep.
    """
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    steps = np.frombuffer(STRINGS.sub(b"", body).translate(STEP_OF, NO_BRACKETS), np.int8)
    depth = 0
    for start in range(0, len(steps), PIECE):
        depths = depth + np.cumsum(steps[start : start + PIECE], dtype=np.int64)
        if depths.max() > limit:
            return True
        depth = int(depths[-1])
    return False


def _is_open(path: str) -> bool:
    """Health checks and the files of the web page: for everyone, at any time."""
    return path in OPEN_PATHS or path.startswith(OPEN_BELOW)


def _has_gone(receive: Receive) -> bool:
    """Whether the client has closed its connection, as far as is known now."""
    asking = receive().__await__()
    try:
        next(asking)
    except StopIteration as told:
        return told.value["type"] == "http.disconnect"
    asking.close()
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first."""
    is_given = False

    async def replaying() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying


def _http_request(request_id: str, scope: Scope, headers: dict[bytes, bytes]) -> HttpRequest:
    traceparent = headers.get(b"traceparent", b"")[:MAX_TRACEPARENT].decode("latin-1")
    return HttpRequest(request_id, scope["path"][:200], traceparent)


def _log(scope: Scope, reply: "_Reply", duration_s: float) -> None:
    """One line a request, at a level that does not matter unless asked for."""
    logger.info(
        "request",
        extra={
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": reply.status,
            "duration_s": round(duration_s, 4),
        },
    )


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own id of the request, if it is one that can be logged, or a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if GOOD_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _has_key(headers: dict[bytes, bytes], digests: Iterable[bytes]) -> bool:
    """Whether the bearer token is one of these keys; as quick for a near miss as for any."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    given, is_equal = _digest(key.strip()), False
    for digest in digests:
        is_equal |= hmac.compare_digest(given, digest)
    return is_equal and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    """Equal lengths, so that the comparison tells nothing about the key's."""
    return hashlib.sha256(key).digest()
