"""Makes a store asynchronous, and keeps whatever it does away from the serving loop.

Submitting never blocks: a call is queued, or refused at once. Loads (probe, get) and writes (put)
have threads of their own. Every call has a deadline; its callback comes by then even if the store
hangs, and from the callback on the caller's memory is the caller's: a store only ever sees the
scratch of the thread that it runs on. What it read is copied out on completion, in a short
hand-over that neither a deadline nor a cancellation interrupts.

Back-pressure drops writes, never loads. Callbacks run on the worker's threads and must be cheap;
each submitted call gets exactly one, unless it was cancelled. The worker owns the store. Knows
nothing of what records hold, of pages, or of jax.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.copying import copy_into
from jaxserve.kv.stores.base import PutStatus, SealedRecord, Store
from jaxserve.kv.stores.costs import CostPrior, OperationCosts
from jaxserve.kv.stores.dispatch import Dispatcher
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.stats import StatsCounter, WorkerStats
from jaxserve.kv.stores.tasks import Operation, Outcome, Scratch, Task, batches

_LOG = logging.getLogger(__name__)
_ANY_KEY = bytes(32)
LONG_CALL_S = 0.1
MOST_AT_ONCE = 1024
"""Keys that are looked up on the caller's thread: a few milliseconds."""

MOST_PIECEMEAL_COST = 1.25
"""Most that a record may cost in a short call, in relation to a long one."""

LEAST_ON_TIME = 4
"""Loads in a row that must have come in time before a store counts as reliable."""

LATE, LATE_SLACK_S = 2.0, 0.005
"""A load is late after so many times its estimate, and a moment for busy cores."""

_PROBED_KEYS_PER_S = 1e5  # until measured
R = TypeVar("R")


class StoreWorker:
    """One store and the threads that talk to it. All methods may be called from any thread.

    Each `submit_*` returns the call, for `cancel`, or None if it was refused: then no callback
    will follow. `timeout_s` is from submission to callback; by default that of the limits.
    """

    def __init__(
        self,
        store: Store,
        limits: WorkerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store = store
        self.name = store.name
        self.limits = limits = limits or WorkerLimits()
        loads = CostPrior(limits.prior_latency_s, limits.prior_bytes_per_s)
        probes = CostPrior(limits.prior_latency_s, _PROBED_KEYS_PER_S)
        priors = {Operation.PROBE: probes, Operation.GET: loads, Operation.PUT: loads}
        self._costs = {kind: OperationCosts(prior, clock) for kind, prior in priors.items()}
        self._clock = clock
        self._probe_at_once: Callable[[Sequence[BlockHash]], list[bool] | None] | None
        self._probe_at_once = getattr(store, "probe_at_once", None)  # see InMemoryIndex
        self._stats = StatsCounter()
        self._num_on_time = 0  # loads in a row
        self._dispatch = Dispatcher(
            self.name, limits, clock, lambda: store.probe([_ANY_KEY]), store.sweep, self._stats
        )

    def probe_at_once(self, keys: Sequence[BlockHash]) -> list[bool] | None:
        """Which keys are there, if the store knows without asking anybody; else None."""
        if self._probe_at_once is None or len(keys) > MOST_AT_ONCE:
            return None
        with self._dispatch.lock:
            if not self._dispatch.takes_loads():
                return None
        try:
            return self._probe_at_once(keys)
        except StoreError:
            return None

    def submit_probe(
        self,
        keys: Sequence[BlockHash],
        callback: Callable[[Outcome[bool]], None],
        timeout_s: float | None = None,
        *,
        is_counted: bool = True,
    ) -> Task | None:
        """Ask which keys are there; in the statistics, if it is counted."""
        keys = tuple(keys)

        def run(task: Task, scratch: Scratch) -> bool:
            found = self._timed(
                Operation.PROBE, lambda: self.store.probe(keys), lambda _: len(keys)
            )
            if self._dispatch.begin_handover(task):
                task.values[:] = found
            return True

        misses = [False] * len(keys)
        return self._submit_load(
            Operation.PROBE, run, callback, misses, 0, timeout_s, is_counted=is_counted
        )

    def submit_get(
        self,
        keys: Sequence[BlockHash],
        buffers: Sequence[memoryview],
        callback: Callable[[Outcome[int]], None],
        timeout_s: float | None = None,
    ) -> Task | None:
        """Read records into the caller's buffers."""
        targets = [buffer.cast("B") for buffer in buffers]

        def consume(index: int, view: memoryview) -> None:
            copy_into(targets[index][: len(view)], view)

        lengths = [len(target) for target in targets]
        return self.submit_read(keys, lengths, consume, callback, timeout_s)

    def submit_read(
        self,
        keys: Sequence[BlockHash],
        max_lengths: Sequence[int],
        consume: Callable[[int, memoryview], None],
        callback: Callable[[Outcome[int]], None],
        timeout_s: float | None = None,
        *,
        is_counted: bool = True,
    ) -> Task | None:
        """Read records and show each to `consume` once it is complete, without a copy between.

        Args:
            keys: what to read, most wanted first.
            max_lengths: a longer record counts as missing.
            consume: called on a worker thread with the key's index and a read-only view of the
                record that is valid only within the call; never called after the callback, nor
                after `cancel` returned True. If it raises, the record counts as missing.
            is_counted: in the statistics.
        """
        keys, lengths = tuple(keys), tuple(max_lengths)

        def run(task: Task, scratch: Scratch) -> bool:
            for part in batches(lengths, self.limits.scratch_bytes):
                if not self._dispatch.has_time(task):
                    return False
                wanted = keys[part.start : part.stop]
                views = scratch.views(lengths[part.start : part.stop])
                reads = self._timed(
                    Operation.GET, lambda k=wanted, v=views: self.store.get(k, v), sum
                )
                if not self._dispatch.begin_handover(task):
                    return True
                for index, view, num_bytes in zip(part, views, reads, strict=True):
                    if num_bytes and self._consumed(consume, index, view[:num_bytes]):
                        task.values[index] = num_bytes
                        task.moved_bytes += num_bytes
                self._dispatch.end_handover(task)
            return True

        misses = [0] * len(keys)
        num_bytes = sum(lengths)
        return self._submit_load(
            Operation.GET, run, callback, misses, num_bytes, timeout_s, is_counted=is_counted
        )

    def submit_put(
        self,
        records: Sequence[SealedRecord],
        callback: Callable[[Outcome[PutStatus]], None],
        timeout_s: float | None = None,
    ) -> Task | None:
        """Write records; their parts must stay as they are until the callback.

        Refused, and counted, if the queue is full, if what is queued already would take longer
        than the deadline, or while the breaker is open.
        """
        records = tuple(records)
        lengths = [record.info.num_bytes for record in records]
        timeout_s = self.limits.put_timeout_s if timeout_s is None else timeout_s

        def run(task: Task, scratch: Scratch) -> bool:
            for part in batches(lengths, self.limits.scratch_bytes):
                if not self._dispatch.has_time(task) or not self._dispatch.begin_handover(task):
                    return False
                copies = _copies(records[part.start : part.stop], scratch)
                self._dispatch.end_handover(task)
                num_bytes = lengths[part.start : part.stop]
                put = self._timed(
                    Operation.PUT,
                    lambda c=copies: self.store.put(c),
                    lambda statuses, n=num_bytes: _stored_bytes(statuses, n),
                )
                if not self._dispatch.begin_handover(task):
                    return True
                task.values[part.start : part.stop] = put
                task.moved_bytes += _stored_bytes(put, num_bytes)
                self._dispatch.end_handover(task)
            return True

        misses = [PutStatus.FAILED] * len(records)
        task = self._task(Operation.PUT, run, callback, misses, sum(lengths), timeout_s)
        with self._dispatch.lock:
            lane = self._dispatch.writes
            queued = lane.queued_bytes + task.num_bytes
            wait_s = self._costs[Operation.PUT].seconds(queued) / lane.num_threads
            is_room = queued <= self.limits.max_queued_write_bytes and wait_s <= timeout_s
            if is_room and self._dispatch.submit(task):
                return task
            self._stats.drop(len(records))
            return None

    def submit_alone(
        self,
        operation: Callable[[Store], R],
        callback: Callable[[Outcome[R]], None],
        timeout_s: float | None = None,
    ) -> Task | None:
        """Run something on the store when all earlier writes are done and before any later one.

        For deletions: nothing that was submitted before can turn up again after. The outcome has
        one value if the operation returned, else none.
        """

        def run(task: Task, scratch: Scratch) -> bool:
            value = operation(self.store)
            if self._dispatch.begin_handover(task):
                task.values.append(value)
            return True

        timeout_s = self.limits.alone_timeout_s if timeout_s is None else timeout_s
        task = self._task(Operation.ALONE, run, callback, [], 0, timeout_s)
        with self._dispatch.lock:
            return task if self._dispatch.submit(task) else None

    def cancel(self, task: Task) -> bool:
        """Give a call up.

        Returns:
            True if the caller's memory is untouched from now on and no callback will come. False
            if the call is over, or so nearly that its callback is coming at once.
        """
        return self._dispatch.cancel(task)

    def estimate_load_s(
        self,
        num_bytes: int,
        num_records: int = 1,
        num_deviations: float = 0.0,
        num_calls: int = 1,
    ) -> float:
        """Expected seconds from submitting gets of so much to their callbacks; inf if refused.

        What is queued or running already counts. Records of one engine are of one length, so their
        number matters only for how a get would be cut into steps. So many calls share the bytes;
        as many as there are threads run side by side, and what calls cost was measured so, too.
        """
        costs, max_step = self._costs[Operation.GET], self.limits.scratch_bytes
        with self._dispatch.lock:
            if not self._dispatch.takes_loads():
                return math.inf
            lane = self._dispatch.loads
            num_free = lane.num_threads - lane.num_stuck
            is_busy = lane.num_running + lane.num_queued >= num_free
            ahead = lane.queued_bytes + lane.running_bytes if is_busy else 0
        call_bytes = num_bytes / num_calls
        step = min(call_bytes, max(max_step, num_bytes / max(num_records, 1)))
        call_s = costs.seconds(step, num_deviations) * call_bytes / max(step, 1)
        own_s = call_s * -(-num_calls // num_free)
        if not ahead:
            return own_s
        return own_s + costs.seconds(min(ahead, max_step)) * max(ahead / max_step, 1) / num_free

    def piece_records(self, record_bytes: int, most: int) -> int:
        """How many records to ask for in one call: as many as may be, but less of a slow store.

        A call that takes long leaves the caller without anything for as long. So it is halved
        while it takes more than `LONG_CALL_S`, unless latency would then cost too much.
        """
        latency_s = self._costs[Operation.PROBE].least_s()
        long_s = self._costs[Operation.GET].seconds(most * record_bytes)
        record_s = max(long_s - latency_s, 0.0) / most
        count = most
        while count > 1 and latency_s + count * record_s > LONG_CALL_S:
            half = count // 2
            if latency_s / half + record_s > MOST_PIECEMEAL_COST * long_s / most:
                break
            count = half
        return count

    def estimate_probe_s(self, num_keys: int) -> float:
        """Expected seconds of a probe of so many keys, queue not counted; inf if refused."""
        with self._dispatch.lock:
            if not self._dispatch.takes_loads():
                return math.inf
        return self._costs[Operation.PROBE].seconds(num_keys)

    @property
    def is_reliable(self) -> bool:
        """The last loads came when they were expected, and none is overdue now."""
        if self._num_on_time < LEAST_ON_TIME:
            return False
        now_s = self._clock()
        with self._dispatch.lock:
            running = list(self._dispatch.loads.running)
        return all(
            now_s - task.submitted_s <= self._late_s(task.operation, _amount(task))
            for task in running
        )

    def _late_s(self, operation: Operation, amount: int) -> float:
        return LATE * self._costs[operation].seconds(amount, 2.0) + LATE_SLACK_S

    def stats(self) -> WorkerStats:
        """All counters and gauges now."""
        with self._dispatch.lock:
            loads, writes = self._dispatch.loads, self._dispatch.writes
            breakers = self._dispatch.breakers
            return self._stats.snapshot(
                queued_loads=loads.num_queued,
                queued_load_bytes=loads.queued_bytes,
                queued_writes=writes.num_queued,
                queued_write_bytes=writes.queued_bytes,
                stuck_threads=loads.num_stuck + writes.num_stuck,
                load_breaker=breakers["load"].state,
                write_breaker=breakers["write"].state,
                num_breaker_openings=sum(one.num_openings for one in breakers.values()),
                load_bytes_per_s=self._costs[Operation.GET].units_per_s(),
                write_bytes_per_s=self._costs[Operation.PUT].units_per_s(),
            )

    def check_deadlines(self) -> None:
        """End what is too late now; a thread of the worker does this in time by itself."""
        self._dispatch.check_deadlines()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Finish queued writes, give up loads, end the threads and close the store.

        Returns within the time even if the store hangs; then its threads are left to the end of
        the process and the store is not closed.

        Returns:
            Whether everything ended well.
        """
        until_s = time.monotonic() + timeout_s
        is_done = self._dispatch.close(until_s)
        if self._dispatch.is_running:
            _LOG.warning("store %s hangs: closed without waiting for its threads", self.name)
            return False
        closer = threading.Thread(target=self._close_store, name=f"{self.name}-close", daemon=True)
        try:
            closer.start()
        except RuntimeError:  # from Python 3.12 on, while the interpreter ends
            self._close_store()
            return is_done
        closer.join(max(until_s - time.monotonic(), 0.1))
        return is_done and not closer.is_alive()

    def _task(
        self,
        operation: Operation,
        run: Callable[[Task, Scratch], bool],
        callback: Callable[[Outcome[Any]], None],
        values: list[Any],
        num_bytes: int,
        timeout_s: float,
    ) -> Task:
        now_s = self._clock()
        return Task(operation, run, callback, values, num_bytes, now_s, now_s + timeout_s)

    def _submit_load(
        self,
        operation: Operation,
        run: Callable[[Task, Scratch], bool],
        callback: Callable[[Outcome[Any]], None],
        values: list[Any],
        num_bytes: int,
        timeout_s: float | None,
        *,
        is_counted: bool,
    ) -> Task | None:
        is_get = operation is Operation.GET
        if timeout_s is None:
            timeout_s = self.limits.get_timeout_s if is_get else self.limits.probe_timeout_s
        task = self._task(operation, run, callback, values, num_bytes, timeout_s)
        amount = _amount(task)

        def note_late(seconds: float) -> None:
            self._num_on_time = 0
            self._costs[operation].observe(amount, seconds)

        task.on_late, task.is_counted = note_late, is_counted
        with self._dispatch.lock:
            is_room = self._dispatch.loads.num_queued < self.limits.max_queued_loads
            if is_room and self._dispatch.submit(task):
                return task
            self._stats.refused_loads += is_counted
            return None

    def _timed(
        self, operation: Operation, call: Callable[[], R], amount_of: Callable[[R], int]
    ) -> R:
        """Call the store and learn what it cost."""
        start_s = self._clock()
        result = call()
        seconds = self._clock() - start_s
        amount = amount_of(result)
        if amount:
            if operation is not Operation.PUT:
                is_on_time = seconds <= self._late_s(operation, amount)
                self._num_on_time = self._num_on_time + 1 if is_on_time else 0
            self._costs[operation].observe(amount, seconds)
        return result

    def _consumed(
        self, consume: Callable[[int, memoryview], None], index: int, view: memoryview
    ) -> bool:
        try:
            consume(index, view.toreadonly())
        except Exception:
            _LOG.exception("store %s: a record could not be handed over", self.name)
            return False
        return True

    def _close_store(self) -> None:
        try:
            self.store.close()
        except Exception as error:
            _LOG.warning("store %s did not close well: %s", self.name, error)


def _amount(task: Task) -> int:
    """What the cost of a load depends on: bytes of a get, keys of a probe."""
    return task.num_bytes if task.operation is Operation.GET else len(task.values)


def _stored_bytes(statuses: Sequence[PutStatus], lengths: Sequence[int]) -> int:
    pairs = zip(statuses, lengths, strict=True)
    return sum(length for status, length in pairs if status is PutStatus.STORED)


def _copies(records: Sequence[SealedRecord], scratch: Scratch) -> list[SealedRecord]:
    """The same records with their bytes in the scratch."""
    copies = []
    views = scratch.views([record.info.num_bytes for record in records])
    for record, view in zip(records, views, strict=True):
        start = 0
        for part in record.parts:
            flat = part.cast("B")
            copy_into(view[start : start + len(flat)], flat)
            start += len(flat)
        assert start == len(view), "a record's parts add up to its num_bytes"
        copies.append(SealedRecord(record.info, (view.toreadonly(),)))
    return copies
