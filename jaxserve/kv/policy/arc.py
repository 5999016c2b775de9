"""ARC (Megiddo and Modha, FAST 2003): recency and frequency share the tier, ghosts move the border.

    seen once          B1 <- T1   | border |   T2 -> B2          seen more often
                    (ghosts) (resident)     (resident) (ghosts)

An offer of a key in B1 says that T1 was too small, one in B2 that T2 was; the border moves.
Invariants: T1+T2 <= c, T1+B1 <= c, all four <= 2c, no key is in two of them.
"""

from collections.abc import Sequence, Set

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.queues import Keys, MayLeave, first_that_may_leave, trim


class ARC:
    """Keys seen once and keys seen more often, each by recency.

    Args:
        capacity: most blocks that the tier holds; as many ghosts are remembered.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._once: Keys = Keys()
        self._often: Keys = Keys()
        self._once_ghosts: Keys = Keys()
        self._often_ghosts: Keys = Keys()
        self._once_target = 0.0
        self._offered_was_often = False

    def admits(self, key: BlockHash) -> bool:
        num_once, num_often = len(self._once_ghosts), len(self._often_ghosts)
        self._offered_was_often = key in self._often_ghosts
        if key in self._once_ghosts:
            self._once_target += max(1.0, num_often / num_once)
        elif self._offered_was_often:
            self._once_target -= max(1.0, num_once / num_often)
        self._once_target = min(max(self._once_target, 0.0), float(self.capacity))
        return True

    def insert(self, key: BlockHash) -> None:
        if key in self._once_ghosts:
            del self._once_ghosts[key]
            self._often[key] = None
        elif key in self._often_ghosts:
            del self._often_ghosts[key]
            self._often[key] = None
        else:
            self._once[key] = None
            self._trim_ghosts()

    def touch(self, key: BlockHash) -> None:
        if key in self._once:
            del self._once[key]
            self._often[key] = None
        else:
            self._often.move_to_end(key)

    def miss(self, key: BlockHash) -> None:
        pass

    def observe(self, keys: Sequence[BlockHash]) -> None:
        pass

    def victim(self, may_leave: MayLeave) -> BlockHash | None:
        surplus = len(self._once) - self._once_target
        is_once = bool(self._once) and (
            surplus > 0 or (self._offered_was_often and surplus > -1) or not self._often
        )
        for queue in (self._once, self._often) if is_once else (self._often, self._once):
            key = first_that_may_leave(queue, may_leave)
            if key is not None:
                return key
        return None

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        is_once = key in self._once
        del (self._once if is_once else self._often)[key]
        if evicted:
            (self._once_ghosts if is_once else self._often_ghosts)[key] = None
            self._trim_ghosts()

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        lists = (self._once, self._often, self._once_ghosts, self._often_ghosts)
        assert self._once.keys() | self._often.keys() == resident
        assert len(set().union(*lists)) == sum(map(len, lists)), "a key is in two lists"
        assert len(self._once) + len(self._often) <= self.capacity
        assert len(self._once) + len(self._once_ghosts) <= self.capacity
        assert sum(map(len, lists)) <= 2 * self.capacity
        assert 0 <= self._once_target <= self.capacity

    def _trim_ghosts(self) -> None:
        trim(self._once_ghosts, self.capacity - len(self._once))
        others = len(self._once) + len(self._often) + len(self._once_ghosts)
        trim(self._often_ghosts, 2 * self.capacity - others)
