"""Requests whose grammar is being compiled: the engine goes on with others meanwhile."""

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError
from jaxserve.structured import Constraint, GrammarCompiler
from jaxserve.types import FinishReason, Request, TokenEvent

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)


class Compiling:
    """Holds requests until their grammar is there. The engine's thread owns it."""

    def __init__(self, grammars: GrammarCompiler):
        self._grammars = grammars
        self._waiting: dict[str, tuple[Request, Future[LLMatcher]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Take a request that the scheduler would take.

        Raises:
            RequestError: its id belongs to another one, or the model has no tokenizer.
        """
        if request.request_id in self._waiting:
            raise RequestError(
                f"request id {request.request_id!r} belongs to a live request; use another",
                param="request_id",
            )
        compiled = self._grammars.start(request.grammar)
        self._waiting[request.request_id] = request, compiled

    def abort(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def hand_over(self, add: Callable[[Request, Constraint], None]) -> list[TokenEvent]:
        """Give `add` every request whose grammar is ready; returns the ends of those that failed.

        Front ends compile first, so that nobody who may be told fails here.
        """
        ended = []
        for request_id, (request, compiled) in list(self._waiting.items()):
            if not compiled.done():
                continue
            del self._waiting[request_id]
            try:
                add(request, self._grammars.constraint(compiled))
            except Exception as error:
                logger.error("request %s: %s", request_id, error)
                ended.append(TokenEvent(request_id, None, FinishReason.ABORT))
        return ended

    def wait(self, timeout_s: float) -> None:
        """Wait until some grammar is ready; returns at once if none is awaited."""
        if self._waiting:
            futures = [compiled for _, compiled in self._waiting.values()]
            wait(futures, timeout_s, return_when=FIRST_COMPLETED)
