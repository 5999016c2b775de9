"""Plans one step: decodes first, then running prefills, then sequences that can start.

Changes the roster as if the step had run; the tokens follow later.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import numpy as np

from jaxserve.kv.loads import LoadJob, Piece
from jaxserve.kv.transfer_plan import NO_TRANSFERS, PieceLoad, TransferPlan
from jaxserve.plan import NO_STATES, NO_STEP, ConstrainedRow, PrefillChunk, StepPlan
from jaxserve.scheduler.admission import Admission, Outcome
from jaxserve.scheduler.buckets import BucketChooser
from jaxserve.scheduler.draft import Chunk, StepDraft
from jaxserve.scheduler.prefix import PrefixFinder
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequence import NO_SLOT, Sequence
from jaxserve.scheduler.states import states_wanted

NO_SLOTS = np.zeros(0, np.int32)

MAX_BEHIND = 8
"""Sequences that may be passed over in one step because another computes their prefix."""


class Planner:
    """Makes step plans.

    Args:
        roster: the sequences.
        chooser: finds the bucket of a step.
        finder: finds and loads cached prefixes.
        is_by_priority: a waiting sequence may preempt running ones of lower priority.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        roster: Roster,
        chooser: BucketChooser,
        finder: PrefixFinder,
        is_by_priority: bool,
        clock: Callable[[], float],
    ):
        self._roster = roster
        self._clock = clock
        self._chooser = chooser
        self._is_by_priority = is_by_priority
        self.admission = Admission(roster, finder, chooser.max_num_tokens)
        self.num_steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.recomputed_tokens = 0
        """Positions computed again because of a preemption."""

    def plan(self) -> StepPlan | None:
        """The next step; None if no sequence can do anything before more tokens are applied."""
        draft = StepDraft([[] for _ in self._roster.pager.index.groups])
        if self._roster.tiers is not None:
            self._roster.tiers.poll()
            for seq in list(self._roster.loading):
                self._take_loads(seq, draft)
        self._extend_decodes(draft)
        if self._roster.prefilling or self._may_start_waiting():
            draft.budget = self._chooser.max_num_tokens - self._roster.slots.decodable().size
            self._continue_prefills(draft)
            self._start_waiting(draft)
        return self._commit(draft)

    def _take_loads(self, seq: Sequence, draft: StepDraft) -> None:
        """Go on from behind what has arrived for a sequence."""
        slots, pager, tiers, job = (
            self._roster.slots,
            self._roster.pager,
            self._roster.tiers,
            seq.job,
        )
        assert tiers is not None and job is not None
        position = int(slots.positions[seq.slot])
        for piece in job.passed(position):
            tiers.give_up(piece)
        for piece in job.arrived():
            draft.piece_loads.append(_piece_load(job, piece, position // pager.page_size))
            tiers.written(piece)
        job.note_arrivals(self._clock())
        for piece in job.take(position):
            tiers.taken(piece)
            after = job.position_after(piece)
            self.admission.hit_tokens[piece.source] += seq.note_cached(
                piece.source, position, after
            )
            position = after
        slots.positions[seq.slot] = position
        if job.is_over(position):
            is_whole = position >= job.end_tokens
            self._roster.end_job(seq)
            if job.all_or_nothing and not is_whole:
                seq.loads_nothing = True
                self._roster.preempt(seq, draft)
                return
            self._roster.unpark(seq)
        elif job.all_or_nothing and self._clock() >= job.deadline_s:
            seq.loads_nothing = True
            self._roster.preempt(seq, draft)
            return
        num_before = seq.num_published
        pager.publish(seq, position)
        self.admission.num_prefill_blocks += seq.num_published - num_before

    def _may_start_waiting(self) -> bool:
        """A cheap test that spares the steps in which all slots are taken."""
        if not self._roster.waiting:
            return False
        return self._is_by_priority or self._roster.slots.num_free > 0

    def _extend_decodes(self, draft: StepDraft) -> None:
        """Move the windows and add the pages of decodes that need it, most important first."""
        slots, pager = self._roster.slots, self._roster.pager
        due = [seq for seq in map(slots.occupants.__getitem__, slots.due()) if seq is not None]
        for seq in due:
            pager.slide(seq, int(slots.positions[seq.slot]))
        for seq in sorted(due, key=lambda seq: seq.importance):
            if seq.slot == NO_SLOT:
                continue  # preempted for a more important one
            self._find_pages(seq, int(slots.positions[seq.slot]) + 1, draft)
            slots.attention_at[seq.slot] = pager.attention_at(seq)

    def _continue_prefills(self, draft: StepDraft) -> None:
        prefilling = sorted(self._roster.prefilling, key=lambda seq: seq.importance)
        for seq in prefilling:
            if draft.budget > 0 and seq.slot != NO_SLOT:
                is_last = seq is prefilling[-1] and not self._may_start_waiting()
                self._plan_chunk(seq, draft, is_last)

    def _start_waiting(self, draft: StepDraft) -> None:
        waiting = self._roster.waiting
        behind: list[Sequence] = []
        while draft.budget > 0 and len(behind) < MAX_BEHIND:
            seq = waiting.peek()
            if seq is None or seq.pending:
                break
            outcome = self.admission.try_start(seq, draft)
            if outcome is Outcome.NO_ROOM:
                victim = self._victim_for(seq)
                if victim is None:
                    break
                self._roster.preempt(victim, draft)
                continue
            waiting.pop()
            if outcome is Outcome.BEHIND:
                behind.append(seq)
            elif (
                not self._plan_chunk(seq, draft, not self._may_start_waiting()) and seq.job is None
            ):
                self._roster.preempt(seq, draft)
                break
        for seq in behind:
            waiting.push(seq)

    def _victim_for(self, seq: Sequence) -> Sequence | None:
        """Whom a waiting sequence may preempt: someone of lower priority, not just a later one."""
        if not self._is_by_priority or not self._roster.slots.num_used:
            return None
        victim = self._roster.least_important()
        return victim if victim.importance.priority > seq.importance.priority else None

    def _plan_chunk(self, seq: Sequence, draft: StepDraft, is_last: bool) -> bool:
        """Compute as much of the sequence as the budget and the pages allow; False: nothing.

        The last chunk of a step is cut so that the step fills its bucket well.
        """
        start = int(self._roster.slots.positions[seq.slot])
        end = min(len(seq.tokens), start + draft.budget)
        if seq.job is not None:
            limit = seq.job.compute_limit(start, self._clock())
            end = end if limit is None else min(end, limit)
            if end <= start:
                return False
        if is_last:
            num_before = self._chooser.max_num_tokens - draft.budget
            num_rows = self._roster.slots.decodable().size + len(draft.chunks) + 1
            fit = self._chooser.fit(num_before + end - start, num_rows) - num_before
            end = start + fit if fit > 0 else end
        end = self._find_pages(seq, end, draft, start + 1)
        if end <= start:
            return False
        draft.chunks.append(Chunk(seq, start, end))
        draft.budget -= end - start
        pager = self._roster.pager
        if pager.enable_prefix_caching:
            seq.hash_blocks(len(seq.tokens), pager.page_size)
            first, last = start // pager.page_size, -(-end // pager.page_size)
            draft.computing.update(seq.hashes[first:last])
        return True

    def _find_pages(
        self, seq: Sequence, num_tokens: int, draft: StepDraft, at_least: int | None = None
    ) -> int:
        """Add pages for `num_tokens` tokens; return how many have some.

        Less important sequences are preempted until there are pages for `at_least` tokens.
        """
        at_least = num_tokens if at_least is None else at_least
        covered = self._roster.pager.grow(seq, num_tokens, draft.new_entries)
        while covered < at_least:
            victim = self._roster.least_important()
            if victim is seq:
                break  # wait for the pages of the more important ones; they come first
            self._roster.preempt(victim, draft)
            covered = self._roster.pager.grow(seq, num_tokens, draft.new_entries)
        return covered

    def _commit(self, draft: StepDraft) -> StepPlan | None:
        slots, chunks = self._roster.slots, draft.chunks
        transfers = self._transfers(draft)
        decode_slots = slots.decodable()
        if not decode_slots.size and not chunks:
            assert not any(draft.new_entries)
            return self._transfer_only(draft, transfers)
        decode_positions = slots.positions[decode_slots]
        num_decodes, num_prefill_tokens = decode_slots.size, sum(c.end - c.start for c in chunks)
        wants_logprobs = bool(slots.wants_logprobs[decode_slots].any()) or any(
            slots.wants_logprobs[chunk.seq.slot] and chunk.end == len(chunk.seq.tokens)
            for chunk in chunks
        )
        row_seqs = (
            *map(slots.occupants.__getitem__, decode_slots.tolist()),
            *(chunk.seq for chunk in chunks),
        )
        states = NO_STATES
        if slots.wants_states.any():
            states = states_wanted(seq.states for seq in row_seqs if seq and seq.states)
        prefills = tuple(_prefill(chunk) for chunk in chunks)
        constrained: tuple[ConstrainedRow, ...] = ()
        if slots.constrained.any():
            constrained = tuple(_constrained(row_seqs, decode_positions, prefills))
        slots.positions[decode_slots] += 1
        for chunk in chunks:
            self._commit_chunk(chunk)
        self.num_steps += 1
        self.decode_tokens += num_decodes
        self.prefill_tokens += num_prefill_tokens
        return StepPlan(
            step_id=self.num_steps,
            bucket=self._chooser.choose(
                num_decodes + num_prefill_tokens, len(row_seqs), is_decode=not chunks
            ),
            slot_loads=tuple(draft.loads),
            decode_slots=decode_slots,
            decode_positions=decode_positions,
            prefills=prefills,
            page_updates=draft.page_updates(),
            wants_logprobs=wants_logprobs,
            wants_prompt_logprobs=any(chunk.targets is not None for chunk in prefills),
            transfers=transfers,
            states=states,
            constrained=constrained,
            row_seqs=row_seqs,
        )

    def _transfers(self, draft: StepDraft) -> TransferPlan:
        """What moves before the step. Blocks that this step writes are not saved yet."""
        tiers, groups = self._roster.tiers, self._roster.pager.index.groups
        if tiers is None:
            return NO_TRANSFERS
        saves = tiers.collect_saves(lambda group, page: groups[group].hash_of(page))
        return TransferPlan(tuple(draft.piece_loads), saves)

    def _transfer_only(self, draft: StepDraft, transfers: TransferPlan) -> StepPlan | None:
        """A plan without rows, if there is anything to move or a slot to fill."""
        if not (transfers.loads or transfers.saves or draft.loads):
            return None
        self.num_steps += 1
        return StepPlan(
            step_id=self.num_steps,
            bucket=NO_STEP,
            slot_loads=tuple(draft.loads),
            decode_slots=NO_SLOTS,
            decode_positions=NO_SLOTS,
            prefills=(),
            page_updates=draft.page_updates(),
            transfers=transfers,
        )

    def _commit_chunk(self, chunk: Chunk) -> None:
        """Note that a chunk will have run. Only now may pages behind its window be reused."""
        slots, pager, seq = self._roster.slots, self._roster.pager, chunk.seq
        slots.positions[seq.slot] = chunk.end
        self.recomputed_tokens += max(0, min(chunk.end, seq.high_water) - chunk.start)
        num_before = seq.num_published
        pager.publish(seq, chunk.end)
        self.admission.num_prefill_blocks += seq.num_published - num_before
        pager.slide(seq, chunk.end)
        if chunk.end == len(seq.tokens):
            self._roster.end_job(seq)
            self._roster.unpark(seq)
            del self._roster.prefilling[seq]
            slots.decoding[seq.slot] = True
            slots.attention_at[seq.slot] = pager.attention_at(seq)


def _piece_load(job: LoadJob, piece: Piece, first: int) -> PieceLoad:
    """Which page gets which block of a piece; blocks before `first` are not written."""
    blocks = range(piece.start, piece.end)
    return PieceLoad(
        piece.piece_id,
        tuple(
            np.array([pages.get(block, -1) if block >= first else -1 for block in blocks], np.int32)
            for pages in job.pages
        ),
    )


def _constrained(
    row_seqs: Seq[Sequence | None], decode_positions: np.ndarray, prefills: Seq[PrefillChunk]
) -> Iterator[ConstrainedRow]:
    """The rows that yield a token which must obey a grammar."""
    num_decodes = len(decode_positions)
    for row, seq in enumerate(row_seqs):
        if seq is None or seq.constraint is None:
            continue
        if row < num_decodes:
            yield ConstrainedRow(row, seq.slot, int(decode_positions[row]) + 1, seq.constraint)
        elif (chunk := prefills[row - num_decodes]).samples:
            yield ConstrainedRow(row, seq.slot, chunk.end, seq.constraint)


def _prefill(chunk: Chunk) -> PrefillChunk:
    seq, start, end = chunk
    targets = None
    if seq.prompt_logprobs is not None:
        targets = np.full(end - start, -1, np.int32)
        following = seq.token_ids(start + 1, min(end + 1, seq.num_prompt))
        targets[: len(following)] = following
    return PrefillChunk(
        slot=seq.slot,
        start=start,
        end=end,
        token_ids=seq.token_ids(start, end),
        samples=end == len(seq.tokens),
        targets=targets,
    )
