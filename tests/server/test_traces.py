"""Spans of ended requests: what they say, whose trace they continue, how they reach a collector."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxserve.server.traces import Tracer
from jaxserve.server.watch import HttpRequest, Timing
from jaxserve.types import Request, SamplingParams

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ended(traceparent: str = "", reason: str = "stop") -> Timing:
    sampling = SamplingParams(temperature=0.5, max_tokens=20, seed=0)
    return Timing(
        Request("r-0", (5, 6, 7), sampling),
        HttpRequest("http-id", "/v1/chat/completions", traceparent),
        begun_s=100.0,
        queued_s=0.5,
        first_s=101.5,
        last_s=103.5,
        ended_s=103.5,
        num_tokens=9,
        num_cached=2,
        reason=reason,
    )


def test_a_span_tells_usage_and_times_and_continues_the_clients_trace():
    exporter = InMemorySpanExporter()
    tracer = Tracer(SimpleSpanProcessor(exporter))
    tracer.listen(ended(f"00-{TRACE}-{SPAN}-01"))
    tracer.listen(ended("no trace at all", reason="error"))
    known, unknown = exporter.get_finished_spans()
    assert known.context is not None and known.parent is not None and known.attributes is not None
    assert f"{known.context.trace_id:032x}" == TRACE and f"{known.parent.span_id:016x}" == SPAN
    told = dict(known.attributes)
    assert told["gen_ai.operation.name"] == "chat"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 9)
    assert told["gen_ai.latency.time_in_queue"] == pytest.approx(0.5)
    assert told["gen_ai.latency.time_in_model_prefill"] == pytest.approx(1.0)
    assert told["gen_ai.latency.time_in_model_decode"] == pytest.approx(2.0)
    assert told["jaxserve.request_id"] == "http-id"
    assert known.start_time is not None and known.end_time is not None
    assert known.end_time - known.start_time == pytest.approx(3.5e9)
    assert unknown.parent is None and not unknown.status.is_ok


def test_spans_reach_a_collector_over_http():
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        tracer = Tracer.to_collector(f"http://127.0.0.1:{collector.server_port}")
        tracer.listen(ended(f"00-{TRACE}-{SPAN}-01"))
        tracer.close()
        collector.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert bytes.fromhex(TRACE) in body and b"gen_ai.usage.output_tokens" in body
