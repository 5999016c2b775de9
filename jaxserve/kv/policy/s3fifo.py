"""S3-FIFO (Yang et al., SOSP 2023): a small first queue filters what is used only once.

New keys enter the small queue. What was used again by the time it reaches the end moves to the
main queue, the rest leaves and is remembered as a ghost; an offered ghost enters the main queue.
A key at the end of the main queue goes around again as often as it was used, at most three times.
"""

from collections import OrderedDict
from collections.abc import Sequence, Set

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.queues import Keys, MayLeave, trim

MOST_USES = 3


class S3FIFO:
    """Two queues by age, with a count of uses beside each key.

    Args:
        capacity: most blocks that the tier holds; as many ghosts are remembered.
        small: share of the capacity beyond which the small queue gives up keys first.
    """

    def __init__(self, capacity: int, small: float = 0.1):
        self.capacity = capacity
        self._small_size = max(1, int(capacity * small))
        self._small: OrderedDict[BlockHash, int] = OrderedDict()
        self._main: OrderedDict[BlockHash, int] = OrderedDict()
        self._ghosts: Keys = Keys()

    def admits(self, key: BlockHash) -> bool:
        return True

    def insert(self, key: BlockHash) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: BlockHash) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(MOST_USES, queue[key] + 1)

    def miss(self, key: BlockHash) -> None:
        pass

    def observe(self, keys: Sequence[BlockHash]) -> None:
        pass

    def victim(self, may_leave: MayLeave) -> BlockHash | None:
        if len(self._small) >= self._small_size or not self._main:
            key = self._from_small(may_leave)
            return self._from_main(may_leave) if key is None else key
        key = self._from_main(may_leave)
        return self._from_small(may_leave) if key is None else key

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        if key not in self._small:
            del self._main[key]
            return
        del self._small[key]
        if evicted:
            self._ghosts[key] = None
            trim(self._ghosts, self.capacity)

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        assert self._small.keys() | self._main.keys() == resident
        assert not self._small.keys() & self._main.keys()
        assert not self._ghosts.keys() & resident
        assert len(resident) <= self.capacity and len(self._ghosts) <= self.capacity

    def _from_small(self, may_leave: MayLeave) -> BlockHash | None:
        for _ in range(len(self._small)):
            key = next(iter(self._small))
            if not may_leave(key):
                self._small.move_to_end(key)
            elif self._small[key] > 1:
                del self._small[key]
                self._main[key] = 0
            else:
                return key
        return None

    def _from_main(self, may_leave: MayLeave) -> BlockHash | None:
        for _ in range((MOST_USES + 1) * len(self._main)):
            key = next(iter(self._main))
            if may_leave(key):
                if self._main[key] == 0:
                    return key
                self._main[key] -= 1
            self._main.move_to_end(key)
        return None
