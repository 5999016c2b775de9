"""Whether a waiting sequence can start now, and starting it.

A sequence starts when the pages for all its known tokens are there, beyond what running prefills
still need and one more page for each running sequence. So a sequence that has just started is
rarely the next one to be preempted. If nothing runs, it always starts.
"""

import enum
import logging
from collections import Counter
from dataclasses import dataclass

from jaxserve.kv.tiers import DEVICE
from jaxserve.plan import SlotLoad
from jaxserve.scheduler.draft import StepDraft
from jaxserve.scheduler.prefix import Prefix, PrefixFinder
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import LoadDecision

logger = logging.getLogger(__name__)


class Outcome(enum.Enum):
    """STARTED; NO_ROOM: lacks a slot or pages; BEHIND: its blocks are about to be there."""

    STARTED = "started"
    NO_ROOM = "no_room"
    BEHIND = "behind"


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why trying again is useless: until more pages are free, fewer are needed by those who run, or
    more blocks can be found."""

    seq: Sequence
    required: tuple[int, ...]
    num_published: int
    num_running: int


class Admission:
    """Starts sequences.

    Args:
        roster: the sequences.
        finder: finds and loads cached prefixes.
        max_step_tokens: most tokens of one step.
    """

    def __init__(self, roster: Roster, finder: PrefixFinder, max_step_tokens: int):
        self._roster = roster
        self._finder = finder
        self._max_step_tokens = max_step_tokens
        self._refusal: _Refusal | None = None
        self.num_prefill_blocks = 0
        """Blocks of prefills that were published so far; the planner counts them."""
        self.queried_tokens = 0
        self.hit_tokens = Counter[str]()
        """By source."""

    def try_start(self, seq: Sequence, draft: StepDraft) -> Outcome:
        """Give the sequence a slot and the pages of its cached prefix, if it can start."""
        slots, pager = self._roster.slots, self._roster.pager
        if self._finder.is_looking(seq):  # first: nobody is preempted for one that has to wait
            return Outcome.BEHIND
        if not slots.num_free or self._is_still_refused(seq):
            return Outcome.NO_ROOM
        names = self._finder.candidates(seq)
        prefix = self._finder.find(seq, names)
        if len(prefix.names) < len(names) and names[len(prefix.names)] in draft.computing:
            return Outcome.BEHIND
        if prefix.decision is not None and self._finder.is_loading_for_others(prefix):
            return Outcome.BEHIND
        if self._finder.is_being_saved(seq, prefix):
            return Outcome.BEHIND
        before = [group.num_available for group in pager.index.groups]
        num_named = prefix.num_device
        if seq.parked is not None:
            num_named = min(num_named, len(seq.parked.names) - len(seq.parked.private))
        missing = pager.hold_prefix(seq, prefix.names, num_named, prefix.end_tokens)
        num_missing = [len(blocks) for blocks in missing]
        if not self._has_room(seq, before, num_missing):
            pager.release(seq)
            return Outcome.NO_ROOM
        self._refusal = None
        if any(missing):
            pages = pager.fill_prefix(seq, missing)
            if not self._finder.start(seq, prefix, pages):
                pager.release(seq)
                seq.loads_nothing = True
                return self.try_start(seq, draft)
            self._roster.loading[seq] = None
        num_ready = prefix.end_tokens
        if seq.job is not None:
            num_ready = prefix.num_device * pager.page_size
        if seq.num_cached < 0:
            seq.num_cached = 0
            self._note_decision(seq, prefix)
            if names:
                self.queried_tokens += len(seq.tokens)
        if names:
            self.hit_tokens[DEVICE] += seq.note_cached(DEVICE, 0, num_ready)
        if seq.job is None:
            self._roster.unpark(seq)
            seq.loads_nothing = False
        self._roster.enter(seq, num_ready)
        draft.loads.append(_slot_load(seq))
        return Outcome.STARTED

    def _note_decision(self, seq: Sequence, prefix: Prefix) -> None:
        """Count, log and remember what is done about blocks of lower tiers."""
        decision = prefix.decision
        if decision is None or not decision.num_blocks:
            return
        self._finder.planner.counts[decision.choice.value] += 1
        num_loaded = len(prefix.names) - prefix.num_device
        seq.decision = LoadDecision(
            decision.choice.value,
            decision.num_blocks,
            num_loaded,
            decision.load_s,
            decision.compute_s,
        )
        logger.debug(
            "%s: %s %d of %d blocks; loading %.4f s, computing %.4f s",
            seq.request.request_id,
            decision.choice.value,
            num_loaded,
            decision.num_blocks,
            decision.load_s,
            decision.compute_s,
        )

    def _is_still_refused(self, seq: Sequence) -> bool:
        refusal = self._refusal
        if refusal is None or refusal.seq is not seq or not self._roster.slots.num_used:
            return False
        if refusal.num_published != self.num_prefill_blocks:
            return False
        if self._roster.slots.num_used < refusal.num_running:
            return False
        groups = self._roster.pager.index.groups
        return any(
            group.num_available < required
            for group, required in zip(groups, refusal.required, strict=True)
        )

    def _has_room(self, seq: Sequence, available_before: list[int], num_missing: list[int]) -> bool:
        """Whether there are pages for what a sequence lacks and for what others will need.

        Args:
            available_before: pages per group before it took its prefix.
            num_missing: pages per group of its prefix that are not allocated yet.
        """
        roster = self._roster
        groups = roster.pager.index.groups
        if not roster.slots.num_used:
            return all(
                group.num_available >= pages
                for group, pages in zip(groups, num_missing, strict=True)
            )
        needed = roster.pager.missing_pages(seq, self._max_step_tokens)
        needed = [a + b for a, b in zip(needed, num_missing, strict=True)]
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
        self._refusal = _Refusal(seq, required, self.num_prefill_blocks, roster.slots.num_used)
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
