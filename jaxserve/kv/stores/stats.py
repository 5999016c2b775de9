"""Counters of one `StoreWorker`. Mutated under the worker's lock; snapshots are frozen."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.kv.stores.base import PutStatus
from jaxserve.kv.stores.breaker import BreakerState
from jaxserve.kv.stores.tasks import Operation, Reason, Task

LATENCY_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper bounds of the latency histograms' buckets; one more bucket is unbounded."""


@dataclass(frozen=True, slots=True)
class OperationStats:
    """Of one kind of call.

    Attributes:
        calls: that have ended, however.
        records: keys or records in them.
        failures, timeouts, refused: calls that ended so; the rest was answered.
        seconds: total, from submission to callback.
        latency_counts: calls per bucket of `LATENCY_BOUNDS_S`.
    """

    calls: int = 0
    records: int = 0
    failures: int = 0
    timeouts: int = 0
    refused: int = 0
    seconds: float = 0.0
    latency_counts: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A moment of a worker.

    Attributes:
        probe, get, put, alone: each kind of call.
        probe_hits, probe_misses, hits, misses: keys; the latter two of gets.
        bytes_read, bytes_written: of records that were handed over, or newly stored.
        stored, present, declined, full, failed: records by `PutStatus`.
        dropped_writes: records refused at submission, or given up before they were written.
        refused_loads: load calls refused at submission (breaker open, all threads stuck).
        cancelled: calls.
        queued_*: what waits for a thread.
        stuck_threads: away in a call that was given up.
        load_breaker, write_breaker: state; num_breaker_openings: of both.
        load_bytes_per_s, write_bytes_per_s: throughput of the largest calls.
    """

    probe: OperationStats
    get: OperationStats
    put: OperationStats
    alone: OperationStats
    probe_hits: int
    probe_misses: int
    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    stored: int
    present: int
    declined: int
    full: int
    failed: int
    dropped_writes: int
    refused_loads: int
    cancelled: int
    queued_loads: int
    queued_load_bytes: int
    queued_writes: int
    queued_write_bytes: int
    stuck_threads: int
    load_breaker: BreakerState
    write_breaker: BreakerState
    num_breaker_openings: int
    load_bytes_per_s: float
    write_bytes_per_s: float


class StatsCounter:
    """Adds up what a worker reports; its owner locks."""

    def __init__(self):
        self.cancelled = 0
        self.refused_loads = 0
        self._dropped_writes = 0
        self._calls = {operation: OperationStats() for operation in Operation}
        self._bytes = dict.fromkeys(Operation, 0)
        self._statuses = dict.fromkeys(PutStatus, 0)
        self._found = dict.fromkeys(Operation, 0)

    def drop(self, num_records: int) -> None:
        """Writes were refused."""
        self._dropped_writes += num_records

    def ended(self, task: Task, reason: Reason, seconds: float) -> None:
        """A call is over."""
        operation, values = task.operation, task.values
        old = self._calls[operation]
        counts = list(old.latency_counts)
        counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self._calls[operation] = replace(
            old,
            calls=old.calls + 1,
            records=old.records + len(values),
            failures=old.failures + (reason is Reason.FAILED),
            timeouts=old.timeouts + (reason is Reason.TIMEOUT),
            refused=old.refused + (reason in (Reason.REFUSED, Reason.CLOSED)),
            seconds=old.seconds + seconds,
            latency_counts=tuple(counts),
        )
        self._bytes[operation] += task.moved_bytes
        if operation is Operation.PUT:
            for status in values:
                if status is PutStatus.FAILED and reason not in (Reason.OK, Reason.FAILED):
                    self._dropped_writes += 1
                else:
                    self._statuses[status] += 1
        else:
            self._found[operation] += sum(map(bool, values))

    def snapshot(self, **gauges: Any) -> WorkerStats:
        """The counters, beside gauges that the worker knows."""
        probe, get = self._calls[Operation.PROBE], self._calls[Operation.GET]
        return WorkerStats(
            probe=probe,
            get=get,
            put=self._calls[Operation.PUT],
            alone=self._calls[Operation.ALONE],
            probe_hits=self._found[Operation.PROBE],
            probe_misses=probe.records - self._found[Operation.PROBE],
            hits=self._found[Operation.GET],
            misses=get.records - self._found[Operation.GET],
            bytes_read=self._bytes[Operation.GET],
            bytes_written=self._bytes[Operation.PUT],
            stored=self._statuses[PutStatus.STORED],
            present=self._statuses[PutStatus.PRESENT],
            declined=self._statuses[PutStatus.DECLINED],
            full=self._statuses[PutStatus.FULL],
            failed=self._statuses[PutStatus.FAILED],
            dropped_writes=self._dropped_writes,
            refused_loads=self.refused_loads,
            cancelled=self.cancelled,
            **gauges,
        )
