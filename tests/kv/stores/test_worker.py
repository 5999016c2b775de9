"""The worker: whatever the store does, callers get one answer in time and keep their memory."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from jaxserve.errors import StoreError
from jaxserve.kv.stores.base import EraseCount, PutStatus
from jaxserve.kv.stores.breaker import BreakerState
from jaxserve.kv.stores.faults import FaultPlan, FaultyStore
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.tasks import Operation, Outcome, Reason, batches
from jaxserve.kv.stores.url import open_store
from jaxserve.kv.stores.worker import StoreWorker
from tests.kv.stores.conftest import FakeClock
from tests.kv.stores.records import SIZE, TENANT_A, key_of, payload, record

LIMITS = WorkerLimits(
    num_load_threads=3,
    num_write_threads=1,
    max_queued_write_bytes=4 * SIZE,
    scratch_bytes=2 * 32768,
    probe_timeout_s=1.0,
    get_timeout_s=5.0,
    put_timeout_s=10.0,
    alone_timeout_s=20.0,
    max_failures=3,
    min_backoff_s=4.0,
    max_backoff_s=64.0,
    sweep_s=1e6,
)
HANGS = FaultPlan(hang=True)


class Desk:
    """A worker over a faulty store in memory, on a clock that stands still."""

    def __init__(self, limits: WorkerLimits = LIMITS):
        self.clock = FakeClock()
        self.store = FaultyStore(open_store("memory://", self.clock), clock=self.clock)
        self.worker = StoreWorker(self.store, limits, self.clock)
        self.outcomes: queue.SimpleQueue[Outcome[Any]] = queue.SimpleQueue()
        self.buffers = [memoryview(bytearray(b"\xee" * SIZE)) for _ in range(12)]

    def next(self) -> Outcome[Any]:
        return self.outcomes.get(timeout=10)

    def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.worker.check_deadlines()

    def put(self, *indices: int) -> Any:
        return self.worker.submit_put([record(i) for i in indices], self.outcomes.put)

    def get(self, *indices: int) -> Any:
        keys = [key_of(i) for i in indices]
        return self.worker.submit_get(keys, [self.buffers[i] for i in indices], self.outcomes.put)

    def probe(self, *indices: int) -> Any:
        return self.worker.submit_probe([key_of(i) for i in indices], self.outcomes.put)

    def fill(self, *indices: int) -> None:
        for index in indices:
            self.put(index)
            assert self.next().values == [PutStatus.STORED]

    def until(self, holds: Callable[[], bool]) -> None:
        until_s = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < until_s, "it never came true"
            time.sleep(0.001)

    def until_running(self, num_calls: int) -> None:
        """Wait for so many calls to have reached the store, counted from now."""
        self.until(lambda: self.store.num_calls >= num_calls)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.store.plan = FaultPlan()
    assert desk.worker.close(10.0)


def is_untouched(buffer: memoryview) -> bool:
    return bytes(buffer) == b"\xee" * SIZE


def test_records_go_in_and_come_out(desk: Desk):
    desk.put(0, 1, 2)
    assert desk.next() == Outcome([PutStatus.STORED] * 3, Reason.OK, 0.0)
    desk.probe(0, 5, 2)
    assert desk.next().values == [True, False, True]
    desk.get(2, 5, 0)
    assert desk.next().values == [SIZE, 0, SIZE]
    assert desk.buffers[2] == payload(2) and desk.buffers[0] == payload(0)
    assert is_untouched(desk.buffers[5])


def test_calls_of_nothing_are_answered_and_blamed_on_nobody(desk: Desk):
    for _ in range(5):
        for submit in (desk.put, desk.get, desk.probe):
            submit()
            assert desk.next() == Outcome([], Reason.OK, 0.0)
    assert desk.put(0) is not None and desk.next().values == [PutStatus.STORED]


def test_a_hung_get_is_over_at_its_deadline_and_never_writes_afterwards(desk: Desk):
    desk.fill(0)
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    desk.get(0)
    desk.until_running(calls + 1)
    desk.pass_time(4.9)
    assert desk.outcomes.empty()
    desk.pass_time(0.1)
    outcome = desk.next()
    assert outcome.values == [0] and outcome.reason is Reason.TIMEOUT
    assert outcome.seconds == pytest.approx(5.0)
    assert desk.worker.stats().stuck_threads == 1
    desk.store.plan = FaultPlan()
    desk.until(lambda: desk.worker.stats().stuck_threads == 0)
    assert is_untouched(desk.buffers[0]) and desk.outcomes.empty()


def test_a_cancelled_call_has_no_callback_and_leaves_the_memory_alone(desk: Desk):
    desk.fill(0, 1)
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    running = [desk.get(0) for _ in range(3)]
    desk.until_running(calls + 3)
    queued = desk.get(1)
    assert desk.worker.cancel(queued) and not desk.worker.cancel(queued)
    assert all(desk.worker.cancel(task) for task in running)
    desk.store.plan = FaultPlan()
    desk.until(lambda: desk.worker.stats().stuck_threads == 0)
    desk.get(1)
    assert desk.next().values == [SIZE]
    assert is_untouched(desk.buffers[0]) and desk.outcomes.empty()
    assert desk.worker.stats().cancelled == 4


def test_a_call_that_is_over_cannot_be_cancelled(desk: Desk):
    task = desk.probe(0)
    desk.next()
    assert not desk.worker.cancel(task)


def test_a_hung_store_is_left_alone_and_tried_again_ever_later(desk: Desk):
    desk.fill(0)
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    for _ in range(4):
        desk.probe(0)  # the fourth waits for a thread
    desk.until_running(calls + 3)
    desk.pass_time(1.0)
    assert sorted(desk.next().reason for _ in range(4)) in (
        [Reason.REFUSED] + [Reason.TIMEOUT] * 3,
        [Reason.TIMEOUT] * 4,
    )
    assert desk.worker.stats().load_breaker is BreakerState.OPEN
    assert desk.probe(0) is None and desk.get(0) is None
    assert desk.worker.estimate_load_s(1) == float("inf")
    assert desk.put(1) is not None, "writes find out for themselves"
    for backoff_s in (4.0, 8.0, 16.0):
        desk.pass_time(backoff_s - 0.5)
        assert desk.worker.stats().load_breaker is BreakerState.OPEN
        desk.pass_time(0.5)
        assert desk.worker.stats().load_breaker is BreakerState.HALF_OPEN
        assert desk.get(0) is None, "no request is used for the trial"
        desk.pass_time(1.0)
    desk.store.plan = FaultPlan()
    desk.until(lambda: desk.worker.stats().stuck_threads == 0)
    desk.pass_time(32.0)
    desk.until(lambda: desk.worker.stats().load_breaker is BreakerState.CLOSED)
    while not desk.outcomes.empty():
        desk.next()
    desk.get(0)
    assert desk.next().values == [SIZE]


def test_cancelled_calls_do_not_hide_that_the_store_hangs(desk: Desk):
    desk.store.plan = HANGS
    tasks = [desk.get(0) for _ in range(3)]
    desk.until_running(3)
    assert all(desk.worker.cancel(task) for task in tasks)
    desk.pass_time(5.0)
    assert desk.worker.stats().load_breaker is BreakerState.OPEN


def test_a_store_that_raises_is_a_store_of_misses(desk: Desk):
    desk.fill(0)
    desk.store.plan = FaultPlan(error_rate=1.0)
    desk.get(0)
    why = "store memory fails as planned"
    assert desk.next() == Outcome([0], Reason.FAILED, 0.0, why)
    desk.probe(0)
    assert desk.next() == Outcome([False], Reason.FAILED, 0.0, why)
    desk.put(1)
    assert desk.next() == Outcome([PutStatus.FAILED], Reason.FAILED, 0.0, why)
    assert is_untouched(desk.buffers[0])


def test_back_pressure_drops_writes_and_never_loads(desk: Desk):
    desk.fill(0)
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    desk.put(1)
    desk.until_running(calls + 1)
    accepted = [desk.put(i) for i in range(2, 8)]
    assert [task is not None for task in accepted] == [True] * 4 + [False] * 2
    stats = desk.worker.stats()
    assert stats.dropped_writes == 2 and stats.queued_write_bytes == 4 * SIZE
    loads = [desk.get(0) for _ in range(200)]
    assert None not in loads
    desk.store.plan = FaultPlan()
    outcomes = [desk.next() for _ in range(205)]
    assert sum(outcome.values == [SIZE] for outcome in outcomes) == 200
    assert sum(outcome.values == [PutStatus.STORED] for outcome in outcomes) == 5


def test_writes_that_would_be_too_late_are_dropped_at_once(desk: Desk):
    desk.fill(0)
    for _ in range(30):
        desk.worker._costs[Operation.PUT].observe(SIZE, 100.0)
    assert desk.put(1) is None
    assert desk.worker.stats().dropped_writes == 1


def test_what_is_written_is_what_was_submitted_even_if_the_caller_goes_on(desk: Desk):
    memory = bytearray(payload(3))
    info = record(3).info
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    late = type(record(3))(info, (memoryview(memory),))
    desk.worker.submit_put([late], desk.outcomes.put)
    desk.until_running(calls + 1)
    desk.pass_time(10.0)
    outcome = desk.next()
    assert outcome.values == [PutStatus.FAILED] and outcome.reason is Reason.TIMEOUT
    memory[:] = bytes(SIZE)
    desk.store.plan = FaultPlan()
    desk.until(lambda: desk.worker.stats().stuck_threads == 0)
    desk.get(3)
    assert desk.next().values == [SIZE] and desk.buffers[3] == payload(3)


def test_a_store_that_takes_no_writes_is_still_read(desk: Desk):
    desk.fill(0)
    put = desk.store._inner.put
    desk.store._inner.put = lambda records: [PutStatus.FAILED] * len(records)  # pyright: ignore
    for index in range(1, 4):
        desk.put(index)
        assert desk.next().values == [PutStatus.FAILED]
    assert desk.worker.stats().write_breaker is BreakerState.OPEN
    assert desk.put(1) is None
    desk.get(0)
    assert desk.next().values == [SIZE]
    desk.store._inner.put = put  # pyright: ignore
    desk.pass_time(4.0)
    desk.put(1)  # the next write after the back-off is the trial
    assert desk.next().values == [PutStatus.STORED]
    assert desk.worker.stats().write_breaker is BreakerState.CLOSED


def test_a_callback_that_raises_harms_nobody(desk: Desk):
    def bad(outcome: Outcome[Any]) -> None:
        raise ValueError("a bug in the caller")

    for _ in range(10):
        desk.worker.submit_probe([key_of(0)], bad)
    desk.probe(0)
    assert desk.next().values == [False]


def test_a_deletion_comes_after_earlier_writes_and_before_later_ones(desk: Desk):
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    desk.put(0)
    desk.until_running(calls + 1)
    desk.put(1)
    desk.worker.submit_alone(lambda store: store.delete_tenant(TENANT_A), desk.outcomes.put)
    desk.put(2)
    desk.store.plan = FaultPlan()
    values = [desk.next().values for _ in range(4)]
    assert values[2] == [EraseCount(2, 2 * SIZE)]
    desk.probe(0, 1, 2)
    assert desk.next().values == [False, False, True]


def test_a_deletion_that_cannot_be_done_says_so(desk: Desk):
    desk.store.plan = FaultPlan(error_rate=1.0)
    desk.worker.submit_alone(lambda store: store.delete_tenant(TENANT_A), desk.outcomes.put)
    assert desk.next() == Outcome([], Reason.FAILED, 0.0, "store memory fails as planned")


def test_long_reads_are_made_in_steps_of_the_scratch(desk: Desk):
    desk.fill(*range(6))
    calls = desk.store.num_calls
    desk.get(*range(6))
    assert desk.next().values == [SIZE] * 6
    assert all(desk.buffers[i] == payload(i) for i in range(6))
    assert desk.store.num_calls == calls + 3


def test_a_read_that_is_late_keeps_what_it_has_handed_over(desk: Desk):
    desk.fill(*range(6))
    desk.store._sleep = lambda seconds: setattr(desk.clock, "now_s", desk.clock.now_s + seconds)
    desk.store.plan = FaultPlan(latency_s=2.0)
    desk.get(*range(6))
    outcome = desk.next()
    assert outcome.reason in (Reason.OK, Reason.TIMEOUT)
    assert outcome.values[:2] == [SIZE, SIZE]
    for index, num_bytes in enumerate(outcome.values):
        assert bytes(desk.buffers[index]) == (payload(index) if num_bytes else b"\xee" * SIZE)


def test_a_record_that_its_consumer_refuses_is_a_miss(desk: Desk):
    desk.fill(0, 1)
    seen = []

    def consume(index: int, view: memoryview) -> None:
        if index == 0:
            raise ValueError("checksum")
        seen.append(bytes(view))

    desk.worker.submit_read([key_of(0), key_of(1)], [SIZE, SIZE], consume, desk.outcomes.put)
    assert desk.next().values == [0, SIZE] and seen == [payload(1)]


def test_the_estimate_follows_the_store_and_its_queue(desk: Desk):
    assert desk.worker.estimate_load_s(SIZE) < 0.01, "unknown stores are tried"
    desk.fill(0)
    desk.store._sleep = lambda seconds: setattr(desk.clock, "now_s", desk.clock.now_s + seconds)
    desk.store.plan = FaultPlan(latency_s=0.5)
    for _ in range(30):
        desk.get(0)
        desk.next()
    assert desk.worker.estimate_load_s(SIZE) == pytest.approx(0.5, rel=0.1)
    assert desk.worker.estimate_load_s(20 * SIZE, 20) > 3.0
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    for _ in range(9):
        desk.get(0)
    desk.until_running(calls + 3)
    assert desk.worker.estimate_load_s(SIZE) > 1.2


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s", "count"),
    [
        (0.001, 1e9, 16),  # a call takes 5 ms
        (0.02, 1e8, 16),
        (0.05, 5e6, 4),  # 16 take 0.9 s, 4 a quarter of that; with 2, latency would cost too much
        (0.2, 1e9, 16),  # only latency
        (0.001, 1e6, 1),
    ],
)
def test_a_slow_store_is_asked_for_less_at_a_time(
    desk: Desk, latency_s: float, bytes_per_s: float, count: int
):
    record_bytes = 1 << 18
    desk.worker._costs[Operation.PROBE].observe(100, latency_s)
    get_costs = desk.worker._costs[Operation.GET]
    for num_records in (16, 4):  # then also by what was measured with less
        num_bytes = num_records * record_bytes
        get_costs.observe(num_bytes, latency_s + num_bytes / bytes_per_s)
        assert desk.worker.piece_records(record_bytes, 16) == count


def test_a_store_that_was_slow_once_is_tried_again(desk: Desk):
    for _ in range(10):
        desk.worker._costs[Operation.GET].observe(SIZE, 8.0)
    assert desk.worker.estimate_load_s(SIZE) == pytest.approx(8.0)
    desk.pass_time(60.0)
    assert desk.worker.estimate_load_s(SIZE) == pytest.approx(8.0)
    desk.pass_time(1200.0)
    assert desk.worker.estimate_load_s(SIZE) < 0.02


def test_expired_records_leave_an_idle_store():
    desk = Desk(WorkerLimits(sweep_s=60.0))
    desk.worker.submit_put([record(0, expires_s=desk.clock.now_s + 30)], desk.outcomes.put)
    desk.next()
    desk.pass_time(60.0)
    desk.until(lambda: desk.store.usage().num_records == 0)
    assert desk.worker.close(10.0)


def test_close_finishes_what_was_to_be_written(tmp_path):
    store = open_store(f"objects+file://{tmp_path}/store")
    worker = StoreWorker(store, WorkerLimits(num_write_threads=1))
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for index in range(50):
        worker.submit_put([record(index)], outcomes.put)
    assert worker.close(10.0)
    assert [outcomes.get_nowait().values for _ in range(50)] == [[PutStatus.STORED]] * 50
    assert open_store(f"objects+file://{tmp_path}/store").usage().num_records == 50
    assert worker.submit_probe([key_of(0)], outcomes.put) is None


def test_close_does_not_wait_for_a_store_that_hangs():
    desk = Desk()
    desk.store.plan = HANGS
    calls = desk.store.num_calls
    for index in range(3):
        desk.get(index)
    desk.put(4)
    desk.until_running(calls + 4)
    desk.put(5)
    desk.get(6)
    start_s = time.monotonic()
    assert not desk.worker.close(0.2)
    assert time.monotonic() - start_s < 1.0
    assert [desk.next().reason for _ in range(6)] == [Reason.CLOSED] * 6
    desk.store.release()
    for thread in desk.worker._dispatch._threads:
        thread.join(10)
    assert all(is_untouched(buffer) for buffer in desk.buffers)


def test_every_call_ends_exactly_once_whatever_happens():
    draw = random.Random(5)
    store = FaultyStore(open_store("memory://"), FaultPlan(error_rate=0.05, seed=1))
    limits = WorkerLimits(min_backoff_s=0.001, max_backoff_s=0.002, scratch_bytes=2 * 32768)
    worker = StoreWorker(store, limits)
    lock, ended, cancelled, wrong = threading.Lock(), [], set(), []
    num_submitted = 0
    tasks: list[Any] = []

    def note(number: int, check: Callable[[Outcome[Any]], bool]) -> Callable[[Outcome[Any]], None]:
        def callback(outcome: Outcome[Any]) -> None:
            with lock:
                ended.append(number)
                if not check(outcome):
                    wrong.append((number, outcome))

        return callback

    def check_of(indices: list[int], buffers: list[memoryview]) -> Callable[[Outcome[Any]], bool]:
        def check(outcome: Outcome[Any]) -> bool:
            triples = zip(indices, buffers, outcome.values, strict=True)
            return all(not n or (n == SIZE and b == payload(i)) for i, b, n in triples)

        return check

    for number in range(1500):
        indices = [draw.randrange(40) for _ in range(draw.randrange(1, 5))]
        keys = [key_of(i) for i in indices]
        timeout_s = draw.choice([None, None, 0.0, 0.0005])
        if number % 3 == 0:
            records = [record(i) for i in indices]
            task = worker.submit_put(records, note(number, lambda _: True), timeout_s)
        elif number % 3 == 1:
            buffers = [memoryview(bytearray(SIZE)) for _ in indices]
            callback = note(number, check_of(indices, buffers))
            task = worker.submit_get(keys, buffers, callback, timeout_s)
        else:
            task = worker.submit_probe(keys, note(number, lambda _: True), timeout_s)
        if task is not None:
            num_submitted += 1
            tasks.append((number, task))
        if tasks and draw.random() < 0.1:
            victim, task = draw.choice(tasks[-20:])
            if worker.cancel(task):
                cancelled.add(victim)
        if number % 50 == 0:
            time.sleep(0.002)
    assert worker.close(20.0)
    assert len(ended) == len(set(ended)), "nobody is told twice"
    assert not cancelled & set(ended) and len(ended) + len(cancelled) == num_submitted
    assert not wrong
    stats = worker.stats()
    assert stats.queued_loads == stats.queued_writes == stats.stuck_threads == 0
    assert stats.queued_load_bytes == stats.queued_write_bytes == 0
    # How many calls come through depends on how long the store is taken for broken.
    assert stats.hits > 0 and stats.get.failures > 0


def test_a_new_plan_frees_a_call_that_has_just_read_the_old_one():
    store = FaultyStore(open_store("memory://"))
    is_read, is_changed = threading.Event(), threading.Event()

    class Hangs:
        seed = 0

        @property
        def hang(self) -> bool:
            is_read.set()
            return is_changed.wait(10)

        def __getattr__(self, name: str) -> float:
            return 0.0

    store.plan = cast(FaultPlan, Hangs())
    call = threading.Thread(target=store.probe, args=([key_of(0)],), daemon=True)
    call.start()
    is_read.wait(10)
    store.plan = FaultPlan()
    is_changed.set()
    call.join(10)
    assert not call.is_alive()


def test_batches_cover_everything_in_order_and_fit():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randrange(1, 40_000) for _ in range(draw.randrange(12))]
        runs = batches(lengths, 65_536)
        assert [i for run in runs for i in run] == list(range(len(lengths)))
        for run in runs:
            padded = [-(-lengths[i] // 4096) * 4096 for i in run]
            assert sum(padded) <= 65_536 or len(run) == 1


def test_the_store_of_a_worker_may_be_used_beside_it(desk: Desk):
    desk.fill(0)
    desk.store.plan = FaultPlan(error_rate=1.0)
    with pytest.raises(StoreError, match="as planned"):
        desk.worker.store.probe([key_of(0)])


def test_a_store_is_reliable_while_loads_come_when_they_are_expected(desk: Desk):
    desk.fill(0)
    assert not desk.worker.is_reliable, "nothing is known of it yet"
    for _ in range(5):
        desk.get(0)
        desk.next()
    assert desk.worker.is_reliable
    desk.store.plan = HANGS
    num_calls = desk.store.num_calls
    desk.get(0)
    desk.until_running(num_calls + 1)
    assert desk.worker.is_reliable, "it is not late yet"
    desk.clock.now_s += 0.5
    assert not desk.worker.is_reliable, "long overdue, though nobody has given it up"
    desk.pass_time(LIMITS.get_timeout_s)
    assert desk.next().reason is Reason.TIMEOUT
    desk.store.plan = FaultPlan()
    desk.get(0)
    desk.next()
    assert not desk.worker.is_reliable, "one answer makes no habit"
