"""Figures from answers, with the names of vLLM's benchmark where they mean the same.

Times are in milliseconds where the name says so, and rates are per second. Failed requests count
as failed and nowhere else.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.benchmarks.client import Answer
from jaxserve.benchmarks.load import Load
from jaxserve.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
SLOW_LAG_MS = 20.0
BUSY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Goal:
    """A service-level objective: a request is good if its figure is at most so many ms."""

    metric: str
    limit_ms: float


def parse_goals(texts: Sequence[str]) -> list[Goal]:
    """`ttft:200`, `tpot:50`, `e2el:3000`; several may be separated by commas or blanks.

    Raises:
        ConfigError: something else.
    """
    goals = []
    for text in (part for given in texts for part in re.split(r"[,\s]+", given.strip()) if part):
        metric, _, number = text.partition(":")
        try:
            limit_ms = float(number)
        except ValueError:
            limit_ms = -1.0
        if metric not in ("ttft", "tpot", "e2el") or not limit_ms > 0:
            raise ConfigError(
                f"--goodput has {text!r:.60}; expected ttft, tpot or e2el with milliseconds, such "
                "as ttft:200"
            )
        goals.append(Goal(metric, limit_ms))
    return goals


def summarise(load: Load, percentiles: Sequence[float], goals: Sequence[Goal]) -> dict[str, Any]:
    """One flat mapping of everything that was measured."""
    good = [answer for answer in load.answers if not answer.error]
    duration_s = max(load.duration_s, 1e-9)
    num_input = sum(answer.prompt_tokens for answer in good)
    num_output = sum(answer.completion_tokens for answer in good)
    summary: dict[str, Any] = {
        "duration": round(load.duration_s, 3),
        "completed": len(good),
        "failed": len(load.answers) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": round(len(good) / duration_s, 4),
        "output_throughput": round(num_output / duration_s, 2),
        "total_token_throughput": round((num_input + num_output) / duration_s, 2),
        "max_output_tokens_per_s": busiest_second(good),
        "max_concurrent_requests": load.max_concurrency,
    }
    if goals:
        num_met = sum(_meets(answer, goals) for answer in good)
        summary["request_goodput"] = round(num_met / duration_s, 4)
        summary["goodput_share"] = round(num_met / max(1, len(load.answers)), 4)
    for metric, values in series(good).items():
        summary |= _statistics(metric, values, percentiles)
    summary["errors"] = dict(Counter(answer.error for answer in load.answers if answer.error))
    summary["first_error"] = next((a.message for a in load.answers if a.error and a.message), "")
    by_source = Counter[str]()
    for answer in good:
        by_source.update(answer.cached_by_source)
    summary["cached_tokens"] = sum(answer.cached_tokens for answer in good)
    summary["cached_tokens_by_source"] = dict(by_source)
    summary["tokens_counted_by"] = "usage" if all(a.is_counted for a in good) else "pieces"
    return summary | generator_lag(load)


def series(good: Sequence[Answer]) -> dict[str, list[float]]:
    """Milliseconds by metric; inter-token latencies of all answers together."""
    return {
        "ttft": [1e3 * answer.ttft_s for answer in good],
        "tpot": [1e3 * tpot for answer in good if (tpot := answer.tpot_s) is not None],
        "itl": [1e3 * gap for answer in good for gap in answer.gaps_s],
        "e2el": [1e3 * answer.latency_s for answer in good],
    }


def generator_lag(load: Load) -> dict[str, Any]:
    """Whether the generator itself was the limit."""
    late, lag = (1e3 * np.asarray(values or [0.0]) for values in (load.late_s, load.lag_s))
    lag_ms = float(np.percentile(lag, 99))
    return {
        "generator_late_p99_ms": round(float(np.percentile(late, 99)), 3),
        "generator_late_max_ms": round(float(late.max()), 3),
        "generator_lag_p99_ms": round(lag_ms, 3),
        "generator_cpu_share": round(load.cpu_share, 3),
        "generator_kept_up": lag_ms < SLOW_LAG_MS and load.cpu_share < BUSY_SHARE,
    }


def busiest_second(good: Sequence[Answer]) -> float:
    """The most tokens that came within one second of the clock."""
    if not good:
        return 0.0
    start_s = min(answer.sent_s for answer in good)
    seconds = Counter[int]()
    for answer in good:
        at_s = answer.first_s - start_s
        per_piece = answer.completion_tokens / (len(answer.gaps_s) + 1)
        seconds[int(at_s)] += per_piece  # pyright: ignore[reportArgumentType]
        for gap_s in answer.gaps_s:
            at_s += gap_s
            seconds[int(at_s)] += per_piece  # pyright: ignore[reportArgumentType]
    return round(float(max(seconds.values())), 1)


def _statistics(
    metric: str, values: Sequence[float], percentiles: Sequence[float]
) -> Mapping[str, Any]:
    if not values:
        return {}
    array = np.asarray(values)
    found = {
        f"mean_{metric}_ms": array.mean(),
        f"median_{metric}_ms": np.median(array),
        f"std_{metric}_ms": array.std(),
    }
    found |= {f"p{p:g}_{metric}_ms": np.percentile(array, p) for p in percentiles}
    return {name: round(float(value), 3) for name, value in found.items()}


def _meets(answer: Answer, goals: Sequence[Goal]) -> bool:
    of = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.latency_s}
    return all(1e3 * of[goal.metric] <= goal.limit_ms for goal in goals)
