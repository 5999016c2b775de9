"""A step while it is being planned: what can still be taken back when a sequence is preempted."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.transfer_plan import PieceLoad
from jaxserve.plan import PageUpdates, SlotLoad
from jaxserve.scheduler.pager import PageEntry
from jaxserve.scheduler.sequence import Sequence

_NONE = np.zeros(0, np.int32)
_NO_UPDATES = PageUpdates(_NONE, _NONE, _NONE)


class Chunk(NamedTuple):
    """Positions [start, end) of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    end: int


@dataclass(slots=True)
class StepDraft:
    """Collects one step.

    Attributes:
        new_entries: per group, new entries of the page table.
        budget: tokens that the step can still take.
        loads: slots that get a new sequence.
        chunks: prefills of the step.
        computing: names of the blocks that the chunks write, wholly or in part.
        piece_loads: pieces that are written into pages before the step.
    """

    new_entries: list[list[PageEntry]]
    budget: int = 0
    loads: list[SlotLoad] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    computing: set[BlockHash] = field(default_factory=set)
    piece_loads: list[PieceLoad] = field(default_factory=list)

    def drop(self, slot: int) -> None:
        """Take back everything planned for a slot."""
        for entries in self.new_entries:
            if any(entry.slot == slot for entry in entries):
                entries[:] = [entry for entry in entries if entry.slot != slot]
        self.loads = [load for load in self.loads if load.slot != slot]
        dropped = [chunk for chunk in self.chunks if chunk.seq.slot == slot]
        for chunk in dropped:
            self.chunks.remove(chunk)
            self.budget += chunk.end - chunk.start

    def page_updates(self) -> tuple[PageUpdates, ...]:
        """The new entries, as arrays."""
        return tuple(
            PageUpdates(*np.array(entries, np.int32).T) if entries else _NO_UPDATES
            for entries in self.new_entries
        )
