"""The outermost ASGI layer: keys, body size, content type, request id. No request passes it by.

Decides on the path the server routes by, never on a rebuilt URL. Knows nothing of the endpoints,
except that health checks and the files of the web page need no key, and that everything below
/admin needs the admin key, which no other key can stand for.
"""

import hashlib
import hmac
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException

from jaxserve.server.errors import ApiError

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 32 << 20
JSON = b"application/json"
OPEN_PATHS = frozenset({"/health", "/ping", "/"})
OPEN_BELOW = "/web/"
ADMIN, METRICS = "/admin", "/metrics"
REQUEST_ID = "jaxserve.request_id"


class Guard:
    """Wraps an ASGI app.

    Args:
        api_key: what clients must send as a bearer token; None lets everyone in.
        admin_key: what /admin asks for; None: there is nothing below it. It opens /metrics, too.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        admin_key: str | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ):
        self._app = app
        self._key_digest = None if api_key is None else _digest(api_key.encode())
        self._admin_digest = None if admin_key is None else _digest(admin_key.encode())
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = uuid.uuid4().hex

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send_with_id)
            return
        if b"content-type" not in headers:
            scope["headers"] = [*scope["headers"], (b"content-type", JSON)]
        await self._app(scope, self._limited(receive), send_with_id)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        path = scope["path"]
        is_admin = path == ADMIN or path.startswith(ADMIN + "/")
        if is_admin and self._admin_digest is None:
            return ApiError(404, f"{scope['method']} {path[:200]}: Not Found")
        if not self._may_pass(path, is_admin, headers):
            return ApiError(
                401,
                f"a valid {'admin' if is_admin else 'API'} key is required: send it as "
                "'Authorization: Bearer KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] != "POST":
            return None
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if content_type and content_type != JSON:
            return ApiError(415, "the body must be JSON: send 'Content-Type: application/json'")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        return None

    def _may_pass(self, path: str, is_admin: bool, headers: dict[bytes, bytes]) -> bool:
        if is_admin:
            return _has_key(headers, self._admin_digest)
        is_open = path in OPEN_PATHS or path.startswith(OPEN_BELOW)
        if is_open or self._key_digest is None:
            return True
        is_known = _has_key(headers, self._key_digest)
        return is_known or (path == METRICS and _has_key(headers, self._admin_digest))

    def _limited(self, receive: Receive) -> Receive:
        """Counts the body while it arrives: a length may be missing or wrong."""
        num_bytes = 0

        async def receive_limited() -> MutableMapping[str, Any]:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        return receive_limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes >> 20} MiB")


def _has_key(headers: dict[bytes, bytes], digest: bytes | None) -> bool:
    """Whether the bearer token is the key of that digest; as quick for a near miss as for any."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    is_equal = hmac.compare_digest(_digest(key.strip()), digest or bytes(32))
    return is_equal and digest is not None and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    """Equal lengths, so that the comparison tells nothing about the key's."""
    return hashlib.sha256(key).digest()
