"""Load or recompute: decides per request and range of blocks, from measured costs.

Computing the positions [n0, n) costs a * (n - n0) + c * (n^2 - n0^2) / 2 seconds; a and c are
fitted to the steps that were served. What loading costs, its tiers say. A range can be split: the
head is computed while the tail is loaded (Cake, arXiv 2410.03065). Knows nothing of arrays, jax or
queues.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

FORGETTING = 0.98
"""Weight of all earlier steps when a new one is observed."""

MIN_GAIN = 0.05
"""Share of the time to compute that loading must save."""

LOAD_ALL_SHARE = 0.5
"""Where loading takes at most this share of computing, computing the head meanwhile is not worth
the time it takes from other requests."""

PATIENCE = 1.5
"""How many times its estimate a load may take before computing goes on without it..."""

MAX_DELAY_SHARE = 0.1
"""...plus this share of what computing everything takes."""

UNMEASURED_WAIT_S = 0.05


class PrefillCost:
    """What it costs to compute positions, fitted by least squares with forgetting."""

    def __init__(self) -> None:
        self._s11 = self._s12 = self._s22 = self._b1 = self._b2 = 0.0
        self.num_observed = 0

    def observe(self, num_tokens: int, num_pairs: float, seconds: float) -> None:
        """A step computed so many positions and (query, key) pairs in this time."""
        keep, pairs = FORGETTING, num_pairs * 1e-3  # scaled for the sake of the numbers
        self._s11 = keep * self._s11 + num_tokens * num_tokens
        self._s12 = keep * self._s12 + num_tokens * pairs
        self._s22 = keep * self._s22 + pairs * pairs
        self._b1 = keep * self._b1 + num_tokens * seconds
        self._b2 = keep * self._b2 + pairs * seconds
        self.num_observed += 1

    @property
    def coefficients(self) -> tuple[float, float]:
        """Seconds per position and per (query, key) pair."""
        s11, s22 = self._s11, self._s22
        if not self.num_observed or s11 <= 0:
            return 0.0, 0.0
        determinant = s11 * s22 - self._s12 * self._s12
        if determinant > 1e-6 * s11 * s22:
            a = (self._b1 * s22 - self._b2 * self._s12) / determinant
            c = (self._b2 * s11 - self._b1 * self._s12) / determinant
            if a >= 0 and c >= 0:
                return a, c * 1e-3
            if a < 0:
                return 0.0, max(0.0, self._b2 / s22) * 1e-3
        return max(0.0, self._b1 / s11), 0.0

    def seconds(self, start: int, end: int) -> float:
        """Estimate for the positions [start, end); 0 if nothing was observed."""
        a, c = self.coefficients
        return a * (end - start) + c * (end * end - start * start) / 2


class Choice(enum.StrEnum):
    """What to do about blocks that a lower tier has."""

    LOAD = "load"
    SPLIT = "split"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one request, and why.

    Attributes:
        choice: what to do.
        end: blocks before this one are loaded, as far as they are not on the device.
        compute_until: position up to which the sequence computes while it waits.
        wait_s: how long it holds back from computing more.
        load_s, compute_s: the two estimates for the range; 0: nothing was measured yet.
        num_blocks: how many blocks lower tiers had; 0: nothing was to be decided.
    """

    choice: Choice
    end: int
    compute_until: int
    wait_s: float
    load_s: float
    compute_s: float
    num_blocks: int = 0


class LoadPlanner:
    """Decides from `PrefillCost` and from what tiers say.

    Args:
        page_size: tokens per block.
        mode: "auto" decides; "load" and "recompute" always do the one thing.
    """

    def __init__(self, page_size: int, mode: str = "auto"):
        self.prefill = PrefillCost()
        self._page_size = page_size
        self._mode = mode
        self.counts = {choice.value: 0 for choice in Choice}
        """Decisions that were carried out; a sequence that cannot start yet is decided again."""

    def decide(
        self,
        first: int,
        host_end: int,
        end: int,
        host_s: Callable[[int], float],
        store_s: Callable[[int], float],
        *,
        can_split: bool = True,
    ) -> Decision:
        """What to do about the blocks [first, end) of a request.

        Args:
            first: blocks before this one are on the device.
            host_end: blocks before this one are on the device or the host.
            end: blocks before this one are in some tier.
            host_s, store_s: estimates for loading a number of blocks from the host, from stores.
            can_split: the head can be computed while the tail is loaded; not so with windows.
        """
        decision = self._decide(first, host_end, end, host_s, store_s, can_split)
        return replace(decision, num_blocks=end - first)

    def _decide(
        self,
        first: int,
        host_end: int,
        end: int,
        host_s: Callable[[int], float],
        store_s: Callable[[int], float],
        can_split: bool,
    ) -> Decision:
        start = first * self._page_size
        load_s = host_s(end - first) + (store_s(end - host_end) if end > host_end else 0.0)
        compute_s = self._compute_s(first, end)
        if self._mode == "recompute":
            return Decision(Choice.RECOMPUTE, first, start, 0.0, load_s, compute_s)
        if self._mode == "load":
            return Decision(Choice.LOAD, end, start, float("inf"), load_s, compute_s)
        if not self.prefill.num_observed:
            return Decision(Choice.LOAD, end, start, UNMEASURED_WAIT_S, load_s, compute_s)
        slack_s = MAX_DELAY_SHARE * compute_s
        if load_s <= LOAD_ALL_SHARE * compute_s:
            wait_s = PATIENCE * load_s + slack_s
            return Decision(Choice.LOAD, end, start, wait_s, load_s, compute_s)
        if end > host_end and can_split:
            split = self._split(first, host_end, end, host_s, store_s)
            split_s = self._compute_s(first, split)
            if end - split > 1 and split_s <= (1 - MIN_GAIN) * compute_s:
                until, wait_s = split * self._page_size, PATIENCE * split_s + slack_s
                return Decision(Choice.SPLIT, end, until, wait_s, load_s, compute_s)
        elif load_s <= (1 - MIN_GAIN) * compute_s:
            wait_s = PATIENCE * load_s + slack_s
            return Decision(Choice.LOAD, end, start, wait_s, load_s, compute_s)
        if end > host_end > first:
            return self._decide(first, host_end, host_end, host_s, store_s, can_split)
        return Decision(Choice.RECOMPUTE, first, start, 0.0, load_s, compute_s)

    def _compute_s(self, first: int, end: int) -> float:
        return self.prefill.seconds(first * self._page_size, end * self._page_size)

    def _split(
        self,
        first: int,
        host_end: int,
        end: int,
        host_s: Callable[[int], float],
        store_s: Callable[[int], float],
    ) -> int:
        """The block where computing from the head and loading from the tail would meet."""
        low, high = first, end
        while low < high:
            middle = (low + high) // 2
            num_stored = end - max(middle, host_end)
            load_s = host_s(end - middle) + (store_s(num_stored) if num_stored > 0 else 0.0)
            if self._compute_s(first, middle) < load_s:
                low = middle + 1
            else:
                high = middle
        return low
