"""What the scheduler keeps per slot, as arrays: steady decoding is a few vector operations.

A slot's `position` is the next position to compute: all before it have been planned. In steady
decoding only `positions` moves, and Python looks at a sequence when its position reaches
`attention_at` (a page to be added or to be given back) or `ends_at` (no further step).
"""

import numpy as np
from jaxtyping import Int32

from jaxserve.scheduler.sequence import NO_SLOT, Sequence


class Slots:
    """The places of running sequences.

    Args:
        num_slots: most sequences that run at once.
    """

    def __init__(self, num_slots: int):
        self.positions = np.zeros(num_slots, np.int32)
        self.attention_at = np.zeros(num_slots, np.int32)
        self.ends_at = np.zeros(num_slots, np.int32)
        self.decoding = np.zeros(num_slots, np.bool_)
        self.wants_logprobs = np.zeros(num_slots, np.bool_)
        self.wants_states = np.zeros(num_slots, np.bool_)
        self.constrained = np.zeros(num_slots, np.bool_)
        self.occupants: list[Sequence | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self.occupants) - len(self._free)

    def running(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return [seq for seq in self.occupants if seq is not None]

    def enter(self, seq: Sequence, position: int) -> None:
        """Give a sequence a slot; its next position to compute is `position`."""
        slot = self._free.pop()
        self.positions[slot] = position
        # The row at position p yields token p + 1, so the last useful row is at max_total - 2.
        self.ends_at[slot] = seq.max_total - 1
        self.decoding[slot] = False
        self.wants_logprobs[slot] = seq.request.sampling.logprobs is not None
        self.wants_states[slot] = seq.states is not None
        self.constrained[slot] = seq.constraint is not None
        self.occupants[slot] = seq
        seq.slot = slot

    def leave(self, seq: Sequence) -> None:
        """Take the sequence's slot away."""
        assert self.occupants[seq.slot] is seq
        self.occupants[seq.slot] = None
        self.decoding[seq.slot] = False
        self.wants_logprobs[seq.slot] = False
        self.wants_states[seq.slot] = False
        self.constrained[seq.slot] = False
        self._free.append(seq.slot)
        seq.slot = NO_SLOT

    def decodable(self) -> Int32[np.ndarray, " decodes"]:
        """Slots that can take a decode row now, in increasing order."""
        may_run = self.decoding & (self.positions < self.ends_at)
        may_run &= self.positions < self.attention_at
        return may_run.nonzero()[0].astype(np.int32)

    def due(self) -> list[int]:
        """Slots that can take a decode row once their pages are seen to."""
        is_due = self.decoding & (self.positions >= self.attention_at)
        is_due &= self.positions < self.ends_at
        return is_due.nonzero()[0].tolist()

    def check_integrity(self) -> None:
        """AssertionError if slots and occupants do not match."""
        used = [slot for slot, seq in enumerate(self.occupants) if seq is not None]
        assert sorted([*used, *self._free]) == list(range(len(self.occupants))), (
            f"slots in use {used}, free {sorted(self._free)}"
        )
        for slot, seq in enumerate(self.occupants):
            assert seq is None or seq.slot == slot, f"the sequence in slot {slot} has {seq.slot}"
            assert seq is not None or not self.decoding[slot], f"empty slot {slot} decodes"
