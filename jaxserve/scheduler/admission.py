"""Whether a waiting sequence can start now, and starting it.

A sequence starts when the pages for all its known tokens are there, beyond what running prefills
still need and one more page for each running sequence. So a sequence that has just started is
rarely the next one to be preempted. If nothing runs, it always starts.
"""

import enum
from dataclasses import dataclass

from jaxserve.plan import SlotLoad
from jaxserve.scheduler.draft import StepDraft
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequence import Sequence


class Outcome(enum.Enum):
    """STARTED; NO_ROOM: lacks a slot or pages; BEHIND: its next block is being computed."""

    STARTED = "started"
    NO_ROOM = "no_room"
    BEHIND = "behind"


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why trying again is useless: until more pages are free, or more blocks can be found."""

    seq: Sequence
    required: tuple[int, ...]
    num_published: int


class Admission:
    """Starts sequences.

    Args:
        roster: the sequences.
        max_step_tokens: most tokens of one step.
    """

    def __init__(self, roster: Roster, max_step_tokens: int):
        self._roster = roster
        self._max_step_tokens = max_step_tokens
        self._refusal: _Refusal | None = None
        self.num_prefill_blocks = 0
        """Blocks of prefills that were published so far; the planner counts them."""
        self.queried_tokens = 0
        self.hit_tokens = 0

    def try_start(self, seq: Sequence, draft: StepDraft) -> Outcome:
        """Give the sequence a slot and the pages of its cached prefix, if it can start."""
        slots, pager = self._roster.slots, self._roster.pager
        if not slots.num_free or self._is_still_refused(seq):
            return Outcome.NO_ROOM
        uses_cache = pager.enable_prefix_caching and seq.prompt_logprobs is None
        num_blocks = 0
        if uses_cache:
            # The last known token is always computed: it yields the next one.
            num_hashes = seq.hash_blocks(len(seq.tokens) - 1, pager.page_size)
            hashes = seq.hashes[:num_hashes]
            num_blocks = pager.index.longest_prefix(hashes)
            if num_blocks < len(hashes) and hashes[num_blocks] in draft.computing:
                return Outcome.BEHIND
        before = [group.num_available for group in pager.index.groups]
        pager.take_prefix(seq, num_blocks)
        if slots.num_used and not self._has_room(seq, before):
            pager.release(seq)
            return Outcome.NO_ROOM
        self._refusal = None
        num_cached = num_blocks * pager.page_size
        if seq.num_cached < 0:
            seq.num_cached = num_cached
            if uses_cache:
                self.queried_tokens += len(seq.tokens)
                self.hit_tokens += num_cached
        self._roster.enter(seq, num_cached)
        draft.loads.append(_slot_load(seq))
        return Outcome.STARTED

    def _is_still_refused(self, seq: Sequence) -> bool:
        refusal = self._refusal
        if refusal is None or refusal.seq is not seq or not self._roster.slots.num_used:
            return False
        if refusal.num_published != self.num_prefill_blocks:
            return False
        groups = self._roster.pager.index.groups
        return any(
            group.num_available < required
            for group, required in zip(groups, refusal.required, strict=True)
        )

    def _has_room(self, seq: Sequence, available_before: list[int]) -> bool:
        roster = self._roster
        groups = roster.pager.index.groups
        needed = roster.pager.missing_pages(seq, self._max_step_tokens)
        for running in roster.prefilling:
            outstanding = roster.pager.missing_pages(running, self._max_step_tokens)
            needed = [a + b for a, b in zip(needed, outstanding, strict=True)]
        needed = [pages + roster.slots.num_used for pages in needed]
        if all(group.num_available >= pages for group, pages in zip(groups, needed, strict=True)):
            return True
        required = tuple(
            pages + before - group.num_available
            for pages, before, group in zip(needed, available_before, groups, strict=True)
        )
        self._refusal = _Refusal(seq, required, self.num_prefill_blocks)
        return False


def _slot_load(seq: Sequence) -> SlotLoad:
    return SlotLoad(
        slot=seq.slot,
        page_rows=seq.page_rows(),
        token_ids=seq.token_ids(0, len(seq.tokens)),
        num_prompt_tokens=seq.num_prompt,
        sampling=seq.request.sampling,
        stop_token_ids=tuple(sorted(seq.stop_ids)),
    )
