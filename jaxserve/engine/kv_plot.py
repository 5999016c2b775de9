"""A picture of the tiers over time. Needs matplotlib, which the extra `plot` installs.

Knows only samples; draws without any display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.engine.history import TierSample
from jaxserve.errors import ConfigError
from jaxserve.kv.stats import show_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#9498a0")
"""Of device, host and stores in their order; stores beyond these share the last one."""

UNITS = ((3600.0, "h"), (60.0, "min"), (0.0, "s"))


def plot(samples: Sequence[TierSample], path: "str | Path | None" = None) -> "Figure":
    """Bytes in each tier above, and below where the tokens of prompts came from.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'jaxserve[plot]'"
        ) from error
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    span_s = samples[-1].at_s - samples[0].at_s
    unit_s, unit = next((s or 1.0, name) for s, name in UNITS if span_s >= 3 * s)
    times = [(sample.at_s - samples[0].at_s) / unit_s for sample in samples]
    names = list(samples[-1].num_bytes)
    color_of = {name: COLORS[min(i, len(COLORS) - 1)] for i, name in enumerate(names)}
    _fill(top, samples, times, color_of)
    _sources(bottom, samples, times, color_of)
    bottom.set_xlabel(f"time ({unit})")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _fill(
    axes: "Axes", samples: Sequence[TierSample], times: list[float], color_of: dict[str, str]
) -> None:
    """How full each tier is: a share of its budget, or of its own peak if it has none."""
    last = samples[-1]
    for name, color in color_of.items():
        used = [sample.num_bytes.get(name, 0) for sample in samples]
        budget = last.max_bytes.get(name, 0)
        bound = budget or max(used) or 1
        of = show_bytes(budget) if budget else "its peak"
        axes.plot(
            times,
            [100 * num_bytes / bound for num_bytes in used],
            color=color,
            linewidth=2,
            label=f"{name}: {show_bytes(used[-1])} of {of}",
        )
    axes.set_ylim(0, 105)
    _finish(axes, "filled (%)", "Blocks that can be found, by tier")


def _sources(
    axes: "Axes", samples: Sequence[TierSample], times: list[float], color_of: dict[str, str]
) -> None:
    """Prompt tokens so far: cached ones by the tier they came from, and computed ones on top."""
    layers, labels, colors = [], [], []
    for name, color in color_of.items():
        counts = [sample.hit_tokens.get(name, 0) for sample in samples]
        layers.append(counts)
        labels.append(f"from {name}: {counts[-1]:,}")
        colors.append(color)
    computed = [max(0, s.queried_tokens - sum(s.hit_tokens.values())) for s in samples]
    layers.append(computed)
    labels.append(f"computed: {computed[-1]:,}")
    colors.append("#d9dbe0")
    axes.stackplot(times, layers, labels=labels, colors=colors)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _finish(axes, "tokens", "Prompt tokens since the start, by where they came from")


def _finish(axes: "Axes", unit: str, title: str) -> None:
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
