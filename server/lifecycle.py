"""What a server is doing: loading, ready, draining, or over; and which requests it has open.

The guard asks it whether to let requests in, `/health` tells its state, `launch` moves it on.
Knows nothing of HTTP.
"""

import asyncio
import enum
import time
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.context import Context


class Phase(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(eq=False)
class Lifecycle:
    """The state of one server; lives on its event loop.

    Attributes:
        context: of the engine, as soon as there is one.
    """

    phase: Phase = Phase.LOADING
    context: Context | None = None
    started_s: float = field(default_factory=time.monotonic)
    _doing: str = "starting"
    _done: int = 0
    _total: int = 0
    _open: dict[asyncio.Timeout, None] = field(default_factory=dict)
    _is_empty: asyncio.Event = field(default_factory=asyncio.Event)

    def report(self, what: str, done: int, total: int) -> None:
        """Progress while loading."""
        self._doing, self._done, self._total = what, done, total

    def become_ready(self, context: Context) -> None:
        self.context = context
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    @property
    def is_dead(self) -> bool:
        """The engine has failed."""
        return self.context is not None and self.context.bridge.error is not None

    def health(self) -> dict[str, Any]:
        """For /health: the state, and how far loading is."""
        if self.is_dead:
            return {"status": "dead"}
        told: dict[str, Any] = {"status": "ok" if self.phase is Phase.READY else str(self.phase)}
        if self.phase is Phase.LOADING:
            elapsed_s = round(time.monotonic() - self.started_s, 1)
            told["progress"] = {
                "what": self._doing,
                "done": self._done,
                "total": self._total,
                "elapsed_s": elapsed_s,
            }
        if self.phase is Phase.DRAINING:
            told["open_requests"] = len(self._open)
        return told

    def enter(self, request: asyncio.Timeout) -> None:
        """A request has been let in; it ends early if its timeout is moved to now."""
        self._open[request] = None
        self._is_empty.clear()

    def leave(self, request: asyncio.Timeout) -> None:
        self._open.pop(request, None)
        if not self._open:
            self._is_empty.set()

    async def drain(self, limit_s: float) -> int:
        """Let nobody in any more, and wait for those inside; end those that take longer.

        Returns:
            How many had to be ended.
        """
        self.phase = Phase.DRAINING
        if self.context is not None:
            self.context.live.close()
        if await self._wait_until_empty(limit_s):
            return 0
        late, now_s = list(self._open), asyncio.get_running_loop().time()
        for request in late:
            if not request.expired():
                request.reschedule(now_s)
        await self._wait_until_empty(1.0)
        return len(late)

    async def _wait_until_empty(self, timeout_s: float) -> bool:
        if not self._open:
            return True
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
