"""How much time, memory and patience a `StoreWorker` has."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Bounds of one worker.

    Attributes:
        num_load_threads, num_write_threads: calls of the store at the same time, per lane.
        max_queued_loads: loads that may wait; beyond it the caller has lost count, not the store.
        max_queued_write_bytes: writes beyond this are dropped.
        scratch_bytes: memory of each thread once used; larger calls are made in several steps.
        probe_timeout_s, get_timeout_s, put_timeout_s, alone_timeout_s: from submission to callback.
        max_failures: in a row, after which a lane's breaker opens.
        min_backoff_s, max_backoff_s: how long it stays open.
        sweep_s: how often what has expired is removed.
        prior_latency_s, prior_bytes_per_s: assumed of loads until there are measurements.
    """

    num_load_threads: int = 4
    num_write_threads: int = 2
    max_queued_loads: int = 4096
    max_queued_write_bytes: int = 128 << 20
    scratch_bytes: int = 16 << 20
    probe_timeout_s: float = 1.0
    get_timeout_s: float = 10.0
    put_timeout_s: float = 30.0
    alone_timeout_s: float = 60.0
    max_failures: int = 3
    min_backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    sweep_s: float = 60.0
    prior_latency_s: float = 0.002
    prior_bytes_per_s: float = 1e9
