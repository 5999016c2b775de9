"""Load or recompute: decides per request and range of blocks, from measured costs.

What computing costs, `PrefillCost` says; what loading costs, the tiers. A range can be split: the
head is computed while the tail is loaded (Cake, arXiv 2410.03065). Whatever the estimates say, a
sequence holds back from computing only for a small share of what computing everything would take,
or as much again from the last piece that came: so a store that comes to a halt costs no more than
that. For a store that has kept its word lately it holds back a little longer if that is still
hardly anything: when that store comes to a halt, only those pay that wait just then. Knows nothing
of arrays, jax or queues.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxserve.kv.loads import STORE_PIECE_BLOCKS
from jaxserve.kv.prefill_cost import PrefillCost, Steps

MIN_GAIN = 0.05
"""Share of the time to the first token that loading must save."""

PATIENCE = 1.5
"""Computing goes on without a load or a look-up after so many times its estimate..."""

SLACK_SHARE = 0.02
"""...and this share of what computing everything takes..."""

MAX_IDLE_SHARE = 0.08
"""...but no later than after this share of it: once for the look-up, once for each piece."""

MAX_IDLE_S = 0.02
"""...or after this time, if the store has been reliable: short requests are soon computed, and a
share of that is nothing, but what they wait for pays, too."""

LOAD_ALL_SHARE = 0.5
"""Where loading takes at most this share of computing, the head is not computed meanwhile: that
would take time from others, and gain little. Nor is it where all comes in one piece
that cannot be split."""

HOST_IDLE_SHARE = 0.5
"""The same for a load from the host alone: that comes, and meanwhile others can compute."""

GRANULE_TOKENS = 128
"""The head of a split ends at a multiple of this."""

UNMEASURED_S_PER_TOKEN = 3e-4
"""What computing is taken to cost before it was measured: slow, so that loads are tried."""


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
        wait_s: how long it holds back from computing more...
        patience_s: ...and how long from the last piece that came.
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
    patience_s: float = 0.0


class _Estimates(NamedTuple):
    """What loading takes, by the number of blocks: from the host, from stores.

    Attributes:
        host_end: blocks before this one are on the host.
        piece_blocks: how many come together from the stores.
        is_reliable: the stores have kept to such estimates lately.
    """

    host_s: Callable[[int], float]
    store_s: Callable[[int], float]
    host_end: int
    piece_blocks: int
    is_reliable: bool

    def seconds(self, first: int, end: int) -> float:
        """For the blocks [first, end)."""
        if first >= end:
            return 0.0
        num_stored = end - max(first, self.host_end)
        return self.host_s(end - first) + (self.store_s(num_stored) if num_stored > 0 else 0.0)


class _Option(NamedTuple):
    """A decision and the seconds until everything is computed or loaded that it would take."""

    seconds: float
    decision: Decision


class LoadPlanner:
    """Decides from `PrefillCost` and from what tiers say.

    Args:
        page_size: tokens per block.
        mode: "auto" decides; "load" and "recompute" always do the one thing.
        steps: how so many positions are cut into steps.
    """

    def __init__(
        self,
        page_size: int,
        mode: str = "auto",
        steps: Callable[[int], Steps] = lambda count: Steps(1, count),
    ):
        self.prefill = PrefillCost(steps)
        self.mode = mode
        self._page_size = page_size
        self.counts = {choice.value: 0 for choice in Choice}
        """Decisions that were carried out; a sequence that cannot start yet is decided again."""

    def is_worth_asking(self, first: int, end: int, num_tokens: int, least_load_s: float) -> bool:
        """Whether a sequence could gain by blocks [first, end) that some store may have.

        Args:
            least_load_s: what loading the smallest piece takes. More may be loaded while the head
                is computed, but if not even that pays, asking only takes time from the step.
        """
        if self.mode != "auto":
            return self.mode == "load"
        if not self.prefill.num_observed:
            return True
        return least_load_s < self._compute_s(first, num_tokens) - self._compute_s(end, num_tokens)

    def look_up_wait_s(
        self,
        first: int,
        end: int,
        num_tokens: int,
        look_up_s: float,
        *,
        load_s: float = 0.0,
        hit_share: float = 1.0,
        is_reliable: bool = False,
    ) -> float:
        """How long a sequence of so many tokens waits to hear who has its blocks [first, end).

        Args:
            look_up_s, load_s: what looking up takes, and then loading the blocks.
            hit_share: how often lately a look-up found something.
            is_reliable: the stores have kept to such estimates lately.
        """
        if self.mode == "load":
            return math.inf
        if self.mode == "recompute":
            return 0.0
        if not self.prefill.num_observed:
            return self._unmeasured_wait_s(first, num_tokens)
        all_s, rest_s = self._compute_s(first, num_tokens), self._compute_s(end, num_tokens)
        if look_up_s >= hit_share * (all_s - rest_s - load_s):
            return 0.0
        wait_s = _patience_s(look_up_s, all_s, is_reliable=is_reliable)
        return wait_s if look_up_s <= wait_s else 0.0

    def decide(
        self,
        first: int,
        host_end: int,
        end: int,
        host_s: Callable[[int], float],
        store_s: Callable[[int], float],
        num_tokens: int = 0,
        can_split: bool = True,
        piece_blocks: int = STORE_PIECE_BLOCKS,
        is_reliable: bool = False,
    ) -> Decision:
        """What to do about the blocks [first, end) of a request.

        Args:
            first: blocks before this one are on the device.
            host_end: blocks before this one are on the device or the host.
            end: blocks before this one are in some tier.
            host_s, store_s: estimates for loading a number of blocks from the host, from stores.
            num_tokens: of the request, if more than those of the blocks.
            can_split: the head can be computed while the tail is loaded; not so with windows.
            piece_blocks: how many blocks come together from the stores.
            is_reliable: the stores have kept to such estimates lately.
        """
        estimates = _Estimates(host_s, store_s, host_end, piece_blocks, is_reliable)
        num_tokens = max(num_tokens, end * self._page_size)
        options = [self._decide(first, end, estimates, num_tokens, can_split)]
        if first < host_end < end and self.mode == "auto":
            options.append(self._decide(first, host_end, estimates, num_tokens, can_split))
        best = min(options, key=lambda option: option.seconds)
        return replace(best.decision, num_blocks=end - first)

    def _decide(
        self, first: int, end: int, estimates: _Estimates, num_tokens: int, can_split: bool
    ) -> "_Option":
        start = first * self._page_size
        load_s = estimates.seconds(first, end)
        all_s, rest_s = self._compute_s(first, num_tokens), self._compute_s(end, num_tokens)
        compute_s = max(0.0, all_s - rest_s)
        if self.mode == "load":
            forced = Decision(Choice.LOAD, end, start, math.inf, load_s, compute_s)
            return _Option(load_s + rest_s, forced)
        recompute = _Option(all_s, Decision(Choice.RECOMPUTE, first, start, 0.0, load_s, compute_s))
        if self.mode == "recompute" or load_s == math.inf:
            return recompute
        if not self.prefill.num_observed:
            wait_s = self._unmeasured_wait_s(first, num_tokens)
            untried = Decision(
                Choice.LOAD, end, start, wait_s, load_s, compute_s, patience_s=wait_s
            )
            return _Option(0.0, untried)
        piece_s = estimates.seconds(max(first, end - estimates.piece_blocks), end)
        idle_s = MAX_IDLE_S if estimates.is_reliable else 0.0
        patience_s = max(MAX_IDLE_SHARE * all_s, idle_s)
        most_s = compute_s - MIN_GAIN * all_s
        whole = None
        if load_s <= most_s:
            if end <= estimates.host_end:
                wait_s, is_in_time = _patience_s(load_s, all_s, HOST_IDLE_SHARE), True
            else:
                wait_s, is_in_time = patience_s, piece_s <= patience_s
            if is_in_time:
                loaded = Decision(
                    Choice.LOAD, end, start, wait_s, load_s, compute_s, patience_s=patience_s
                )
                whole = _Option(load_s + rest_s, loaded)
        if whole is not None and load_s <= LOAD_ALL_SHARE * compute_s:
            return whole
        split = self._split(first, end, estimates) if can_split else end
        head_s = self._compute_s(first, split * self._page_size)
        split_s = max(head_s, estimates.seconds(split, end))
        if split < end and split_s <= most_s:
            wait_s = head_s + max(_patience_s(split_s, all_s), idle_s)
            until = split * self._page_size
            met = Decision(
                Choice.SPLIT, end, until, wait_s, load_s, compute_s, patience_s=patience_s
            )
            return _Option(split_s + rest_s, met)
        is_one_piece = end - first <= estimates.piece_blocks  # what its patience bounds
        return whole if whole is not None and is_one_piece else recompute

    def _compute_s(self, first: int, num_tokens: int) -> float:
        """Seconds to compute everything from block `first` on."""
        return self.prefill.seconds(first * self._page_size, num_tokens)

    def _unmeasured_wait_s(self, first: int, num_tokens: int) -> float:
        num_left = num_tokens - first * self._page_size
        return MAX_IDLE_SHARE * UNMEASURED_S_PER_TOKEN * num_left

    def _split(self, first: int, end: int, estimates: _Estimates) -> int:
        """The block where computing from the head and loading from the tail would meet.

        Steps are padded, so the head ends where it fills its step: a little before the meeting or
        a little after it, whichever is over sooner.
        """
        low, high = first, end
        while low < high:
            middle = (low + high) // 2
            head_s = self._compute_s(first, middle * self._page_size)
            if head_s < estimates.seconds(middle, end):
                low = middle + 1
            else:
                high = middle
        after = min(end, first + self._filled(low - first, up=True))
        before = first + self._filled(low - first, up=False)
        return min(
            (before, after),
            key=lambda split: max(
                self._compute_s(first, split * self._page_size), estimates.seconds(split, end)
            ),
        )

    def _filled(self, num_blocks: int, *, up: bool) -> int:
        """The nearest power of two or, beyond 256 tokens, multiple of 128 tokens; in blocks."""
        unit = max(1, GRANULE_TOKENS // self._page_size)
        if num_blocks > 2 * unit:
            return (num_blocks + (unit - 1 if up else 0)) // unit * unit
        size = 1
        while size * 2 <= num_blocks:
            size *= 2
        return size * 2 if up and size < num_blocks else min(size, num_blocks)


def _patience_s(
    estimate_s: float, all_s: float, most: float = MAX_IDLE_SHARE, *, is_reliable: bool = False
) -> float:
    """How long to hold back from computing for what should take `estimate_s`.

    Args:
        all_s: what computing everything takes.
        most: longest wait, as a share of it.
        is_reliable: the estimate has been right lately, so a short wait may be a larger share.
    """
    most_s = max(most * all_s, MAX_IDLE_S if is_reliable else 0.0)
    return min(PATIENCE * estimate_s + SLACK_SHARE * all_s, most_s)
