"""Who is live, who runs and who waits, and the ways from one to the other.

Holds the parts that planning and applying share; decides nothing.
"""

import time
from collections.abc import Callable
from itertools import count

from blake3 import blake3

from jaxserve.kv.index import KVIndex
from jaxserve.kv.tiers import Tiers
from jaxserve.scheduler.draft import StepDraft
from jaxserve.scheduler.pager import Pager
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.sequence import NO_SLOT, Parked, Sequence
from jaxserve.scheduler.slots import Slots

PRIVATE_CONTEXT = "jaxserve kv private block name v1"


class Roster:
    """All live sequences. Each is in a slot or in the waiting queue.

    Args:
        num_slots: most sequences that run at once.
        index: the pages of all groups.
        enable_prefix_caching: name blocks and look for them.
        tiers: what is below the device; None: nothing.
        clock: seconds, never going back; the one of the requests' arrival.
    """

    def __init__(
        self,
        num_slots: int,
        index: KVIndex,
        enable_prefix_caching: bool,
        tiers: Tiers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.tiers = tiers
        self._clock = clock
        self.loading: dict[Sequence, None] = {}
        self._private_names = (
            blake3(serial.to_bytes(8, "little"), derive_key_context=PRIVATE_CONTEXT).digest()
            for serial in count()
        )
        self.slots = Slots(num_slots)
        self.pager = Pager(index, enable_prefix_caching)
        if tiers is not None:
            self.pager.label = tiers.label
        self.waiting = WaitingQueue()
        self.prefilling: dict[Sequence, None] = {}
        self.live: dict[str, Sequence] = {}
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.live[seq.request.request_id] = seq
        self.waiting.push(seq)

    def enter(self, seq: Sequence, position: int) -> None:
        """Let a sequence run, from `position` on."""
        self.slots.enter(seq, position)
        self.prefilling[seq] = None
        if seq.queued_s < 0:
            seq.queued_s = max(0.0, self._clock() - seq.request.arrival_s)

    def least_important(self) -> Sequence:
        """The running sequence that is the first to be preempted."""
        return max(self.slots.running(), key=lambda seq: seq.importance)

    def preempt(self, seq: Sequence, draft: StepDraft) -> None:
        """Put a running sequence back into the queue.

        What it computed stays findable under its names, on the device until the pages are reused
        and then on the host, tail first. A token that it has in flight will be appended while it
        waits.
        """
        position = int(self.slots.positions[seq.slot])
        draft.drop(seq.slot)
        seq.pending = max(0, position + 1 - len(seq.tokens))
        if seq.job is None or not seq.job.all_or_nothing:  # else it has only waited
            seq.high_water = max(seq.high_water, position)
        seq.accounted = max(seq.accounted, position)
        self.publish(seq)
        if seq.parked is None:
            self._park(seq, position)
        self._leave(seq)
        self.waiting.push(seq)
        self.num_preemptions += 1

    def _park(self, seq: Sequence, position: int) -> None:
        num_blocks, num_named = -(-position // self.pager.page_size), seq.num_published
        private = tuple(next(self._private_names) for _ in range(max(0, num_blocks - num_named)))
        names = (*seq.hashes[: min(num_named, num_blocks)], *private)
        seq.parked = Parked(position, names, private)
        if self.tiers is not None:
            self.tiers.park(names, private)
        self.pager.name_privately(seq, seq.parked)

    def unpark(self, seq: Sequence) -> None:
        """The blocks that a sequence left behind are back, or needed no more."""
        if seq.parked is None:
            return
        self.pager.forget_private(seq.parked)
        if self.tiers is not None:
            self.tiers.unpark(seq.parked.names, seq.parked.private)
        seq.parked = None

    def end_job(self, seq: Sequence) -> None:
        """Nothing more is loaded for a sequence."""
        job, seq.job = seq.job, None
        self.loading.pop(seq, None)
        if job is not None and self.tiers is not None:
            for piece in job.pieces:
                self.tiers.give_up(piece)

    def finish(self, seq: Sequence) -> None:
        """End a sequence; everything it held is free at once."""
        seq.finished = True
        del self.live[seq.request.request_id]
        if seq.slot == NO_SLOT:
            self.waiting.note_finished()
        else:
            self.publish(seq)
            self._leave(seq)
        self.unpark(seq)

    def publish(self, seq: Sequence) -> None:
        """Let lookups find the blocks of a running sequence that are known and planned."""
        planned = int(self.slots.positions[seq.slot])
        self.pager.publish(seq, min(len(seq.tokens), planned))

    def _leave(self, seq: Sequence) -> None:
        self.end_job(seq)
        self.pager.release(seq)
        self.prefilling.pop(seq, None)
        self.slots.leave(seq)

    def check_integrity(self) -> None:
        """AssertionError if a sequence is nowhere or in two places, or pages do not add up."""
        self.slots.check_integrity()
        running, waiting = self.slots.running(), self.waiting.live()
        assert len(waiting) == len(self.waiting), "the queue miscounts its live sequences"
        names = [seq.request.request_id for seq in (*running, *waiting)]
        assert sorted(names) == sorted(self.live), f"live {sorted(self.live)}, placed {names}"
        assert set(self.prefilling) == {seq for seq in running if not self.slots.decoding[seq.slot]}
        jobs = {seq for seq in running if seq.job is not None}
        assert jobs == set(self.loading), "the sequences that load are not those with a job"
        assert not any(seq.job for seq in waiting), "a waiting sequence loads"
        if self.tiers is not None:
            self.tiers.check_integrity()
        for seq in running:
            planned = int(self.slots.positions[seq.slot])
            covered = seq.num_page_entries * self.pager.page_size
            assert planned <= covered, (
                f"{seq.request.request_id}: {planned} planned, pages for {covered}"
            )
        self.pager.check_integrity(running, waiting)
