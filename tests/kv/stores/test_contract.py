"""What every store promises, whatever it is made of (`Store`)."""

import threading

from jaxserve.kv.stores.base import EraseCount, PutStatus
from tests.kv.stores.conftest import StoreKind
from tests.kv.stores.records import (
    SIZE,
    SPACE_1,
    SPACE_2,
    TENANT_A,
    TENANT_B,
    key_of,
    payload,
    read,
    record,
)

MAX = 2 << 20
"""A bound that some sixty records fit into."""


def test_what_is_put_is_got_back(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    assert store.put([record(i) for i in range(5)]) == [PutStatus.STORED] * 5
    buffers = [memoryview(bytearray(b"\xee" * (SIZE + 10))) for _ in range(4)]
    keys = [key_of(i) for i in (3, 77, 0, 4)]
    assert store.get(keys, buffers) == [SIZE, 0, SIZE, SIZE]
    for index, buffer in zip((3, 0, 4), (buffers[0], buffers[2], buffers[3]), strict=True):
        assert buffer[:SIZE] == payload(index)
    assert store.probe(keys) == [True, False, True, True]
    usage = store.usage()
    assert usage.num_records == 5 and 5 * SIZE <= usage.num_bytes <= usage.max_bytes == MAX


def test_nothing_asked_is_nothing_answered(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    assert store.probe([]) == [] and store.get([], []) == [] and store.put([]) == []
    assert store.delete([]) == EraseCount(0, 0) and store.pin([], True) == 0
    assert list(store.scan()) == []


def test_a_record_that_does_not_fit_its_buffer_is_a_miss(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(1), record(2)])
    small, large = memoryview(bytearray(SIZE - 1)), memoryview(bytearray(SIZE))
    assert store.get([key_of(1), key_of(2)], [small, large]) == [0, SIZE]
    assert store.probe([key_of(1)]) == [True]


def test_records_of_any_length_are_kept(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    sizes = [65, 100, 4096, 4097, 100_000, 300_000]
    records = [record(i, size=size) for i, size in enumerate(sizes)]
    assert store.put(records) == [PutStatus.STORED] * len(sizes)
    for index, size in enumerate(sizes):
        assert read(store, index, size) == payload(index, size)


def test_putting_again_says_present_and_changes_nothing(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(1)])
    before = store.usage()
    assert store.put([record(1), record(2), record(1)]) == [
        PutStatus.PRESENT,
        PutStatus.STORED,
        PutStatus.PRESENT,
    ]
    assert store.usage().num_records == before.num_records + 1
    assert read(store, 1) == payload(1)


def test_deleting_removes_exactly_what_was_named(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(i) for i in range(4)])
    assert store.delete([key_of(1), key_of(2), key_of(99)]) == EraseCount(2, 2 * SIZE)
    assert store.probe([key_of(i) for i in range(4)]) == [True, False, False, True]
    assert read(store, 1) is None
    assert store.usage().num_records == 2
    assert store.put([record(1)]) == [PutStatus.STORED]


def test_deleting_a_tenant_leaves_the_others(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(i, tenant=TENANT_A if i % 2 else TENANT_B) for i in range(6)])
    store.pin([key_of(1)], True)
    assert store.delete_tenant(TENANT_A) == EraseCount(3, 3 * SIZE)
    assert [read(store, i) is not None for i in range(6)] == [True, False] * 3
    assert {info.tenant for info in store.scan()} == {TENANT_B}
    assert store.delete_tenant(TENANT_A) == EraseCount(0, 0)


def test_deleting_namespaces_keeps_the_one_that_is_served(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(i, namespace=SPACE_1 if i < 2 else SPACE_2) for i in range(5)])
    assert store.delete_namespaces(keep=SPACE_1) == EraseCount(3, 3 * SIZE)
    assert [info.namespace for info in store.scan()] == [SPACE_1] * 2
    store.pin([key_of(0)], True)
    assert store.delete_namespaces() == EraseCount(2, 2 * SIZE)
    assert list(store.scan()) == [] and store.usage().num_records == 0


def test_a_record_is_a_miss_once_its_time_is_over(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(1, expires_s=kind.clock.now_s + 50), record(2)])
    assert store.probe([key_of(1), key_of(2)]) == [True, True]
    kind.clock.now_s += 50
    assert store.probe([key_of(1), key_of(2)]) == [False, True]
    assert read(store, 1) is None and read(store, 2) == payload(2)
    assert [info.block_hash for info in store.scan()] == [key_of(2)]
    store.sweep()
    assert store.usage().num_records == 1


def test_the_stores_own_ttl_shortens_a_records(kind: StoreKind):
    store = kind.open(max_bytes=MAX, ttl="1m")
    store.put([record(1), record(2, expires_s=kind.clock.now_s + 1000)])
    kind.clock.now_s += 59
    assert store.probe([key_of(1), key_of(2)]) == [True, True]
    kind.clock.now_s += 1
    assert store.probe([key_of(1), key_of(2)]) == [False, False]


def test_a_record_that_has_expired_already_is_declined(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    assert store.put([record(1, expires_s=kind.clock.now_s - 1)]) == [PutStatus.DECLINED]
    assert store.usage().num_records == 0


def test_the_bound_holds_all_the_time_and_the_newest_stay(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    for index in range(150):
        assert store.put([record(index)]) == [PutStatus.STORED]
        assert store.usage().num_bytes <= MAX
    usage = store.usage()
    assert 40 <= usage.num_records <= 70, "the room is used"
    there = store.probe([key_of(i) for i in range(150)])
    assert sum(there) == usage.num_records
    assert all(there[-40:]) and not any(there[:80])
    assert read(store, 149) == payload(149)


def test_what_is_read_stays_and_what_is_not_leaves(kind: StoreKind):
    store = kind.open(max_bytes=MAX, policy="lru")
    store.put([record(0), record(1)])
    for index in range(2, 100):
        store.put([record(index)])
        assert read(store, 0) == payload(0)
    assert store.probe([key_of(0), key_of(1)]) == [True, False]


def test_a_record_larger_than_the_bound_is_refused(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(1)])
    assert store.put([record(2, size=MAX + 1)]) == [PutStatus.FULL]
    assert read(store, 1) == payload(1)


def test_a_policy_with_a_gate_declines_what_is_offered_once(kind: StoreKind):
    store = kind.open(max_bytes=MAX, policy="lru?store_threshold=2")
    assert store.put([record(1)]) == [PutStatus.DECLINED]
    assert store.put([record(1)]) == [PutStatus.STORED]


def test_pinned_records_are_not_evicted_but_can_be_deleted(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(i) for i in range(4)])
    assert store.pin([key_of(0), key_of(1), key_of(99)], True) == 2
    assert store.pin([key_of(1)], False) == 1
    for index in range(4, 100):
        store.put([record(index)])
    assert store.probe([key_of(0), key_of(1)]) == [True, False]
    assert store.delete([key_of(0)]) == EraseCount(1, SIZE)
    assert read(store, 0) is None


def test_a_store_full_of_pins_refuses_writes(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    index = 0
    while store.put([record(index)]) == [PutStatus.STORED]:
        store.pin([key_of(index)], True)
        index += 1
    assert 40 <= index <= 70
    assert all(store.probe([key_of(i) for i in range(index)]))


def test_scan_tells_what_was_put(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    records = [
        record(1, tenant=TENANT_B, created_s=kind.clock.now_s - 5.5),
        record(2, size=777, namespace=SPACE_2, expires_s=kind.clock.now_s + 100.25),
    ]
    store.put(records)
    found = sorted(store.scan(), key=lambda info: info.block_hash)
    assert found == [one.info for one in records]


def test_records_and_pins_survive_reopening(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    store.put([record(i, expires_s=kind.clock.now_s + 500 if i == 3 else 0) for i in range(4)])
    store.pin([key_of(1)], True)
    store.flush()
    before = store.usage()
    store = kind.reopen(max_bytes=MAX)
    if not kind.is_persistent:
        assert store.usage().num_records == 0
        return
    assert store.usage() == before
    assert {info.block_hash for info in store.scan() if info.is_pinned} == {key_of(1)}
    assert [read(store, i) for i in range(4)] == [payload(i) for i in range(4)]
    for index in range(10, 110):
        store.put([record(index)])
    assert read(store, 1) == payload(1) and read(store, 0) is None
    kind.clock.now_s += 500
    assert read(store, 3) is None


def test_a_smaller_bound_holds_soon_after_reopening(kind: StoreKind):
    store = kind.open(max_bytes=2 * MAX)
    store.put([record(i) for i in range(100)])
    store = kind.reopen(max_bytes=MAX)
    store.put([record(1000)])
    assert store.usage().num_bytes <= MAX
    assert len(list(store.scan())) == store.usage().num_records


def test_many_threads_may_use_it(kind: StoreKind):
    store = kind.open(max_bytes=MAX)
    wrong: list[object] = []

    def work(thread: int) -> None:
        try:
            for step in range(12):
                indices = range(20 * step, 20 * step + 4)
                store.put([record(i) for i in indices])
                for index in indices:
                    if (data := read(store, index)) not in (None, payload(index)):
                        wrong.append(data)
                if thread == 0:
                    store.delete([key_of(indices[0])])
                if store.usage().num_bytes > MAX:
                    wrong.append(store.usage())
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for index in range(20 * 12):  # what is removed while it is read is on the books until missed
        read(store, index)
    assert len(list(store.scan())) == store.usage().num_records
