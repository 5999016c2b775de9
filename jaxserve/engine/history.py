"""How the tiers filled over time: few samples over any length of time, for plots.

When the samples reach their bound every second one is dropped and the interval doubles, so the
whole life of an engine stays visible in bounded memory. Knows nothing of plotting.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.kv.stats import KVStats

MAX_SAMPLES = 256
INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class TierSample:
    """A moment: bytes by tier, hit tokens by tier so far, and all that was asked for so far."""

    at_s: float
    num_bytes: dict[str, int]
    max_bytes: dict[str, int]
    hit_tokens: dict[str, int]
    queried_tokens: int


class TierHistory:
    """Samples of one engine.

    Args:
        read: the statistics of now.
        max_samples: an even number.
        interval_s: between samples, at first.
    """

    def __init__(
        self,
        read: Callable[[], KVStats],
        max_samples: int = MAX_SAMPLES,
        interval_s: float = INTERVAL_S,
    ):
        self._read = read
        self._max_samples = max_samples
        self._interval_s = interval_s
        self._next_s = 0.0
        self._samples: list[TierSample] = []

    def maybe_add(self, now_s: float) -> None:
        """Take a sample if the last one is old enough; `now_s` is on any clock that goes on."""
        if now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            self.add(self._read())

    def add(self, stats: KVStats) -> None:
        """Keep a sample."""
        self._samples.append(
            TierSample(
                stats.at_s,
                {tier.name: tier.num_bytes for tier in stats.tiers},
                {tier.name: tier.max_bytes for tier in stats.tiers},
                dict(stats.hit_tokens),
                stats.queried_tokens,
            )
        )
        if len(self._samples) >= self._max_samples:
            self._samples = self._samples[1::2]
            self._interval_s *= 2

    def samples(self) -> tuple[TierSample, ...]:
        """All samples, oldest first."""
        return tuple(self._samples)
