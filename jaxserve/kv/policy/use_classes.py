"""Keys in classes by how often they were used; in each class the one used longest ago comes first.

The key that leaves is the one with the largest age times the weight of its class, so that finding
it means looking at one key per class: O(1), whatever the weights, and they may change at any time.
"""

import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence, Set
from typing import NamedTuple

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.queues import MayLeave, first_that_may_leave

NUM_CLASSES = 14
"""1, 2, 3, 4-5, 6-7, 8-11, 12-15, ... 128-191, 192 and more uses."""

MOST_USES = 255


LAST_TIME = (1 << 32) - 1
"""The memory keeps the lower 32 bits of a time: an age is right below 4 billion references."""

MEMORY_PER_BLOCK, MIN_MEMORY = 4, 1 << 15


def num_remembered(capacity: int) -> int:
    """Keys whose uses are remembered for a tier of this capacity."""
    return max(MIN_MEMORY, MEMORY_PER_BLOCK * capacity)


def class_of(num_uses: int) -> int:
    if num_uses < 4:
        return num_uses - 1
    octave = num_uses.bit_length() - 1
    return min(NUM_CLASSES - 1, 2 * octave - 1 + (num_uses >> (octave - 1) & 1))


def typical_uses(class_index: int) -> float:
    """The middle of a class."""
    if class_index < 3:
        return class_index + 1.0
    octave, half = divmod(class_index + 1, 2)
    return (2 + half + 0.5) * 2.0 ** (octave - 1) - 0.5


class UseClasses:
    """Resident keys, each with its number of uses and the time of the last one."""

    def __init__(self) -> None:
        self._queues: list[OrderedDict[BlockHash, int]] = [
            OrderedDict() for _ in range(NUM_CLASSES)
        ]
        self._num_uses: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return len(self._num_uses)

    def __contains__(self, key: BlockHash) -> bool:
        return key in self._num_uses

    def put(self, key: BlockHash, num_uses: int, now: int) -> None:
        """Add a key that is not here."""
        num_uses = min(num_uses, MOST_USES)
        self._num_uses[key] = num_uses
        self._queues[class_of(num_uses)][key] = now

    def use(self, key: BlockHash, now: int) -> int:
        """Count a use; returns how many there were."""
        num_uses = self.pop(key) + 1
        self.put(key, num_uses, now)
        return num_uses

    def pop(self, key: BlockHash) -> int:
        """Take a key out; returns its number of uses."""
        num_uses = self._num_uses.pop(key)
        del self._queues[class_of(num_uses)][key]
        return num_uses

    def last_use(self, key: BlockHash) -> int:
        """When a key that is here was used last."""
        return self._queues[class_of(self._num_uses[key])][key]

    def first(
        self, weights: Sequence[float], now: int, may_leave: MayLeave | None = None
    ) -> BlockHash | None:
        """The key with the largest weighted age among those that may leave, or among all."""
        chosen, largest = None, -1.0
        for queue, weight in zip(self._queues, weights, strict=True):
            if queue:
                key = first_that_may_leave(queue, may_leave) if may_leave else next(iter(queue))
                if key is not None and (now - queue[key]) * weight > largest:
                    chosen, largest = key, (now - queue[key]) * weight
        return chosen

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        assert self._num_uses.keys() == resident
        assert sum(map(len, self._queues)) == len(self._num_uses)
        for key, num_uses in self._num_uses.items():
            assert key in self._queues[class_of(num_uses)]


class PastUses(NamedTuple):
    """How often a key was used, and how many references ago last: 0 and infinite if not known."""

    num_uses: int
    age: float


class UseMemory:
    """Uses of keys, resident or not: at least of the last `num_keys` that were put in.

    Two tables without chains, a young one that takes what is put in and an old one. A full young
    table becomes the old one, so that keys are forgotten in the order of their last use; forgetting
    at random would tear holes into prefixes. A key that was not put in is taken for one that was
    about once in 10 million look-ups.

    Args:
        num_keys: takes 32 to 64 bytes each.
    """

    def __init__(self, num_keys: int):
        self._num_keys = num_keys
        self._size = 1 << (2 * num_keys - 1).bit_length()
        self._young = self._blank()
        self._old = self._blank()
        self._num_young = 0

    def put(self, key: BlockHash, num_uses: int, now: int) -> None:
        """Take a key that has been used so often, last at this time."""
        if self._num_young >= self._num_keys:
            self._old, self._young, self._num_young = self._young, self._blank(), 0
        tag, place = self._find(self._young, key)
        self._num_young += not self._young[place]
        self._young[place] = tag << 40 | (now & LAST_TIME) << 8 | min(num_uses, MOST_USES)

    def get(self, key: BlockHash, now: int) -> PastUses:
        """What is remembered of a key at this time."""
        _, place = self._find(self._young, key)
        entry = self._young[place]
        if not entry:
            _, place = self._find(self._old, key)
            entry = self._old[place]
        if not entry:
            return PastUses(0, math.inf)
        return PastUses(entry & 0xFF, now - (entry >> 8) & LAST_TIME)

    def _blank(self) -> "array[int]":
        return array("Q", bytes(8 * self._size))

    def _find(self, table: "array[int]", key: BlockHash) -> tuple[int, int]:
        """The key's tag, and its place or the free one where it belongs."""
        tag = int.from_bytes(key[8:11], "little")
        place = int.from_bytes(key[4:8], "little") & (self._size - 1)
        while (entry := table[place]) and entry >> 40 != tag:
            place = (place + 1) & (self._size - 1)
        return tag, place
