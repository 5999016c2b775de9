"""The suite's results as a short table, for the end of a log."""

from collections.abc import Iterable
from typing import Any


def summary(lines: "Iterable[dict[str, Any]]") -> str:
    """A row for each result that has a time or a rate, and the failures below."""
    rows: list[tuple[str, str, str, str]] = []
    failures: list[str] = []
    for line in lines:
        about = _about(line)
        if "failed" in line:
            failures.append(f"FAILED {line['part']}: {about}: {str(line['failed'])[:160]}")
        elif line.get("figure") == "profile" or "change" in line:
            continue
        elif line.get("outcome") not in (None, "ok"):
            failures.append(f"{line['part']}: {line['outcome']}")
        elif value := _value(line):
            fraction = line.get("fraction")
            shown = "" if fraction is None else f"{fraction:.0%}"
            rows.append((line["part"], about, value, shown))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    table = (
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return "\n".join([*table, *failures])


def _about(line: "dict[str, Any]") -> str:
    names = ("job", "figure", "limit", "model", "way", "loop", "choice", "backend")
    parts = [str(line[name]) for name in names if name in line]
    parts += [f"batch {line['batch']}"] if "batch" in line else []
    return ", ".join(parts)[:70]


def _value(line: "dict[str, Any]") -> str:
    if "rate" in line:
        return f"{line['rate']:.3e} /s"
    for name in ("us", "step_us"):
        if isinstance(line.get(name), (int, float)):
            return f"{line[name]:.1f} us"
    if "seconds" in line and "outcome" not in line:
        return f"{line['seconds']} s"
    return ""
