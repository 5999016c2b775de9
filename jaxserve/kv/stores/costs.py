"""What an operation of a store costs, learnt from the calls that were made.

Calls are sorted by amount (bytes, or keys) into classes, each four times as wide as the one before.
A class keeps means of amount, seconds and deviation: plain ones of its first calls, so that one
call that was held up is soon outvoted, then exponentially weighted ones. An estimate is read off
the line through the classes' means. An estimate that nothing has confirmed for a while sinks
back towards the prior: a store that was slow once is tried again.

Knows nothing of stores or queues. Any thread may call it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostPrior:
    """What is assumed of an operation before it was measured; rather too fast than too slow."""

    latency_s: float
    units_per_s: float

    def seconds(self, amount: float) -> float:
        """Of one call of this amount."""
        return self.latency_s + amount / self.units_per_s


@dataclass(slots=True)
class _Class:
    amount: float
    seconds: float
    deviation_s: float
    seen_at_s: float
    num_seen: int = 1


class OperationCosts:
    """Seconds of one kind of operation as a function of its amount.

    Args:
        prior: what holds until there are measurements.
        clock: seconds, never going back.
        weight: of the newest call in the means, once there are enough of them.
        stale_s: the part of an estimate above the prior halves each time this much passes unseen.
    """

    def __init__(
        self,
        prior: CostPrior,
        clock: Callable[[], float],
        weight: float = 0.2,
        stale_s: float = 60.0,
    ):
        self._prior = prior
        self._clock = clock
        self._weight = weight
        self._stale_s = stale_s
        self._lock = threading.Lock()
        self._classes: dict[int, _Class] = {}

    def observe(self, amount: int, seconds: float) -> None:
        """A call of this amount (at least 1) took so long."""
        index = max(amount, 1).bit_length() // 2
        with self._lock:
            known = self._classes.get(index)
            if known is None:
                self._classes[index] = _Class(max(amount, 1), seconds, 0.0, self._clock())
                return
            known.num_seen += 1
            w = max(self._weight, 1.0 / known.num_seen)
            known.deviation_s += w * (abs(seconds - known.seconds) - known.deviation_s)
            known.amount += w * (amount - known.amount)
            known.seconds += w * (seconds - known.seconds)
            known.seen_at_s = self._clock()

    def seconds(self, amount: float, num_deviations: float = 0.0) -> float:
        """What a call of this amount is expected to take, plus so many mean deviations."""
        with self._lock:
            known = [self._classes[index] for index in sorted(self._classes)]
            points = [self._point(one, num_deviations) for one in known]
        if not points:
            return self._prior.seconds(amount)
        left_amount, left_s = 0.0, min(self._prior.latency_s, points[0][1])
        for right_amount, right_s in points:
            right_s = max(right_s, left_s)  # more never takes less
            if amount <= right_amount:
                share = (amount - left_amount) / max(right_amount - left_amount, 1e-9)
                return left_s + share * (right_s - left_s)
            left_amount, left_s = right_amount, right_s
        return left_s * amount / left_amount

    def least_s(self) -> float:
        """What the smallest calls seen took: no less than the latency."""
        with self._lock:
            if not self._classes:
                return self._prior.latency_s
            return self._point(self._classes[min(self._classes)], 0.0)[1]

    def units_per_s(self) -> float:
        """Throughput of the largest calls seen."""
        with self._lock:
            if not self._classes:
                return self._prior.units_per_s
            largest = self._classes[max(self._classes)]
            return largest.amount / max(largest.seconds, 1e-9)

    def _point(self, known: _Class, num_deviations: float) -> tuple[float, float]:
        measured = known.seconds + num_deviations * known.deviation_s
        prior = self._prior.seconds(known.amount)
        if measured <= prior:
            return known.amount, measured
        num_halvings = max(self._clock() - known.seen_at_s, 0.0) / self._stale_s
        faded = prior + (measured - prior) * 0.5 ** max(num_halvings - 1.0, 0.0)
        return known.amount, faded
