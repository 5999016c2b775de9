"""The default policy: an order by age and number of uses whose balance is learned from the traffic.

The key leaves whose age / uses**power is largest: one that was used u times waits u**power times
as long as one that was used once. Power 0 is LRU, a high one is LFU, and keys used once can be
made to leave earlier still, as behind a reuse gate. No balance is right for all sizes and
workloads, so shadow tiers try several on a sample of the traffic, and this policy follows those
that have had the most hits lately, and goes between them where chance could explain what sets them
apart. To change the balance moves nothing: all of them read the same queues.

Time is counted in references. A suffix leaves before its head because it is touched before it.
"""

from collections.abc import Sequence, Set

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.queues import MayLeave
from jaxserve.kv.policy.shadows import Shadows, is_trickle_shut
from jaxserve.kv.policy.use_classes import UseClasses, UseMemory, num_remembered


class Adaptive:
    """Keys by age and number of uses, in the balances that would have had the most hits lately.

    Args:
        capacity: most blocks that the tier holds. Beside the queues of the resident keys, takes
            up to 256 bytes per block and at least 2 MiB.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._resident = UseClasses()
        self._memory = UseMemory(num_remembered(capacity))
        self._shadows = Shadows(capacity)
        self._now = 0

    def admits(self, key: BlockHash) -> bool:
        self._now += 1
        num_uses, age = self._memory.get(key, self._now)
        self._memory.put(key, num_uses + 1, self._now)
        return len(self._resident) < self.capacity or self._shadows.mixture.lets_in(
            age / self.capacity, is_trickle_shut=is_trickle_shut(self._now, self.capacity)
        )

    def insert(self, key: BlockHash) -> None:
        num_uses, _ = self._memory.get(key, self._now)
        self._resident.put(key, max(1, num_uses), self._now)

    def touch(self, key: BlockHash) -> None:
        self._now += 1
        self._resident.use(key, self._now)

    def miss(self, key: BlockHash) -> None:
        pass

    def observe(self, keys: Sequence[BlockHash]) -> None:
        self._shadows.observe(keys)

    def victim(self, may_leave: MayLeave) -> BlockHash | None:
        return self._resident.first(self._shadows.mixture.weights, self._now, may_leave)

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        last_use = self._resident.last_use(key)
        num_uses = self._resident.pop(key)
        if evicted:
            self._memory.put(key, num_uses, last_use)

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        assert len(resident) <= self.capacity
        self._resident.check_integrity(resident)
        self._shadows.check_integrity()
