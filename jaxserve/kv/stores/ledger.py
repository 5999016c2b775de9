"""What a remote store holds, as far as this process knows: sizes, expiry, pins, who leaves first.

Room is made before a record is written:

    admit() -> Grant(victims)    the record's bytes are reserved, the victims are off the books
    ... the store deletes the victims, then writes the record ...
    commit() or cancel()

Since nobody writes before its own victims are gone, what is physically there never exceeds
`max_bytes`, however many threads write. What cannot be deleted after all is taken back by `add`.

Its owner locks. Knows nothing of I/O or of what a record holds.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import has_expired
from jaxserve.kv.policy.base import Policy
from jaxserve.kv.policy.factory import make_policy
from jaxserve.kv.stores.base import PutStatus, RecordInfo, StoreUsage

OVERHEAD_BYTES = 256
"""Charged for each record beside its own bytes: names and what the server keeps about them."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to write one record, once `victims` have been deleted."""

    info: RecordInfo
    victims: tuple[RecordInfo, ...]


class Ledger:
    """The books of one store.

    Args:
        max_bytes: bound of all records with their overhead; 0 is no bound.
        policy: replacement policy as in `make_policy`; used only with a bound.
        clock: seconds since the epoch.
    """

    def __init__(self, max_bytes: int, policy: str, clock: Callable[[], float]):
        self._max_bytes = max_bytes
        self._policy_spec = policy
        self._clock = clock
        self._records: dict[BlockHash, RecordInfo] = {}
        self._granted: dict[BlockHash, RecordInfo] = {}
        self._pinned: set[BlockHash] = set()
        self._expiries: list[tuple[float, BlockHash]] = []
        self._num_bytes = 0  # of records and grants, with overhead
        self._num_evicted = 0
        self._policy: Policy | None = None
        self._policy_unit = 0.0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: BlockHash) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[RecordInfo]:
        return iter(list(self._records.values()))

    def sample(self, count: int) -> list[RecordInfo]:
        """At most so many records, those that came last first."""
        return list(islice(reversed(self._records.values()), count))

    def usage(self) -> StoreUsage:
        """Overhead included."""
        return StoreUsage(
            len(self._records),
            self._num_bytes,
            self._max_bytes,
            self._num_evicted,
            len(self._pinned),
        )

    def find(self, key: BlockHash) -> RecordInfo | None:
        """The record, unless it is unknown or has expired."""
        info = self._records.get(key)
        if info is None:
            if self._policy is not None:
                self._policy.miss(key)
            return None
        return None if self._has_expired(info) else info

    def touch(self, key: BlockHash) -> None:
        """The record was read."""
        if self._policy is not None and key in self._records:
            self._policy.touch(key)

    def expired(self, limit: int = 64) -> list[RecordInfo]:
        """Records whose time is over, off the books now; the caller deletes them."""
        gone = []
        while self._expiries and len(gone) < limit and self._expiries[0][0] <= self._clock():
            expires_s, key = heapq.heappop(self._expiries)
            info = self._records.get(key)
            if info is not None and info.expires_s == expires_s:
                gone.append(info)
                self.remove(key)
        return gone

    def admit(self, info: RecordInfo) -> Grant | PutStatus:
        """Reserve room for a record.

        Returns:
            A grant; or PRESENT if it is there or being written; DECLINED if it has expired or the
            policy would rather keep what there is; FULL if it cannot fit, or all is pinned.
        """
        key = info.block_hash
        if self._has_expired(info):
            return PutStatus.DECLINED
        known = self._records.get(key)
        if key in self._granted or (known is not None and not self._has_expired(known)):
            return PutStatus.PRESENT
        charge = _charge(info)
        if self._max_bytes and charge > self._max_bytes:
            return PutStatus.FULL
        policy = self._policy_for(charge)
        if policy is not None and not policy.admits(key):
            return PutStatus.DECLINED
        victims = []
        if known is not None:  # expired; its name may differ from the new one's
            victims.append(known)
            self.remove(key)
        while self._max_bytes and self._num_bytes + charge > self._max_bytes:
            assert policy is not None
            victim = policy.victim(lambda other: other not in self._pinned)
            if victim is None:
                for kept in victims:
                    self.add(kept)
                return PutStatus.FULL
            victims.append(self._records[victim])
            self.remove(victim, evicted=True)
        self._granted[key] = info
        self._num_bytes += charge
        return Grant(info, tuple(victims))

    def commit(self, grant: Grant) -> None:
        """The record has been written."""
        self.cancel(grant)
        self.add(grant.info)

    def cancel(self, grant: Grant) -> None:
        """The record has not been written. Of its victims, `add` those that are still there."""
        if self._granted.pop(grant.info.block_hash, None) is not None:
            self._num_bytes -= _charge(grant.info)

    def add(self, info: RecordInfo) -> None:
        """A record is there: found at open, written by someone else, or not deleted after all."""
        key = info.block_hash
        was_pinned = key in self._pinned
        self.remove(key)
        policy = self._policy_for(_charge(info))
        if policy is not None:
            if len(self._records) >= policy.capacity:  # smaller ones than it was made for
                policy = self._policy = self._new_policy(self._policy_unit)
            policy.insert(key)
        self._records[key] = info
        self._num_bytes += _charge(info)
        if was_pinned:
            self._pinned.add(key)
        if info.expires_s:
            heapq.heappush(self._expiries, (info.expires_s, key))
            if len(self._expiries) > 2 * len(self._records) + 64:  # most are of what has left
                self._expiries = [
                    (one.expires_s, other) for other, one in self._records.items() if one.expires_s
                ]
                heapq.heapify(self._expiries)

    def remove(self, key: BlockHash, *, evicted: bool = False) -> RecordInfo | None:
        """A record is there no more; None if it was not on the books. A pin of it is forgotten."""
        info = self._records.pop(key, None)
        if info is not None:
            self._num_bytes -= _charge(info)
            self._num_evicted += evicted
            self._pinned.discard(key)
            if self._policy is not None:
                self._policy.remove(key, evicted=evicted)
        return info

    def pin(self, key: BlockHash, pinned: bool) -> bool:
        """Protect a record from eviction, or stop; whether it is there."""
        if not pinned:
            self._pinned.discard(key)
        elif key in self._records:
            self._pinned.add(key)
        return key in self._records

    def is_pinned(self, key: BlockHash) -> bool:
        """Whether a record is protected from eviction."""
        return key in self._pinned

    def clear(self) -> None:
        """Nothing is there any more; grants stay."""
        for key in list(self._records):
            self.remove(key)
        self._expiries.clear()

    def _has_expired(self, info: RecordInfo) -> bool:
        return has_expired(info.created_s, info.expires_s, self._clock())

    def _policy_for(self, charge: int) -> Policy | None:
        """The policy, made anew if records have become so small or large that it does not fit."""
        if not self._max_bytes:
            return None
        num_records = len(self._records) + len(self._granted)
        mean = self._num_bytes / num_records if num_records else float(charge)
        if self._policy is None or not self._policy_unit / 2 <= mean <= self._policy_unit * 2:
            self._policy = self._new_policy(mean)
        return self._policy

    def _new_policy(self, unit: float) -> Policy:
        self._policy_unit = unit
        most = len(self._records) + len(self._records) // 4 + 1
        capacity = max(int(self._max_bytes // unit), most)
        policy = make_policy(self._policy_spec, capacity)
        for key in self._records:
            policy.insert(key)
        return policy


def _charge(info: RecordInfo) -> int:
    return info.num_bytes + OVERHEAD_BYTES
