"""Asking a store a little before it is needed."""

import time
from collections.abc import Callable
from typing import cast

from jaxserve.kv.stores.base import PutStatus, RecordInfo, Store
from jaxserve.kv.stores.breaker import BreakerState
from jaxserve.kv.stores.faults import FaultPlan, FaultyStore
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.try_out import try_out
from jaxserve.kv.stores.url import open_store
from jaxserve.kv.stores.worker import LEAST_ON_TIME, StoreWorker
from tests.kv.stores.conftest import FakeClock
from tests.kv.stores.records import SIZE, record

MOST = 4
LONG_S = 20.0


def filled(
    num_records: int,
    plan: FaultPlan | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> StoreWorker:
    """A worker of a store in memory that has so many records and then behaves as planned."""
    store = FaultyStore(open_store("memory://"))
    stored = store.put([record(i) for i in range(num_records)])
    assert stored == [PutStatus.STORED] * num_records
    store.plan = plan or FaultPlan()
    return StoreWorker(store, WorkerLimits(get_timeout_s=0.5), clock)


def is_short(info: RecordInfo) -> bool:
    return info.num_bytes <= SIZE


def test_a_store_counts_as_reliable_before_the_first_request():
    for num_records in (1, 3, 50):
        worker = filled(num_records, clock=FakeClock())
        assert not worker.is_reliable
        try_out(worker, is_short, MOST, LONG_S)
        assert worker.is_reliable
        assert isinstance(worker.store, FaultyStore)
        assert worker.store.num_calls == 2 + 2 * LEAST_ON_TIME  # put, probe, gets
        stats = worker.stats()
        assert stats.hits == stats.misses == stats.bytes_read == stats.probe_misses == 0
        worker.close()


def test_what_it_costs_is_measured():
    worker = filled(50, FaultPlan(latency_s=0.05))
    assert worker.estimate_load_s(MOST * SIZE, MOST) < 0.02
    try_out(worker, is_short, MOST, LONG_S)
    assert worker.estimate_load_s(MOST * SIZE, MOST) >= 0.05
    assert worker.estimate_probe_s(1) >= 0.05
    worker.close()


def test_nothing_is_read_of_an_empty_store():
    worker = filled(0)
    try_out(worker, is_short, MOST, LONG_S)
    assert not worker.is_reliable
    assert isinstance(worker.store, FaultyStore)
    assert worker.store.num_calls == 2, "the put and the probe"
    worker.close()


def test_a_store_that_hangs_is_not_waited_for():
    worker = filled(50, FaultPlan(hang=True))
    start_s = time.monotonic()
    try_out(worker, is_short, MOST, 0.05)
    assert time.monotonic() - start_s < LONG_S and not worker.is_reliable
    assert isinstance(worker.store, FaultyStore)
    worker.store.release()
    worker.close()


def test_a_store_that_fails_is_left_alone():
    worker = filled(50, FaultPlan(error_rate=1.0))
    try_out(worker, is_short, MOST, LONG_S)
    assert not worker.is_reliable
    assert isinstance(worker.store, FaultyStore)
    assert worker.store.num_calls == 2, "the put and the probe"
    stats = worker.stats()
    assert stats.load_breaker is BreakerState.CLOSED and stats.refused_loads == 0
    worker.close()


def test_records_that_the_engine_could_not_load_are_not_read():
    worker = filled(50)
    try_out(worker, lambda info: info.num_bytes < SIZE, MOST, LONG_S)
    assert isinstance(worker.store, FaultyStore)
    assert worker.store.num_calls == 2, "the put and the probe"
    worker.close()


class Plain:
    """A store that has only what every store must have."""

    def __init__(self, inner: Store):
        self.name = inner.name
        self.probe, self.get, self.put = inner.probe, inner.get, inner.put
        self.sweep, self.close = inner.sweep, inner.close


def test_a_store_without_books_of_its_own_is_only_asked():
    worker = StoreWorker(cast(Store, Plain(open_store("memory://"))))
    try_out(worker, is_short, MOST, LONG_S)
    assert not worker.is_reliable
    worker.close()
