"""W-TinyLFU (Einziger et al., TOS 2017): a new key stays if it was seen more often than the one
that would have to leave.

New keys enter a small window by recency. The key that leaves the window competes with the victim
of the main part, which is a segmented LRU (probation, then protected). Counts come from a sketch
that halves itself, so that old fame fades.
"""

from collections.abc import Sequence, Set

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.queues import Keys, MayLeave, first_that_may_leave
from jaxserve.kv.policy.sketch import FrequencySketch


class TinyLFU:
    """A window and a segmented LRU with a contest between them.

    Args:
        capacity: most blocks that the tier holds.
        window: share of the capacity that new keys have for themselves.
        protected: share of the rest for keys that were used while in the main part.
    """

    def __init__(self, capacity: int, window: float = 0.01, protected: float = 0.8):
        self.capacity = capacity
        self._window_size = max(1, int(capacity * window))
        self._main_size = max(0, capacity - self._window_size)
        self._protected_size = int(self._main_size * protected)
        self._window: Keys = Keys()
        self._probation: Keys = Keys()
        self._protected: Keys = Keys()
        self._sketch = FrequencySketch(capacity)

    def admits(self, key: BlockHash) -> bool:
        self._sketch.see(key)
        return True

    def insert(self, key: BlockHash) -> None:
        self._window[key] = None
        while len(self._window) > self._window_size and self._num_main < self._main_size:
            self._probation[self._window.popitem(last=False)[0]] = None

    def touch(self, key: BlockHash) -> None:
        self._sketch.see(key)
        if key in self._window:
            self._window.move_to_end(key)
        elif key in self._protected:
            self._protected.move_to_end(key)
        else:
            del self._probation[key]
            self._protected[key] = None
            while len(self._protected) > self._protected_size:
                self._probation[self._protected.popitem(last=False)[0]] = None

    def miss(self, key: BlockHash) -> None:
        pass

    def observe(self, keys: Sequence[BlockHash]) -> None:
        pass

    def victim(self, may_leave: MayLeave) -> BlockHash | None:
        old = first_that_may_leave(self._probation, may_leave)
        if old is None:
            old = first_that_may_leave(self._protected, may_leave)
        if old is not None and len(self._window) < self._window_size:
            return old
        new = first_that_may_leave(self._window, may_leave)
        if old is None or new is None:
            return old if new is None else new
        if self._sketch.count(new) <= self._sketch.count(old):
            return new
        del self._window[new]
        self._probation[new] = None
        return old

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        for queue in (self._window, self._probation, self._protected):
            queue.pop(key, None)

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        queues = (self._window, self._probation, self._protected)
        assert set().union(*queues) == resident
        assert sum(map(len, queues)) == len(resident) <= self.capacity
        assert len(self._protected) <= self._protected_size

    @property
    def _num_main(self) -> int:
        return len(self._probation) + len(self._protected)
