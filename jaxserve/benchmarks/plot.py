"""A picture of one run: when tokens came, and how long requests took. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.benchmarks.client import Answer
from jaxserve.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY = "#2f6db3", "#d1731f", "#8a8a8a"


def check_plot(path: str) -> None:
    """Refuse a picture that could not be made, before the run.

    Raises:
        ConfigError: no such format, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: expected a file ending in {', '.join(FORMATS)}")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {Path(path).absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'jaxserve[plot]', or leave it out"
        ) from error


def draw(path: str, title: str, summary: Mapping[str, Any], answers: Sequence[Answer]) -> None:
    """Write the picture: throughput and concurrency over time, and distributions of latencies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [answer for answer in answers if not answer.error]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    _over_time(axes[0, 0], good, answers)
    _distribution(
        axes[0, 1], [1e3 * a.ttft_s for a in good], "time to first token (ms)", summary, "ttft"
    )
    gaps = [1e3 * gap for answer in good for gap in answer.gaps_s]
    _distribution(axes[1, 0], gaps, "inter-token latency (ms)", summary, "itl")
    _by_length(axes[1, 1], good)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _over_time(axis: Any, good: Sequence[Answer], answers: Sequence[Answer]) -> None:
    axis.set(xlabel="seconds", ylabel="output tokens/s", title="throughput and load")
    if not good:
        return
    start_s = min(answer.sent_s for answer in answers)
    times, weights = [], []
    for answer in good:
        at_s = answer.first_s - start_s + np.cumsum([0.0, *answer.gaps_s])
        times.append(at_s)
        weights.append(np.full(len(at_s), answer.completion_tokens / len(at_s)))
    end_s = max(answer.ended_s for answer in answers) - start_s
    num_bins = int(np.clip(len(np.concatenate(times)) / 20, 8, 60))
    edges = np.linspace(0, max(end_s, 1e-3), num_bins + 1)
    tokens, _ = np.histogram(np.concatenate(times), edges, weights=np.concatenate(weights))
    axis.stairs(tokens / np.diff(edges), edges, color=BLUE, fill=True, alpha=0.35)
    axis.stairs(tokens / np.diff(edges), edges, color=BLUE, label="output tokens/s")
    starts = np.array([a.sent_s - start_s for a in answers])[:, None]
    ends = np.array([a.ended_s - start_s for a in answers])[:, None]
    inside = np.minimum(ends, edges[1:]) - np.maximum(starts, edges[:-1])
    running = np.maximum(inside, 0).sum(axis=0) / np.diff(edges)  # the average over each bin
    other = axis.twinx()
    other.stairs(running, edges, color=ORANGE, linewidth=1.5)
    other.set_ylabel("requests under way", color=ORANGE)
    other.spines["top"].set_visible(False)
    other.set_ylim(bottom=0)
    axis.set_ylim(bottom=0)
    axis.yaxis.label.set_color(BLUE)


def _distribution(
    axis: Any, values: Sequence[float], label: str, summary: Mapping[str, Any], metric: str
) -> None:
    axis.set(xlabel=label, ylabel="share", title=f"distribution of {label.removesuffix(' (ms)')}")
    if not values:
        return
    ordered = np.sort(values)
    axis.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=BLUE)
    if ordered[0] > 0 and ordered[-1] > 30 * ordered[0]:
        axis.set_xscale("log")
    names = [
        k for k in summary if k.endswith(f"_{metric}_ms") and not k.startswith(("mean", "std"))
    ]
    for name in names:
        axis.axvline(summary[name], color=GREY, linestyle=":", linewidth=1)
        text = f" {name.split('_')[0]} {summary[name]:,.4g}"
        axis.text(summary[name], 0.04, text, rotation=90, va="bottom", ha="left", fontsize=8)
    axis.set_ylim(0, 1.02)


def _by_length(axis: Any, good: Sequence[Answer]) -> None:
    axis.set(
        xlabel="prompt tokens", ylabel="time to first token (ms)", title="first token by prompt"
    )
    if not good:
        return
    cached = np.array([a.cached_tokens / max(1, a.prompt_tokens) for a in good])
    points = axis.scatter(
        [a.prompt_tokens for a in good],
        [1e3 * a.ttft_s for a in good],
        c=cached,
        vmin=0,
        vmax=1,
        cmap="viridis",
        s=14,
        alpha=0.8,
    )
    axis.figure.colorbar(points, ax=axis, label="share of the prompt from a cache")
    axis.set_ylim(bottom=0)
