"""Metrics under vLLM's names, where the meaning is the same: its dashboards and scalers work.

Labels are vLLM's, too: `model_name` and `engine`. The buckets' bounds are our own. What has no
counterpart here is left out, rather than told as 0.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from jaxserve.scheduler.stats import SchedulerStats
from jaxserve.server.watch import Histogram, Watch

LABELS = ("model_name", "engine")
ENGINE = "0"


def vllm_metrics(model_name: str, watch: Watch, engine: SchedulerStats | None) -> Iterator[Metric]:
    """All of them.

    Args:
        engine: None: the engine has no counters; what comes from them is left out.
    """
    labels = (model_name, ENGINE)

    def gauge(name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(labels, value)
        return family

    def counter(name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(labels, value)
        return family

    if engine is not None:
        yield gauge("vllm:num_requests_running", "sequences in a step", engine.num_running)
        yield gauge("vllm:num_requests_waiting", "sequences that wait", engine.num_waiting)
        yield gauge("vllm:kv_cache_usage_perc", "pages in use; 1 is all", _usage(engine))
        yield counter("vllm:prefix_cache_queries", "tokens looked up", engine.queried_tokens)
        yield counter("vllm:prefix_cache_hits", "tokens found", engine.hit_tokens)
        yield counter("vllm:num_preemptions", "preemptions", engine.num_preemptions)
    yield counter("vllm:prompt_tokens", "tokens of prompts", watch.num_prompt_tokens)
    yield counter("vllm:generation_tokens", "generated tokens", watch.num_generated_tokens)
    yield _ended(watch.ended, labels)
    for name, text, histogram in (
        ("time_to_first_token_seconds", "arrival to first token", watch.to_first_s),
        ("inter_token_latency_seconds", "between tokens of an answer", watch.between_s),
        ("e2e_request_latency_seconds", "arrival to end", watch.total_s),
        ("request_queue_time_seconds", "arrival to first step", watch.queued_s),
        ("request_prefill_time_seconds", "first step to first token", watch.prefill_s),
        ("request_decode_time_seconds", "first to last token", watch.decode_s),
        ("request_prompt_tokens", "tokens of a prompt", watch.prompt_tokens),
        ("request_generation_tokens", "tokens of an answer", watch.generated_tokens),
    ):
        yield _histogram("vllm:" + name, text, histogram, labels)


def _usage(engine: SchedulerStats) -> float:
    """Of the KV group that is fullest."""
    return max((pages.num_in_use / max(pages.num_pages, 1) for pages in engine.pages), default=0.0)


def _ended(ended: Mapping[str, int], labels: tuple[str, str]) -> Metric:
    family = CounterMetricFamily(
        "vllm:request_success", "requests that ended", labels=(*LABELS, "finished_reason")
    )
    for reason, count in ended.items():
        family.add_metric((*labels, reason), count)
    return family


def _histogram(name: str, text: str, histogram: Histogram, labels: tuple[str, str]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=LABELS)
    bounds = [*map(str, histogram.bounds), "+Inf"]
    counts = accumulate(histogram.counts)
    family.add_metric(labels, list(zip(bounds, counts, strict=True)), histogram.total)
    return family
