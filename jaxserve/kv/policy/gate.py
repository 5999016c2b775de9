"""A reuse gate: a block is stored when it is offered for the Nth time; before that it is counted.

Saves writes where they wear something out or cost money. It costs the first hit of each block, so
a tier that could hold a block until its second use loses by it.
"""

from collections import OrderedDict
from collections.abc import Sequence, Set

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.base import Policy
from jaxserve.kv.policy.queues import MayLeave, trim


class ReuseGate:
    """Any policy behind a count of offers.

    Args:
        policy: orders what was let in.
        store_threshold: the offer that lets a block in, counted from 1.
        num_tracked: blocks whose offers are remembered, those offered last.
    """

    def __init__(self, policy: Policy, store_threshold: int = 2, num_tracked: int = 64_000):
        self.capacity = policy.capacity
        self._policy = policy
        self._threshold = store_threshold
        self._num_tracked = num_tracked
        self._num_offers: OrderedDict[BlockHash, int] = OrderedDict()

    def admits(self, key: BlockHash) -> bool:
        num_offers = min(self._num_offers.pop(key, 0) + 1, self._threshold)
        self._num_offers[key] = num_offers
        trim(self._num_offers, self._num_tracked)
        return num_offers >= self._threshold and self._policy.admits(key)

    def insert(self, key: BlockHash) -> None:
        self._policy.insert(key)

    def touch(self, key: BlockHash) -> None:
        self._policy.touch(key)

    def miss(self, key: BlockHash) -> None:
        self._policy.miss(key)

    def observe(self, keys: Sequence[BlockHash]) -> None:
        self._policy.observe(keys)

    def victim(self, may_leave: MayLeave) -> BlockHash | None:
        return self._policy.victim(may_leave)

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        self._policy.remove(key, evicted=evicted)

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        assert len(self._num_offers) <= self._num_tracked
        self._policy.check_integrity(resident)
