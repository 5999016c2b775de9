"""Responses that clients may ask for again, or go on from: the most recent ones, in memory.

Bounded in number and bytes; what is too old or too large is simply not there any more.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError

MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response.

    Attributes:
        response: as it was answered.
        input_items: what it was an answer to, without what came before.
        history: all items before these, of the responses it goes on from.
        owner: whose it is; others do not see it.
    """

    response: dict[str, Any]
    input_items: list[Any]
    history: list[Any]
    owner: str

    @property
    def conversation(self) -> list[Any]:
        """Everything up to and with its output: what a next response goes on from."""
        return [*self.history, *self.input_items, *self.response["output"]]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A response, and bytes of JSON: of all of it, and of what a next one goes on from."""

    stored: StoredResponse
    num_bytes: int
    conversation_bytes: int


class ResponseStore:
    """Keeps responses by id.

    Args:
        max_responses: most that are kept; 0 keeps none.
        max_bytes: most bytes of JSON that are kept.
    """

    def __init__(self, max_responses: int, max_bytes: int = MAX_BYTES):
        self.max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._num_bytes = 0

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, and forget the oldest ones for it if there is no room."""
        if not self.max_responses:
            return
        history_bytes = self._history_bytes(stored)
        input_bytes = _size(stored.input_items)
        num_bytes = history_bytes + input_bytes + _size(stored.response)
        if num_bytes > self._max_bytes:
            return
        conversation_bytes = history_bytes + input_bytes + _size(stored.response["output"])
        self._kept[stored.response["id"]] = _Kept(stored, num_bytes, conversation_bytes)
        self._num_bytes += num_bytes
        while len(self._kept) > self.max_responses or self._num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes

    def _history_bytes(self, stored: StoredResponse) -> int:
        """Known of the response it goes on from: a long conversation is not measured every time."""
        before = self._kept.get(stored.response.get("previous_response_id") or "")
        return _size(stored.history) if before is None else before.conversation_bytes

    def get(self, response_id: str, owner: str, param: str | None = None) -> StoredResponse:
        """A response that is kept.

        Args:
            param: the field that named it, if a field did.

        Raises:
            RequestError: it is not, or is somebody else's.
        """
        found = self._kept.get(response_id)
        if found is None or found.stored.owner != owner:
            code = "response_not_found" if param is None else "previous_response_not_found"
            raise RequestError(
                f"there is no response {response_id[:60]!r}: this server keeps the last "
                f"{self.max_responses} that were made with store on",
                param=param,
                code=code,
            )
        self._kept.move_to_end(response_id)
        return found.stored

    def delete(self, response_id: str, owner: str) -> None:
        """Forget a response.

        Raises:
            RequestError: as for `get`.
        """
        self.get(response_id, owner)
        self._num_bytes -= self._kept.pop(response_id).num_bytes


def _size(items: Any) -> int:
    return len(json.dumps(items))
