"""Finds the part of a sequence that need not be computed, and starts to load what is not here.

Joins the pager (pages), the tiers (what is where) and the planner of loads. Decides nothing about
who may start.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.loads import LoadJob
from jaxserve.kv.planner import Choice, Decision, LoadPlanner
from jaxserve.kv.tiers import DEVICE, HOST, Tiers
from jaxserve.scheduler.pager import Pager
from jaxserve.scheduler.sequence import Sequence

MAX_LOOK_UP_S = 0.5
"""Longest wait for what the stores say they have."""


class Prefix(NamedTuple):
    """What is known of the leading blocks of a sequence.

    Attributes:
        names: of the blocks that shall be there, on the device or loaded.
        num_device: of these, the leading ones on the device.
        end_tokens: positions that they hold.
        decision: what was decided about the others; None: there are none.
    """

    names: list[BlockHash]
    num_device: int
    end_tokens: int
    decision: Decision | None


class PrefixFinder:
    """Finds and loads prefixes.

    Args:
        pager: the page tables.
        tiers: what is below the device; None: nothing.
        planner: decides whether to load.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        pager: Pager,
        tiers: Tiers | None,
        planner: LoadPlanner,
        clock: Callable[[], float],
    ):
        self.planner = planner
        self._pager = pager
        self._tiers = tiers
        self._clock = clock

    def candidates(self, seq: Sequence) -> list[BlockHash]:
        """Names of the leading blocks that could be reused.

        The last known token is always computed: it yields the next one. A preempted sequence takes
        back the blocks that it left behind, unless others have more by now.
        """
        parked, pager = seq.parked, self._pager
        names: list[BlockHash] = []
        if pager.enable_prefix_caching and not seq.needs_whole_prompt:
            names = seq.hashes[: seq.hash_blocks(len(seq.tokens) - 1, pager.page_size)]
        if seq.states is not None and seq.states.must_not_resume:
            return names
        if parked is None or len(names) > len(parked.names) and not parked.private:
            return names
        if len(names) >= len(parked.names):
            elsewhere = None if self._tiers is None else self._tiers.has
            num_found = pager.index.longest_prefix(names, elsewhere)
            if num_found * pager.page_size >= parked.num_tokens:
                return names
        return list(parked.names)

    def look_ahead(self, seq: Sequence) -> None:
        """Tell the policy what a new sequence needs, and ask the stores, which answer late."""
        tiers = self._tiers
        if tiers is None:
            return
        names = self.candidates(seq)
        tiers.host.observe(names)
        if not tiers.has_stores:
            return
        tiers.label(names, seq.tenant)
        num_device, num_tokens = self._pager.index.longest_prefix(names), len(seq.tokens)
        num_asked = len(names) - num_device
        if num_asked and self.planner.is_worth_asking(
            num_device, len(names), num_tokens, tiers.estimate_found_s(1)
        ):
            seq.look_up = tiers.look_up(names[num_device:])
            wait_s = self.planner.look_up_wait_s(
                num_device,
                len(names),
                num_tokens,
                tiers.estimate_look_up_s(num_asked),
                load_s=tiers.estimate_found_s(num_asked),
                hit_share=tiers.look_up_hit_share,
                is_reliable=tiers.are_stores_reliable,
            )
            seq.look_up_until_s = self._clock() + min(wait_s, MAX_LOOK_UP_S)

    def is_looking(self, seq: Sequence) -> bool:
        """The stores may still say in time what they have of a sequence."""
        if seq.look_up is None or self._tiers is None:
            return False
        if self._tiers.is_looking(seq.look_up) and self._clock() < seq.look_up_until_s:
            return True
        seq.look_up = None
        return False

    def is_loading_for_others(self, prefix: Prefix) -> bool:
        """Whether the first block to be loaded is on its way already."""
        names = prefix.names[prefix.num_device :]
        return bool(names) and self._tiers is not None and self._tiers.is_loading(names[0])

    def is_being_saved(self, seq: Sequence, prefix: Prefix) -> bool:
        """Whether blocks that a preempted sequence left behind have yet to reach the host."""
        if seq.parked is None or self._tiers is None or seq.loads_nothing:
            return False
        return any(map(self._tiers.is_saving_block, seq.parked.names[prefix.num_device :]))

    def find(self, seq: Sequence, names: list[BlockHash]) -> Prefix:
        """The prefix to be reused, and what to load of it."""
        index, tiers = self._pager.index, self._tiers
        max_tokens = _last_position(seq, names, len(names) * self._pager.page_size)
        num_device = index.longest_prefix(names, max_tokens=max_tokens)
        if tiers is None or num_device == len(names) or seq.loads_nothing:
            return self._prefix(seq, names, num_device, num_device, None)
        end = index.longest_prefix(names, tiers.has, max_tokens)
        if end <= num_device:
            return self._prefix(seq, names, num_device, num_device, None)
        host_end = index.longest_prefix(names[:end], tiers.host.has, max_tokens)
        if seq.parked is not None and host_end > num_device:
            # What was computed and is in memory is never computed again.
            start = num_device * self._pager.page_size
            decision = Decision(Choice.LOAD, host_end, start, math.inf, 0.0, 0.0)
            return self._prefix(seq, names, num_device, host_end, decision)
        decision = self.planner.decide(
            num_device,
            max(host_end, num_device),
            end,
            tiers.estimate_stage_s,
            lambda count: tiers.estimate_fetch_s(names[end - count : end]),
            len(seq.tokens),
            can_split=not index.has_windows,
            piece_blocks=tiers.piece_blocks(tiers.source(names[end - 1], (0,)) or HOST),
            is_reliable=tiers.are_stores_reliable,
        )
        return self._prefix(seq, names, num_device, decision.end, decision)

    def _prefix(
        self,
        seq: Sequence,
        names: list[BlockHash],
        num_device: int,
        end: int,
        decision: Decision | None,
    ) -> Prefix:
        end_tokens = _last_position(seq, names[:end], end * self._pager.page_size)
        return Prefix(names[:end], num_device, end_tokens, decision)

    def start(self, seq: Sequence, prefix: Prefix, pages: tuple[dict[int, int], ...]) -> bool:
        """Start to load the blocks of a prefix that are not on the device, tail first.

        Args:
            pages: by KV group, the page of each block that is to be loaded.

        Returns:
            False if nothing could be started.
        """
        tiers, decision = self._tiers, prefix.decision
        assert tiers is not None and decision is not None
        now_s = self._clock()
        job = LoadJob(
            names=prefix.names,
            end_tokens=prefix.end_tokens,
            page_size=self._pager.page_size,
            pages=pages,
            all_or_nothing=self._pager.index.has_windows,
            compute_until=decision.compute_until,
            deadline_s=now_s + decision.wait_s,
            started_s=now_s,
            patience_s=decision.patience_s,
            compute_s=decision.compute_s,
        )
        end = len(prefix.names)
        while end > prefix.num_device:
            start, source = self._run(job, prefix, end)
            piece = source and tiers.start_piece(prefix.names, start, end, source)
            while source and not piece and end - start > 1:  # slots are scarce: ask for less
                start = (start + end + 1) // 2
                piece = tiers.start_piece(prefix.names, start, end, source)
            if piece:
                job.pieces.append(piece)
            elif job.all_or_nothing:
                break
            end = start
        is_broken = end > prefix.num_device
        if is_broken or not job.pieces:
            for piece in job.pieces:
                tiers.give_up(piece)
            return False  # the caller gives the pages back
        seq.job = job
        return True

    def _run(self, job: LoadJob, prefix: Prefix, end: int) -> tuple[int, str | None]:
        """Where the piece that ends before block `end` starts, and where it comes from."""
        source = self._source(job, prefix, end - 1)
        assert self._tiers is not None
        most = self._tiers.piece_blocks(source) if source else 1
        start = end - 1
        lowest = max(prefix.num_device, end - most)
        while start > lowest and self._source(job, prefix, start - 1) == source:
            start -= 1
        return start, source

    def _source(self, job: LoadJob, prefix: Prefix, block: int) -> str | None:
        assert self._tiers is not None
        groups = [group for group, pages in enumerate(job.pages) if block in pages]
        if not groups:
            return DEVICE
        return self._tiers.source(prefix.names[block], groups)


def _last_position(seq: Sequence, names: list[BlockHash], num_tokens: int) -> int:
    """Tokens that blocks of `num_tokens` hold; the last one of a preempted sequence is partial."""
    if seq.parked is not None and names and names[-1:] == list(seq.parked.names[-1:]):
        return min(num_tokens, seq.parked.num_tokens)
    return num_tokens
