"""A circuit breaker: how soon to ask again a store that has stopped answering.

    CLOSED --max_failures in a row--> OPEN --back-off is over--> HALF_OPEN (one trial)
       ^                               ^                            |
       +------- trial succeeded -------+------- trial failed -------+

The back-off doubles with each opening and goes back to its minimum only after a run of successes,
so a store that flaps is asked less and less often. Until that run is complete one failure is enough
to open it again.

Knows nothing of threads (its owner locks), stores or what a failure was. Time is the owner's clock.
"""

import enum
from collections.abc import Callable


class BreakerState(enum.StrEnum):
    """CLOSED: all goes through; OPEN: nothing does; HALF_OPEN: one trial is on its way."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Counts failures in a row and says whether a call may go through.

    Args:
        max_failures: this many in a row open it.
        min_backoff_s, max_backoff_s: how long it stays open the first time, and at most.
        num_to_trust: successes in a row after which it forgets that it was ever open.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        max_failures: int,
        min_backoff_s: float,
        max_backoff_s: float,
        clock: Callable[[], float],
        num_to_trust: int = 8,
    ):
        self._max_failures = max_failures
        self._min_backoff_s = min_backoff_s
        self._max_backoff_s = max_backoff_s
        self._num_to_trust = num_to_trust
        self._clock = clock
        self._state = BreakerState.CLOSED
        self._num_failures = 0
        self._num_successes = num_to_trust
        self._backoff_s = min_backoff_s
        self._retry_at_s = 0.0
        self.num_openings = 0
        self.was_trusted = True
        """Whether the last opening came after many successes, and not after trials that failed."""

    @property
    def state(self) -> BreakerState:
        """The state now; being due for a trial is still OPEN."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """Whether calls may go through."""
        return self._state is BreakerState.CLOSED

    @property
    def retry_at_s(self) -> float:
        """When the next trial may begin, on the owner's clock; meaningful while OPEN."""
        return self._retry_at_s

    @property
    def is_due(self) -> bool:
        """Whether a trial may begin now."""
        return self._state is BreakerState.OPEN and self._clock() >= self._retry_at_s

    def begin_trial(self) -> None:
        """One call goes through; `succeed` or `fail` with `is_trial` must follow, or `abort`."""
        assert self.is_due, "a trial needs an open breaker whose back-off is over"
        self._state = BreakerState.HALF_OPEN

    def abort_trial(self) -> None:
        """The trial was never made: another may begin at once."""
        if self._state is BreakerState.HALF_OPEN:
            self._state = BreakerState.OPEN

    def succeed(self, *, is_trial: bool = False) -> None:
        """A call was answered. Late answers of calls from before the opening change nothing."""
        if self._state is BreakerState.HALF_OPEN and is_trial:
            self._state = BreakerState.CLOSED
            self._num_successes = 0
        elif self._state is not BreakerState.CLOSED:
            return
        self._num_failures = 0
        if self._num_successes < self._num_to_trust:
            self._num_successes += 1
            if self._num_successes >= self._num_to_trust:
                self._backoff_s = self._min_backoff_s

    def fail(self, *, is_trial: bool = False) -> bool:
        """A call failed or took too long; returns whether that has just opened the breaker."""
        if self._state is BreakerState.HALF_OPEN and is_trial:
            self._open()
            return True
        if self._state is not BreakerState.CLOSED:
            return False
        self._num_failures += 1
        is_on_probation = self._num_successes < self._num_to_trust
        if self._num_failures < self._max_failures and not is_on_probation:
            return False
        self._open()
        return True

    def _open(self) -> None:
        self._state = BreakerState.OPEN
        self._retry_at_s = self._clock() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)
        self.was_trusted = self._num_successes >= self._num_to_trust
        self._num_failures = 0
        self._num_successes = 0
        self.num_openings += 1
