"""Makes Anthropic's clients feel at home: their key header, and on /v1/messages their errors.

An ASGI layer around everything else, so that it holds for every refusal, wherever it is made.
"""

import json
from collections.abc import MutableMapping
from typing import Any

from jaxserve.server.guard import STREAM_ERROR, App, Receive, Scope, Send
from jaxserve.server.streaming import named_event

MESSAGES = "/v1/messages"
TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, message: str, request_id: str) -> dict[str, Any]:
    """An error as Anthropic's API tells it."""
    kind = TYPE_OF_STATUS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


class AnthropicFront:
    """Wraps an ASGI app."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http":
            scope["headers"] = _with_bearer(scope["headers"])
            if path == MESSAGES or path.startswith(MESSAGES + "/"):
                send = _Rewriter(send).send
        await self._app(scope, receive, send)


def _with_bearer(headers: "list[tuple[bytes, bytes]]") -> "list[tuple[bytes, bytes]]":
    """Headers in which an `x-api-key` is a bearer token, too, unless there is one."""
    given = dict(headers)
    if b"authorization" in given or b"x-api-key" not in given:
        return headers
    return [*headers, (b"authorization", b"Bearer " + given[b"x-api-key"])]


class _Rewriter:
    """Sends a response on; an error is sent in Anthropic's form, as a body or as a stream's end."""

    def __init__(self, send: Send):
        self._send = send
        self._start: MutableMapping[str, Any] | None = None
        self._body = b""
        self._request_id = ""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None and STREAM_ERROR in message:
            error = message[STREAM_ERROR]
            body = named_event(error_body(error.status, error.message, self._request_id))
            await self._send({**message, "body": body})
        elif self._start is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(self._start)

    async def _send_error(self, start: MutableMapping[str, Any]) -> None:
        headers, request_id = dict(start["headers"]), self._request_id
        try:
            told = json.loads(self._body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            told = "the request failed"
        body = json.dumps(error_body(start["status"], told, request_id)).encode()
        headers |= {b"content-length": str(len(body)).encode(), b"request-id": request_id.encode()}
        await self._send({**start, "headers": list(headers.items())})
        await self._send({"type": "http.response.body", "body": body})
