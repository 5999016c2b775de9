"""The books of remote stores against plain dictionaries, under random use."""

import random

import pytest

from jaxserve.kv.stores.base import PutStatus, RecordInfo
from jaxserve.kv.stores.ledger import OVERHEAD_BYTES, Grant, Ledger
from tests.kv.stores.conftest import FakeClock
from tests.kv.stores.records import SPACE_1, TENANT_A, key_of


def info_of(index: int, num_bytes: int, clock: FakeClock, ttl_s: float = 0.0) -> RecordInfo:
    expires_s = clock.now_s + ttl_s if ttl_s else 0.0
    return RecordInfo(key_of(index), SPACE_1, TENANT_A, num_bytes, clock.now_s, expires_s)


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "tinylfu", "lru?store_threshold=2"])
@pytest.mark.parametrize("sizes", [(1000,), (1000, 1100), (500, 4000)])
def test_what_is_written_never_exceeds_the_bound(policy: str, sizes: tuple[int, ...]):
    """A store that writes and deletes as it is told, with many writes under way at a time."""
    draw, clock, bound = random.Random(len(policy) + sum(sizes)), FakeClock(), 20_000
    ledger = Ledger(bound, policy, clock)
    physical: dict[bytes, int] = {}
    pending: list[Grant] = []
    pinned: set[bytes] = set()
    counts = dict.fromkeys(PutStatus, 0)
    for _ in range(3000):
        clock.now_s += 1
        action, index = draw.random(), draw.randrange(60)
        key = key_of(index)
        if action < 0.45:
            ttl_s = draw.choice([0.0, 0.0, 40.0])
            answer = ledger.admit(info_of(index, draw.choice(sizes), clock, ttl_s))
            if isinstance(answer, Grant):
                for victim in answer.victims:
                    assert victim.block_hash not in pinned or victim.expires_s
                    del physical[victim.block_hash]
                    pinned.discard(victim.block_hash)
                pending.append(answer)
            else:
                counts[answer] += 1
        elif action < 0.8 and pending:
            grant = pending.pop(draw.randrange(len(pending)))
            if draw.random() < 0.1:
                ledger.cancel(grant)
                continue
            physical[grant.info.block_hash] = grant.info.num_bytes + OVERHEAD_BYTES
            ledger.commit(grant)
            counts[PutStatus.STORED] += 1
        elif action < 0.9:
            if ledger.find(key) is not None:
                ledger.touch(key)
        elif action < 0.94:
            there = ledger.remove(key) is not None
            assert there == (physical.pop(key, None) is not None)
            pinned.discard(key)
        elif action < 0.97 and len(pinned) < 3:
            if ledger.pin(key, True):
                pinned.add(key)
        elif action < 0.98:
            ledger.pin(key, False)
            pinned.discard(key)
        else:
            for gone in ledger.expired():
                del physical[gone.block_hash]
                pinned.discard(gone.block_hash)
        assert sum(physical.values()) <= bound
        reserved = sum(grant.info.num_bytes + OVERHEAD_BYTES for grant in pending)
        usage = ledger.usage()
        assert usage.num_bytes == sum(physical.values()) + reserved <= bound
        assert usage.num_records == len(physical) == len(list(ledger))
        assert all(key in ledger for key in pinned)
    assert counts[PutStatus.STORED] > 200


def test_victims_that_were_in_vain_come_back():
    clock = FakeClock()
    ledger = Ledger(10_000, "lru", clock)
    for index in range(4):
        ledger.add(info_of(index, 2000, clock))
    for index in (1, 2, 3):
        ledger.pin(key_of(index), True)
    assert ledger.admit(info_of(9, 6000, clock)) is PutStatus.FULL
    assert ledger.usage().num_records == 4


def test_without_a_bound_nothing_is_evicted():
    clock = FakeClock()
    ledger = Ledger(0, "lru", clock)
    for index in range(1000):
        grant = ledger.admit(info_of(index, 1 << 30, clock))
        assert isinstance(grant, Grant) and not grant.victims
        ledger.commit(grant)
    assert ledger.usage().max_bytes == 0 and len(ledger) == 1000


def test_a_record_is_written_by_one_at_a_time():
    clock = FakeClock()
    ledger = Ledger(10_000, "lru", clock)
    grant = ledger.admit(info_of(1, 1000, clock))
    assert isinstance(grant, Grant)
    assert ledger.admit(info_of(1, 1000, clock)) is PutStatus.PRESENT
    assert ledger.find(key_of(1)) is None, "it is not there before it is written"
    ledger.commit(grant)
    assert ledger.find(key_of(1)) == grant.info


def test_the_list_of_expiries_does_not_grow_with_what_has_left():
    clock = FakeClock()
    ledger = Ledger(20_000, "lru", clock)
    for index in range(10_000):
        grant = ledger.admit(info_of(index, 1000, clock, ttl_s=1e6 + index))
        assert isinstance(grant, Grant)
        ledger.commit(grant)
    assert len(ledger._expiries) < 200
    clock.now_s += 2e6
    assert len(ledger.expired()) == 15 and len(ledger) == 0
