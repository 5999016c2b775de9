"""Sequences that wait for admission, most important first.

Every operation is O(log n), amortised. A sequence that ends while it waits leaves a dead entry
behind, which is dropped when it comes to the front or when dead entries are in the majority.
"""

import heapq

from jaxserve.scheduler.sequence import Importance, Sequence


class WaitingQueue:
    """A heap of live sequences, by importance."""

    def __init__(self) -> None:
        self._heap: list[tuple[Importance, Sequence]] = []
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dead

    def push(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (seq.importance, seq))

    def peek(self) -> Sequence | None:
        """The most important live sequence."""
        while self._heap:
            seq = self._heap[0][1]
            if not seq.finished:
                return seq
            heapq.heappop(self._heap)
            self._num_dead -= 1
        return None

    def pop(self) -> Sequence:
        """Take out what `peek` returned."""
        seq = self.peek()
        assert seq is not None, "nothing waits"
        heapq.heappop(self._heap)
        return seq

    def note_finished(self) -> None:
        """One of the sequences in the queue has just been marked finished."""
        self._num_dead += 1
        if 2 * self._num_dead > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].finished]
            heapq.heapify(self._heap)
            self._num_dead = 0

    def live(self) -> list[Sequence]:
        """All live sequences, in no particular order."""
        return [seq for _, seq in self._heap if not seq.finished]
