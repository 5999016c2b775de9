"""Least recently used leaves first: the choice of a tier that is large for its workload.

One one-shot prompt as large as the tier pushes everything else out.
"""

from collections.abc import Sequence, Set

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.queues import Keys, MayLeave, first_that_may_leave


class LRU:
    """Keys by recency of use.

    Args:
        capacity: most blocks that the tier holds.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._keys: Keys = Keys()

    def admits(self, key: BlockHash) -> bool:
        return True

    def insert(self, key: BlockHash) -> None:
        self._keys[key] = None

    def touch(self, key: BlockHash) -> None:
        self._keys.move_to_end(key)

    def miss(self, key: BlockHash) -> None:
        pass

    def observe(self, keys: Sequence[BlockHash]) -> None:
        pass

    def victim(self, may_leave: MayLeave) -> BlockHash | None:
        return first_that_may_leave(self._keys, may_leave)

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        del self._keys[key]

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        assert self._keys.keys() == resident
        assert len(self._keys) <= self.capacity
