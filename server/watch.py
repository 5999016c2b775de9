"""Times and counts every request from its admission to its end, and tells whoever wants to know.

The bridge calls `begin`, `note` and `end`; histograms are kept here, ended requests are handed to
listeners (the slow-request log, traces). Everything runs on the event loop. Times are of the
server's side: when events came, not when the device made them.

    arrival --queued--> first step --prefill--> first token --decode--> last token
"""

import contextvars
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jaxserve.types import Request, TokenEvent

logger = logging.getLogger(__name__)

SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
TOKENS = tuple(float(one * 10**ten) for ten in range(6) for one in (1, 2, 5))
"""Upper bounds of the histograms' buckets."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What is known of the HTTP request that a request to the engine belongs to.

    Attributes:
        request_id: in its X-Request-Id header.
        traceparent: of the W3C trace context; "": the client sent none.
    """

    request_id: str
    path: str = ""
    traceparent: str = ""


NO_HTTP_REQUEST = HttpRequest("")
CURRENT: "contextvars.ContextVar[HttpRequest]" = contextvars.ContextVar(
    "jaxserve_http_request", default=NO_HTTP_REQUEST
)
"""The HTTP request that is being handled; the guard sets it."""


@dataclass(slots=True)
class Timing:
    """A request and its times, as `time.monotonic()`; 0: not yet.

    Attributes:
        queued_s: how long it waited for a place in a step, as the engine says.
        reason: why it ended: stop, length, abort or error; "": it has not.
    """

    request: Request
    http: HttpRequest
    begun_s: float
    queued_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    ended_s: float = 0.0
    num_tokens: int = 0
    num_cached: int = 0
    reason: str = ""

    @property
    def prefill_s(self) -> float:
        """From its first step to its first token."""
        return max(0.0, self.first_s - self.begun_s - self.queued_s) if self.first_s else 0.0

    @property
    def decode_s(self) -> float:
        """From its first to its last token."""
        return self.last_s - self.first_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.begun_s


@dataclass(slots=True)
class Histogram:
    """Counts by bucket, the last one without an upper bound, and the sum."""

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


Listener = Callable[[Timing], None]


class Watch:
    """The requests of one server.

    Attributes:
        ended: requests by why they ended.
        num_prompt_tokens, num_generated_tokens: of requests that have had their first token, and
            tokens that have come.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.to_first_s = Histogram(SECONDS)
        self.between_s = Histogram(BETWEEN_TOKENS_S)
        self.total_s = Histogram(SECONDS)
        self.queued_s = Histogram(SECONDS)
        self.prefill_s = Histogram(SECONDS)
        self.decode_s = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generated_tokens = Histogram(TOKENS)
        self.ended: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort", "error"), 0))
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.listeners: list[Listener] = []
        self._clock = clock
        self._live: dict[str, Timing] = {}

    def begin(self, requests: Iterable[Request]) -> None:
        """The engine has taken requests."""
        http = CURRENT.get()
        for request in requests:
            begun_s = request.arrival_s or self._clock()
            self._live[request.request_id] = Timing(request, http, begun_s)

    def note(self, events: Iterable[TokenEvent]) -> None:
        """Events of one step have come."""
        now_s, between_s = self._clock(), self.between_s
        for event in events:
            timing = self._live.get(event.request_id)
            if timing is None:
                continue
            if timing.first_s:
                between_s.add(now_s - timing.last_s)
            else:
                self._note_first(timing, event, now_s)
            timing.last_s = now_s
            if event.token_id is not None:
                timing.num_tokens += 1
                self.num_generated_tokens += 1
            if event.finish_reason is not None:
                self._end(timing, str(event.finish_reason), now_s)

    def end(self, request_ids: Iterable[str], reason: str) -> None:
        """Requests end without an event; those that have ended are ignored."""
        now_s = self._clock()
        for request_id in request_ids:
            timing = self._live.get(request_id)
            if timing is not None:
                self._end(timing, reason, now_s)

    def _note_first(self, timing: Timing, event: TokenEvent, now_s: float) -> None:
        timing.first_s = now_s
        timing.num_cached = event.num_cached_tokens
        if event.reuse is not None:
            timing.queued_s = event.reuse.queued_s
        self.num_prompt_tokens += len(timing.request.prompt_ids)
        self.to_first_s.add(now_s - timing.begun_s)
        self.queued_s.add(timing.queued_s)
        self.prefill_s.add(timing.prefill_s)

    def _end(self, timing: Timing, reason: str, now_s: float) -> None:
        del self._live[timing.request.request_id]
        timing.ended_s, timing.reason = now_s, reason
        self.ended[reason] += 1
        if reason in ("stop", "length"):
            self.total_s.add(timing.total_s)
            self.decode_s.add(timing.decode_s)
            self.prompt_tokens.add(len(timing.request.prompt_ids))
            self.generated_tokens.add(timing.num_tokens)
        for listener in self.listeners:
            try:
                listener(timing)
            except Exception:  # telling of a request must not break another
                logger.exception("a listener failed")


def slow_request_log(at_least_s: float) -> Listener:
    """A listener that logs requests that took long, and what took long in them."""

    def listen(timing: Timing) -> None:
        if timing.total_s >= at_least_s:
            logger.warning(
                "slow request",
                extra={
                    "request_id": timing.http.request_id or timing.request.request_id,
                    "path": timing.http.path,
                    "reason": timing.reason,
                    "total_s": round(timing.total_s, 3),
                    "queued_s": round(timing.queued_s, 3),
                    "prefill_s": round(timing.prefill_s, 3),
                    "decode_s": round(timing.decode_s, 3),
                    "prompt_tokens": len(timing.request.prompt_ids),
                    "cached_tokens": timing.num_cached,
                    "generated_tokens": timing.num_tokens,
                },
            )

    return listen
