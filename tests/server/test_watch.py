"""Times and counts of requests: histograms, metrics under vLLM's names, the slow-request log."""

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.kv.stats import KVStats, TierStats
from jaxserve.scheduler.stats import GroupPages, SchedulerStats
from jaxserve.server.logs import JsonFormatter, TextFormatter
from jaxserve.server.metrics import render
from jaxserve.server.watch import CURRENT, HttpRequest, Timing, Watch, slow_request_log
from jaxserve.types import FinishReason, PromptReuse, Request, SamplingParams, TokenEvent
from tests.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]

SEEN_IN_DASHBOARDS = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
}


class Clock:
    def __init__(self):
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def request(name: str, num_prompt: int = 4) -> Request:
    sampling = SamplingParams(max_tokens=10, seed=0)
    return Request(name, tuple(range(num_prompt)), sampling, arrival_s=10.0)


def run_one(watch: Watch, clock: Clock, name: str = "a") -> None:
    """Queued 1 s, prefilled 2 s, three tokens 0.5 s apart."""
    watch.begin([request(name)])
    reuse = PromptReuse({}, None, 1.0)
    clock.now_s = 13.0
    watch.note([TokenEvent(name, 5, num_cached_tokens=3, reuse=reuse)])
    clock.now_s = 13.5
    watch.note([TokenEvent(name, 5)])
    clock.now_s = 14.0
    watch.note([TokenEvent(name, 1, FinishReason.STOP)])


def test_a_request_is_timed_from_its_arrival_to_its_last_token():
    clock, ended = Clock(), list[Timing]()
    watch = Watch(clock)
    watch.listeners.append(ended.append)
    run_one(watch, clock)
    (timing,) = ended
    assert (timing.queued_s, timing.prefill_s, timing.decode_s, timing.total_s) == (1, 2, 1, 4)
    assert (timing.num_tokens, timing.num_cached, timing.reason) == (3, 3, "stop")
    assert watch.between_s.total == 1.0 and sum(watch.between_s.counts) == 2
    assert watch.num_prompt_tokens == 4 and watch.num_generated_tokens == 3


def test_what_ends_without_an_event_is_counted_by_its_reason_and_only_once():
    watch = Watch(Clock())
    watch.begin([request("a"), request("b"), request("c")])
    watch.end(["a"], "abort")
    watch.end(["a", "b"], "stop")
    watch.end(["c", "never"], "error")
    assert watch.ended == {"abort": 1, "stop": 1, "error": 1, "length": 0}


def test_metrics_have_vllms_names_types_and_labels():
    clock = Clock()
    watch = Watch(clock)
    run_one(watch, clock)
    pages = (GroupPages(100, 50, 25, 25),)
    stats = SchedulerStats(3, 2, 9, 1, 0, 10, 20, 40, 30, pages)
    text = render(stats, None, 5, watch, "some/model").decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, kind in SEEN_IN_DASHBOARDS.items():
        assert families[name].type == kind
        for sample in families[name].samples:
            assert sample.labels["model_name"] == "some/model" and sample.labels["engine"] == "0"
    values = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["vllm:kv_cache_usage_perc", None] == 0.25
    assert values["vllm:request_success_total", "stop"] == 1
    assert values["vllm:request_queue_time_seconds_sum", None] == 1.0
    assert values["vllm:inter_token_latency_seconds_count", None] == 2
    assert values["vllm:prefix_cache_hits_total", None] == 30


def test_a_server_counts_what_its_clients_got(serve: Any):
    async def main() -> str:
        async with serve(FakeEngine(step_s=0.001)) as http:
            for stop in (None, ["world"]):
                body = {"prompt": "Hello", "max_tokens": 20, "stop": stop}
                await http.post("/v1/completions", json=body)
            return (await http.get("/metrics")).text

    text = asyncio.run(main())
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",' in text
    ended = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in ended) == 2
    assert not any("abort" in line and not line.endswith(" 0.0") for line in ended)


def test_a_slow_request_is_logged_with_what_it_waited_for(caplog: pytest.LogCaptureFixture):
    clock = Clock()
    watch = Watch(clock)
    watch.listeners.append(slow_request_log(3.0))
    token = CURRENT.set(HttpRequest("id-7", "/v1/completions"))
    run_one(watch, clock)
    CURRENT.reset(token)
    (record,) = caplog.records
    told = json.loads(JsonFormatter().format(record))
    assert told["message"] == "slow request" and told["request_id"] == "id-7"
    assert (told["queued_s"], told["prefill_s"], told["decode_s"]) == (1.0, 2.0, 1.0)
    assert told["level"] == "warning" and told["path"] == "/v1/completions"
    assert "queued_s=1.0" in TextFormatter().format(record)
    caplog.clear()
    clock.now_s = 10.0
    watch.listeners[0] = slow_request_log(100.0)
    run_one(watch, clock)
    assert not caplog.records


def test_each_request_has_one_log_line_with_its_own_id(serve: Any):
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Lines()
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("jaxserve.server.guard")
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    async def main() -> list[httpx.Response]:
        async with serve(FakeEngine()) as http:
            body = {"prompt": "Hello", "max_tokens": 2}
            ids = ["mine-1", "no\u00e9 good".encode("latin-1"), b"x" * 200]
            return [
                await http.post("/v1/completions", json=body, headers={"X-Request-Id": one})
                for one in ids
            ]

    try:
        responses = asyncio.run(main())
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    told = [json.loads(line) for line in lines]
    assert [one["request_id"] for one in told] == [r.headers["x-request-id"] for r in responses]
    assert told[0]["request_id"] == "mine-1" and len({one["request_id"] for one in told}) == 3
    assert all(one["status"] == 200 and one["path"] == "/v1/completions" for one in told)


def test_a_text_log_line_stays_one_line_whatever_is_in_it():
    record = logging.makeLogRecord({"msg": "a\nb", "levelname": "INFO", "path": "/x\r\nFAKE"})
    assert "\n" not in TextFormatter().format(record)


def test_each_query_of_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((ROOT / "docs" / "grafana" / "jaxserve.json").read_text())
    pages = (GroupPages(100, 50, 25, 25),)
    stats = SchedulerStats(3, 2, 9, 1, 0, 10, 20, 40, 30, pages)
    tier = TierStats("host", 1, 1, 1)
    one = {"host": 1}
    kv = KVStats(
        *(0.0, (tier,), (), 1, one, one, one, 0, 0, 0, 0, 0, {"stale": 1}, {"load": 1}, 0, 0)
    )
    clock = Clock()
    watch = Watch(clock)
    run_one(watch, clock)
    text = render(stats, kv, 5, watch, "some/model").decode()
    there = {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"(?:vllm:|jaxserve_)\w+", query)}
    assert len(queries) > 20 and asked <= there, asked - there
