"""OpenTelemetry traces: one span for each request to the engine, with what it waited for.

The span begins when the request arrived and ends with its last token; it continues the client's
trace if there was a `traceparent`. Names of attributes follow the gen_ai conventions. Prompts and
answers are no part of it. Needs the optional packages of `jaxserve[traces]`.
"""

import time
from typing import TYPE_CHECKING, Any

import jaxserve
from jaxserve.errors import ConfigError
from jaxserve.server.watch import Timing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanProcessor

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/responses": "chat"}
SECOND_NS = 10**9


class Tracer:
    """Makes spans of ended requests.

    Args:
        processor: where spans go.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, processor: "SpanProcessor"):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({"service.name": "jaxserve"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxserve", jaxserve.__version__)

    @classmethod
    def to_collector(cls, endpoint: str) -> "Tracer":
        """Send spans to an OTLP collector over HTTP, in batches, from a thread."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "otlp_endpoint needs OpenTelemetry: pip install 'jaxserve[traces]'"
            ) from error
        url = endpoint.rstrip("/")
        url = url if url.endswith("/v1/traces") else url + "/v1/traces"
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=5)))

    def listen(self, timing: Timing) -> None:
        """A listener of the watch: an ended request becomes a span."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": timing.http.traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        # The watch counts in monotonic time; spans are in wall time.
        offset_ns = time.time_ns() - int(time.monotonic() * SECOND_NS)
        operation = OPERATIONS.get(timing.http.path, "text_completion")
        span = self._tracer.start_span(
            f"{operation} request",
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=offset_ns + int(timing.begun_s * SECOND_NS),
            attributes=attributes_of(timing, operation),
        )
        if timing.reason == "error":
            span.set_status(trace.StatusCode.ERROR)
        span.end(offset_ns + int(timing.ended_s * SECOND_NS))

    def close(self) -> None:
        """Send what is left; waits a few seconds at most."""
        self._provider.shutdown()


def attributes_of(timing: Timing, operation: str) -> dict[str, Any]:
    """What a span says."""
    sampling = timing.request.sampling
    told: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.response.id": timing.request.request_id,
        "gen_ai.response.finish_reasons": [timing.reason],
        "gen_ai.request.max_tokens": sampling.max_tokens or 0,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.usage.input_tokens": len(timing.request.prompt_ids),
        "gen_ai.usage.output_tokens": timing.num_tokens,
        "gen_ai.latency.e2e": timing.total_s,
        "jaxserve.request_id": timing.http.request_id,
        "jaxserve.cached_tokens": timing.num_cached,
    }
    if timing.first_s:
        told |= {
            "gen_ai.latency.time_in_queue": timing.queued_s,
            "gen_ai.latency.time_to_first_token": timing.first_s - timing.begun_s,
            "gen_ai.latency.time_in_model_prefill": timing.prefill_s,
            "gen_ai.latency.time_in_model_decode": timing.decode_s,
        }
    return told
