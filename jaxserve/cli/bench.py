"""`jaxserve bench`: load for any OpenAI server, and the engine's own speed in this process."""

from jaxserve.cli.app import Entry, Group

group = Group(
    "bench",
    "Measure speed.",
    {
        "serve": Entry(
            "jaxserve.cli.bench_serve:bench_serve",
            "send load to any OpenAI server and report latencies and throughput",
        ),
        "throughput": Entry(
            "jaxserve.cli.bench_in_process:throughput",
            "tokens per second of many prompts in this process, beside the machine's limit",
        ),
        "latency": Entry(
            "jaxserve.cli.bench_in_process:latency",
            "seconds of one batch in this process, beside the machine's limit",
        ),
    },
)
