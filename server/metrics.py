"""Engine and tiers as Prometheus text; every number is read from frozen statistics.

Names begin with `jaxserve_`, or are vLLM's (see `vllm_metrics`); times are in seconds, sizes in
bytes. Label `tier` and `source` are "device", "host" or a store's name. Knows nothing of engines or
routes.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from jaxserve.kv.stats import KVStats, StoreStats
from jaxserve.kv.stores.stats import LATENCY_BOUNDS_S, OperationStats
from jaxserve.scheduler.stats import SchedulerStats
from jaxserve.server.vllm_metrics import vllm_metrics
from jaxserve.server.watch import Watch

METRICS_TYPE = CONTENT_TYPE_LATEST
PREFIX = "jaxserve_"
OPERATIONS = ("probe", "get", "put", "alone")


def render(
    engine: SchedulerStats | None,
    kv: KVStats | None,
    num_live: int,
    watch: Watch | None = None,
    model_name: str = "",
) -> bytes:
    """The text of one scrape.

    Args:
        engine, kv: of the engine; None: it has none to tell.
        num_live: requests that the server has taken and not answered.
        watch: what the server counted, for the metrics that vLLM has, too.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(engine, kv, num_live))
    if watch is not None:
        registry.register(_Fixed(list(vllm_metrics(model_name, watch, engine))))
    return generate_latest(registry)


class _Fixed:
    """A collector over metrics that are there."""

    def __init__(self, metrics: list[Metric]):
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


class _Snapshot:
    """A collector over values that do not change."""

    def __init__(self, engine: SchedulerStats | None, kv: KVStats | None, num_live: int):
        self._engine, self._kv, self._num_live = engine, kv, num_live

    def collect(self) -> Iterator[Metric]:
        yield _gauge("requests_live", "requests taken and not answered yet", self._num_live)
        if self._engine is not None:
            yield from _engine(self._engine)
        if self._kv is not None:
            yield from _tiers(self._kv)
            yield from _stores(self._kv.stores)


def _engine(stats: SchedulerStats) -> Iterator[Metric]:
    yield _gauge("requests_running", "sequences in a slot of the device", stats.num_running)
    yield _gauge("requests_waiting", "sequences that wait for one", stats.num_waiting)
    yield _counter("steps", "steps planned", stats.num_steps)
    tokens = {
        ("prefill",): stats.scheduled_prefill_tokens,
        ("decode",): stats.scheduled_decode_tokens,
    }
    yield _counters("tokens", "positions computed", ("kind",), tokens)
    yield _counter("preemptions", "sequences put back into the queue", stats.num_preemptions)
    yield _counter(
        "recomputed_tokens", "positions computed again after a preemption", stats.recomputed_tokens
    )
    pages = {
        (str(index), state): count
        for index, group in enumerate(stats.pages)
        for state, count in (
            ("free", group.num_free),
            ("cached", group.num_cached),
            ("in_use", group.num_in_use),
        )
    }
    yield _gauges("kv_pages", "device pages by KV group and state", ("group", "state"), pages)


def _tiers(stats: KVStats) -> Iterator[Metric]:
    tiers = stats.tiers
    tier = ("tier",)
    bytes_of = {(one.name,): one.num_bytes for one in tiers}
    yield _gauges(
        "kv_resident_bytes", "bytes of blocks that can be found, transfers left out", tier, bytes_of
    )
    blocks_of = {(one.name,): one.num_blocks for one in tiers}
    yield _gauges("kv_resident_blocks", "blocks that can be found", tier, blocks_of)
    bounds = {(one.name,): one.max_bytes for one in tiers}
    yield _gauges("kv_max_bytes", "budget; 0: not bounded here", tier, bounds)
    pins = {(one.name,): one.num_pinned for one in tiers}
    yield _gauges("kv_pinned_blocks", "blocks that may not be evicted", tier, pins)
    evicted = {(one.name,): one.num_evicted for one in tiers}
    yield _counters("kv_evicted_blocks", "blocks that left to make room", tier, evicted)
    damaged = {(one.name,): one.num_damaged for one in tiers[2:]}
    yield _counters("kv_damaged_records", "records that a store found damaged", tier, damaged)
    yield _counter(
        "kv_queried_tokens", "tokens of requests that looked for cached ones", stats.queried_tokens
    )
    source = ("source",)
    yield _counters(
        "kv_hit_tokens", "prompt tokens not computed, by where they were", source, stats.hit_tokens
    )
    yield _counters(
        "kv_loaded_blocks", "blocks of lower tiers that were used", source, stats.loaded_blocks
    )
    yield _counters(
        "kv_lost_blocks", "blocks asked of stores that did not come", source, stats.lost_blocks
    )
    moved = {
        ("device_to_host", "host"): stats.saved_bytes,
        ("host_to_device", "host"): stats.loaded_bytes,
    }
    for store in stats.stores:
        moved["host_to_store", store.name] = store.worker.bytes_written
        moved["store_to_host", store.name] = store.worker.bytes_read
    yield _counters("kv_moved_bytes", "bytes moved between tiers", ("direction", "tier"), moved)
    drops = {("host",): stats.dropped_saves + stats.failed_saves}
    drops |= {(store.name,): store.worker.dropped_writes for store in stats.stores}
    yield _counters("kv_dropped_blocks", "blocks that a tier was offered and lacks", tier, drops)
    rejected = {verdict: count for verdict, count in stats.verdicts.items() if verdict != "ok"}
    yield _counters("kv_rejected_records", "records that failed their check", ("reason",), rejected)
    yield _counters(
        "kv_plan_decisions", "what was done about blocks below", ("choice",), stats.decisions
    )


def _stores(stores: Iterable[StoreStats]) -> Iterator[Metric]:
    latency = HistogramMetricFamily(
        PREFIX + "kv_operation_seconds",
        "calls of a store, from submission to answer",
        labels=("store", "operation"),
    )
    ended: dict[tuple[str, ...], float] = {}
    queued: dict[tuple[str, ...], float] = {}
    queued_bytes: dict[tuple[str, ...], float] = {}
    breakers: dict[tuple[str, ...], float] = {}
    openings: dict[tuple[str, ...], float] = {}
    stuck: dict[tuple[str, ...], float] = {}
    records: dict[tuple[str, ...], float] = {}
    for store in stores:
        name, worker = store.name, store.worker
        for operation in OPERATIONS:
            one: OperationStats = getattr(worker, operation)
            latency.add_metric((name, operation), _buckets(one), one.seconds)
            ended |= {
                (name, operation, "failed"): one.failures,
                (name, operation, "timeout"): one.timeouts,
                (name, operation, "refused"): one.refused,
            }
        queued |= {(name, "load"): worker.queued_loads, (name, "write"): worker.queued_writes}
        queued_bytes |= {
            (name, "load"): worker.queued_load_bytes,
            (name, "write"): worker.queued_write_bytes,
        }
        breakers |= {
            (name, "load"): float(worker.load_breaker != "closed"),
            (name, "write"): float(worker.write_breaker != "closed"),
        }
        openings[name,] = worker.num_breaker_openings
        stuck[name,] = worker.stuck_threads
        for status in ("stored", "present", "declined", "full", "failed"):
            records[name, status] = getattr(worker, status)
    yield latency
    lane = ("store", "lane")
    yield _counters(
        "kv_operation_errors", "calls that ended badly", ("store", "operation", "how"), ended
    )
    yield _gauges("kv_queued_calls", "calls that wait for a thread", lane, queued)
    yield _gauges("kv_queued_bytes", "what they would move", lane, queued_bytes)
    yield _gauges("kv_breaker_open", "1: the store is left alone for now", lane, breakers)
    yield _counters("kv_breaker_openings", "how often it was left alone", ("store",), openings)
    yield _gauges("kv_stuck_threads", "threads in a call that was given up", ("store",), stuck)
    yield _counters("kv_put_records", "records written, by result", ("store", "status"), records)


def _buckets(stats: OperationStats) -> list[Any]:
    bounds = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
    return list(zip(bounds, itertools.accumulate(stats.latency_counts), strict=True))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _gauges(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counters(
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Mapping[tuple[str, ...], float] | Mapping[str, float],
) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric((key,) if isinstance(key, str) else key, value)
    return family
