"""Outcomes as JSON lines, and as a table for people."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.peers.machine import Limits
from bench.peers.measures import fraction_of_limit
from bench.peers.rounds import Outcome

OURS = "jaxserve"


class Report:
    """Writes each line when it is known; `table` repeats them at the end.

    Args:
        common: what every line says: commit, date, device, ...
        out: a file that lines are appended to, besides standard output.
    """

    def __init__(self, common: dict[str, Any], out: Path | None):
        self._common = common
        self._out = out
        self._figures: list[dict[str, Any]] = []

    def line(self, content: dict[str, Any]) -> None:
        text = json.dumps({"bench": "peers_cpu", **content, **self._common})
        print(text, flush=True)
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            with self._out.open("a") as file:
                file.write(text + "\n")

    def figure(self, content: dict[str, Any]) -> None:
        """A line that belongs into the table."""
        self._figures.append(content)
        self.line(content)

    def outcome(
        self, about: dict[str, Any], outcome: Outcome, limits: Limits, more: dict[str, Any]
    ) -> None:
        """A line for each figure of a measure."""
        for index, figure in enumerate(outcome.measure.figures):
            values = {name: outcome.median(name, index) for name in outcome.turns}
            fractions = {
                name: fraction_of_limit(figure, value, limits, about["dtype"])
                for name, value in values.items()
            }
            self.figure(
                {
                    **about,
                    "measure": outcome.measure.name,
                    "figure": figure.name,
                    "unit": figure.unit,
                    "values": {name: _round(value) for name, value in values.items()},
                    "ratio": ratios(values, figure.more_is_better),
                    "limit": {"read": "read bandwidth", "flops": "matrix product"}.get(
                        figure.resource
                    ),
                    "fraction_of_limit": {
                        name: round(x, 3) for name, x in fractions.items() if x is not None
                    },
                    "rounds": {
                        name: [_round(x) for x in outcome.values(name, index)] for name in values
                    },
                    "quiet": outcome.is_quiet,
                    "others_cpu": _round(outcome.others_cpu),
                    "dropped_rounds": outcome.num_dropped,
                    **more,
                }
            )

    def table(self) -> None:
        """All figures, on standard error."""
        heads = ("", "dtype", "measure", "unit", "jaxserve", "of limit", "peers (times better)", "")
        rows = [heads, *map(_row, self._figures)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip(), file=sys.stderr)


def ratios(values: dict[str, float], more_is_better: bool) -> dict[str, float]:
    """How many times better jaxserve is than each peer: above 1 it wins, whatever the unit."""
    if OURS not in values:
        return {}
    ours = values[OURS]
    peers = ((name, value) for name, value in values.items() if name != OURS)
    return {name: round(ours / x if more_is_better else x / ours, 3) for name, x in peers}


def equal_share(pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> float | None:
    """The fraction of answers that are the same, token for token; None if there are none."""
    same = [ours == theirs for ours, theirs in pairs]
    return sum(same) / len(same) if same else None


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    values = line["values"]
    fraction = line["fraction_of_limit"].get(OURS)
    peers = (f"{name} {values[name]:g} ({ratio:.2f}x)" for name, ratio in line["ratio"].items())
    return (
        line["mode"],
        line["dtype"],
        f"{line['measure']} {line['figure']}",
        line["unit"],
        f"{values[OURS]:g}" if OURS in values else "-",
        "" if fraction is None else f"{fraction:.0%}",
        ", ".join(peers),
        "" if line["quiet"] else f"DISTURBED: others used {line['others_cpu']:.0%} of the CPUs",
    )


def _round(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")
