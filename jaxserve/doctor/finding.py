"""One finding. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing.

    Attributes:
        state: "ok"; "note": serving works, but could be better; "bad": serving would fail.
        advice: what to do about it, if anything.
    """

    area: str
    name: str
    state: str
    value: str
    advice: str = ""


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
