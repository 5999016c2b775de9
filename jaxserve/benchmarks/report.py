"""What a person reads after a run: a table, and histograms made of characters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BLOCKS = " ▏▎▍▌▋▊▉█"
NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token, after the first",
    "itl": "inter-token latency",
    "e2el": "whole request",
}
COUNTS = (
    ("completed", "requests answered"),
    ("failed", "requests failed"),
    ("duration", "duration (s)"),
    ("total_input_tokens", "input tokens"),
    ("total_output_tokens", "output tokens"),
    ("request_throughput", "requests/s"),
    ("request_goodput", "requests/s that met the goals"),
    ("output_throughput", "output tokens/s"),
    ("max_output_tokens_per_s", "output tokens/s, busiest second"),
    ("total_token_throughput", "tokens/s, in and out"),
    ("max_concurrent_requests", "most requests at once"),
)


def table(summary: Mapping[str, Any]) -> str:
    """The figures of `summary.summarise` as lines of at most 80 characters."""
    lines = []
    for key, label in COUNTS:
        if key in summary:
            lines.append(f"{label:<36}{_number(summary[key]):>14}")
    cached, total = summary["cached_tokens"], summary["total_input_tokens"]
    if cached:
        by_source = ", ".join(f"{s} {n:,}" for s, n in summary["cached_tokens_by_source"].items())
        share = f"{100 * cached / max(1, total):.1f} %"
        lines.append(
            f"{'input tokens from a cache':<36}{cached:>14,}  {share}  {by_source}".rstrip()
        )
    lines += ["", *_times(summary)]
    for kind, count in summary["errors"].items():
        lines.append(f"failed: {count:,} times {kind}")
    if summary["first_error"]:
        lines.append(f"  first: {summary['first_error'][:160]}")
    if summary["tokens_counted_by"] != "usage":
        lines.append("the server sends no usage: pieces of answers were counted, not tokens")
    return "\n".join(lines + _generator(summary))


def histogram(values: Sequence[float], unit: str, *, width: int = 50, num_bins: int = 10) -> str:
    """Counts by value as bars; bins are equally wide on a logarithmic axis if values spread far."""
    array = np.asarray(values, float)
    low, high = float(array.min()), float(array.max())
    if low > 0 and high > 30 * low:
        edges = np.geomspace(low, high, num_bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    counts, _ = np.histogram(array, edges)
    most = max(int(counts.max()), 1)
    lines = []
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        eighths = round(8 * width * int(count) / most)
        if count and not eighths:
            eighths = 1
        bar = BLOCKS[-1] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")
        lines.append(f"{_short(start):>8} - {_short(end):>8} {unit} {bar} {count if count else ''}")
    return "\n".join(line.rstrip() for line in lines)


def _times(summary: Mapping[str, Any]) -> list[str]:
    columns = [k.removesuffix("_ttft_ms") for k in summary if k.endswith("_ttft_ms")]
    if not columns:
        return []
    lines = [f"{'ms':<40}" + "".join(f"{column:>10}" for column in columns)]
    for metric, label in NAMES.items():
        if f"mean_{metric}_ms" in summary:
            values = (f"{summary[f'{column}_{metric}_ms']:>10,.2f}" for column in columns)
            lines.append(f"{label:<40}" + "".join(values))
    return [*lines, ""]


def _generator(summary: Mapping[str, Any]) -> list[str]:
    text = (
        f"load generator: {100 * summary['generator_cpu_share']:.0f} % of a core, its loop late by "
        f"{summary['generator_lag_p99_ms']:.1f} ms (p99), requests sent late by "
        f"{summary['generator_late_p99_ms']:.1f} ms (p99)"
    )
    if summary["generator_kept_up"]:
        return [text]
    return [text, "  it did not keep up: latencies are partly its own; lower the rate, or run two"]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
