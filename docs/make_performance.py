"""Writes the generated parts of docs/performance.md from result files: `make docs`.

A part stands between two marks, `<!-- NAME -->` and `<!-- end NAME -->`. The kernel table joins
what was counted from compiled code (bench/results/kernels_aot-*.jsonl) with what was timed on a
device (bench/results/gpu-*.jsonl); without the latter its columns of times stay empty.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "performance.md"
RESULTS = DOCS.parent / "bench" / "results"

Line = dict[str, Any]


def read(pattern: str) -> list[Line]:
    """All lines of the newest file (by name) of each kind that matches."""
    paths = sorted(RESULTS.glob(pattern))
    return [json.loads(text) for path in paths for text in path.read_text().splitlines()]


def table(heads: "tuple[str, ...]", rows: "Iterable[tuple[str, ...]]") -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kernels() -> str:
    """Attention and page moves for an H200: counted, and timed where a device was at hand."""
    counted, timed = read("kernels_aot-*.jsonl"), read("gpu-*.jsonl")
    # The newest release of jax that was compiled for, and the newest time.
    newest = {(x["job"], x["backend"]): x for x in sorted(counted, key=lambda x: x["jax"])}
    times = {(x.get("job"), x.get("backend")): x for x in timed if x.get("us") and not _tiny(x)}
    rows = []
    for (job, backend), line in newest.items():
        if line["target"] != "h200" or backend == "engine" or "kernels" not in line:
            continue
        time = times.get((job, backend), {})
        rows.append((backend, job.removeprefix("attention "), *_kernel_cells(line), *_cells(time)))
    heads = (
        "backend", "job", "MB", "GFLOP", "limit us", "registers", "spills", "smem KB", "occupancy",
        "us", "of limit",
    )  # fmt: skip
    return table(heads, rows)


def _kernel_cells(line: Line) -> tuple[str, ...]:
    launched = line["kernels"]

    def each(value: Callable[[Line], Any]) -> str:
        return ", ".join(str(value(kernel)) for kernel in launched) or "-"

    return (
        f"{line['bytes'] / 1e6:,.1f}",
        f"{line['flops'] / 1e9:,.1f}",
        f"{line['limit_us']:,.1f}",
        each(lambda x: x["registers"]),
        each(lambda x: x["spill_bytes"]),
        each(lambda x: round(x["smem_bytes"] / 1024)),
        each(lambda x: f"{x['occupancy']:.0%}"),
    )


def _cells(time: Line) -> tuple[str, str]:
    if not time:
        return "", ""
    fraction = time.get("fraction")
    return f"{time['us']:,.1f}", "" if fraction is None else f"{fraction:.0%}"


def steps() -> str:
    """Whole steps of the engine: counted, and timed where a device was at hand."""
    counted = [x for x in read("kernels_aot-*.jsonl") if x["backend"] == "engine"]
    rows = []
    for line in sorted(counted, key=lambda x: (x["target"], x["job"], x["jax"])):
        if "num_launches" not in line:
            continue
        launches = line["num_launches"]
        rows.append(
            (
                line["target"],
                line["job"].removeprefix("step "),
                line["jax"],
                f"{line['bytes'] / 1e9:,.2f}",
                f"{line['flops'] / 1e12:,.2f}",
                f"{line['limit_us']:,.0f}",
                "" if launches is None else str(launches),
                f"{line['temp_bytes'] / 1e6:,.0f}",
                f"{line['lower_s'] + line['compile_s']:.0f}",
            )
        )
    heads = (
        "device", "step", "jax", "GB", "TFLOP", "limit us", "launches", "temporary MB", "compile s",
    )  # fmt: skip
    return table(heads, rows)


def device() -> str:
    """What the GPU suite found; a sentence where it has not run yet."""
    lines = [x for x in read("gpu-*.jsonl") if not _tiny(x)]
    if not lines:
        return "No GPU has been at hand yet: `bench/gpu/suite.sh` fills this in.\n"
    rows = []
    for line in lines:
        if "failed" in line or line.get("figure") in ("profile", "start"):
            continue
        name = line.get("model") or line.get("way") or line.get("job") or line.get("loop")
        what = ", ".join(str(x) for x in (name, line.get("figure"), line.get("limit")) if x)
        us = line.get("us") or line.get("step_us")
        if line["part"] == "kernels" or not (us or line.get("rate")):
            continue
        value = f"{us:,.1f} us" if us else f"{line['rate']:.4g} /s"
        fraction = line.get("fraction")
        rows.append(
            (
                line["device"],
                line["part"],
                what,
                str(line.get("batch", line.get("backend", ""))),
                value,
                "" if fraction is None else f"{fraction:.0%}",
            )
        )
    return table(("device", "part", "what", "batch or backend", "", "of limit"), rows)


def _tiny(line: Line) -> bool:
    return bool(line.get("tiny"))


PARTS: dict[str, Callable[[], str]] = {"kernels": kernels, "steps": steps, "device": device}


def page() -> str:
    """The page with its generated parts made anew.

    Raises:
        ValueError: a part's marks are not in the page.
    """
    text = PAGE.read_text()
    for name, make in PARTS.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not marks.search(text):
            raise ValueError(f"{PAGE.name} lacks the marks of the generated part {name!r}")
        text = marks.sub(lambda found, make=make: found[1] + make() + found[2], text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
