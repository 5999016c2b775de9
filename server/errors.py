"""Every way a request can fail, as a status and the OpenAI error body.

Messages are bounded: what a client sent comes back in a few characters at most. Internal failures
say nothing but a request id; the log has the rest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from jaxserve.errors import EngineDeadError, RequestError, StoreError

MAX_MESSAGE_CHARS = 2000
MAX_ERRORS_TOLD = 3
RETRY_AFTER_S = 1

STATUS_OF_CODE = {
    "queue_full": 429,
    "too_many_watchers": 429,
    "model_not_found": 404,
    "response_not_found": 404,
    "busy": 409,
    "unsupported_engine": 501,
}
UNAVAILABLE = {
    "loading": ("the model is still loading; /health tells how far it is", 2),
    "draining": ("the server is shutting down; ask another one", 5),
    "dead": ("the engine has stopped; the server must be restarted", 30),
}
"""What is said, and after how many seconds to try again."""

TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error as a client sees it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        message = self.message
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + "..."
        return {
            "error": {
                "message": message,
                "type": TYPE_OF_STATUS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def json(self) -> bytes:
        return json.dumps(self.body()).encode()  # ASCII: what is quoted may hold lone surrogates

    def response(self) -> Response:
        return Response(self.json(), self.status, dict(self.headers), "application/json")


def from_exception(error: Exception, request_id: str) -> ApiError:
    """What a client is told about an exception; anything unexpected is a bare 500."""
    if isinstance(error, RequestError):
        status = STATUS_OF_CODE.get(error.code, 400)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else {}
        return ApiError(status, str(error), error.code, error.param, headers)
    if isinstance(error, StoreError):
        return ApiError(503, str(error), "store_error", headers={"Retry-After": "30"})
    if isinstance(error, EngineDeadError):
        message = f"the engine stopped while it served this request (request id {request_id})"
        return ApiError(500, message, "engine_dead")
    message = f"internal error; the server's log has the details (request id {request_id})"
    return ApiError(500, message, "internal_error")


def unavailable(status: str = "dead") -> ApiError:
    """No request is taken now: the server is "loading", "draining" or "dead"."""
    message, retry_s = UNAVAILABLE[status]
    return ApiError(503, message, f"engine_{status}", headers={"Retry-After": str(retry_s)})


def from_validation(errors: Sequence[Any]) -> ApiError:
    """pydantic's list of errors: the first few, by the path of the field."""
    told = []
    for error in errors[:MAX_ERRORS_TOLD]:
        path = ".".join(str(part)[:60] for part in error["loc"] if part != "body")
        told.append(f"{path}: {error['msg'][:200]}" if path else error["msg"][:200])
    if len(errors) > MAX_ERRORS_TOLD:
        told.append(f"and {len(errors) - MAX_ERRORS_TOLD} more")
    first = [str(part)[:60] for part in errors[0]["loc"] if part != "body"] if errors else []
    is_json = not any(error["type"] == "json_invalid" for error in errors)
    return ApiError(
        400,
        "; ".join(told) if is_json else "the body is not valid JSON",
        "invalid_value" if is_json else "invalid_json",
        ".".join(first) if first and is_json else None,
    )
