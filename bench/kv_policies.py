"""Hit ratios of every replacement policy over traces and generated workloads.

    python -m bench.kv_policies [--trace FILE ...] [--workloads chat,loop] [--out FILE]
    python -m bench.kv_policies --check FILE     the published LRU and ARC figures, within 0.005

Prints a table per trace and writes one JSON file: for each trace, size and policy the ratio of
blocks that were leading hits, and blocks stored per block referred to. `auto` is judged against
the best of the others at each size.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from bench.kv_workloads import WORKLOADS
from jaxserve.kv.simulate import TierSpec, belady_hit_ratio, replay
from jaxserve.kv.traces import Trace, load_trace, make_trace

JUDGED = "auto"
OTHERS = ("lru", "arc", "s3fifo", "tinylfu", "lru?store_threshold=2")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TOLERANCE = 0.005

PUBLISHED = {
    "lru": (0.052, 0.079, 0.196, 0.279, 0.345, 0.363),
    "arc": (0.065, 0.090, 0.210, 0.284, 0.320, 0.363),
}
"""Mooncake's conversation trace at SHARES of its 182,790 unique blocks, by an independent
simulator (unbounded: 0.366)."""


def measure(job: tuple[str, float]) -> dict[str, Any]:
    """All policies on one trace at one size."""
    name, share = job
    trace = read(name)
    capacity = max(8, int(trace.num_unique * share))
    row: dict[str, Any] = {"trace": Path(name).stem, "share": share, "blocks": capacity}
    row |= {"requests": len(trace.requests), "references": trace.num_references}
    row |= {"unique": trace.num_unique, "ceiling": round(trace.ceiling, 4), "policies": {}}
    for policy in (JUDGED, *OTHERS):
        started_s = time.process_time()
        result = replay(trace, [TierSpec("tier", policy, capacity)])
        row["policies"][policy] = {
            "hit_ratio": round(result.hit_ratio, 4),
            "stores_per_reference": round(result.stores_per_reference, 3),
            "us_per_reference": round(
                1e6 * (time.process_time() - started_s) / trace.num_references, 2
            ),
        }
    row["belady_bound"] = round(belady_hit_ratio(trace, capacity), 4)
    best = max(row["policies"][policy]["hit_ratio"] for policy in OTHERS)
    row["auto_minus_best"] = round(row["policies"][JUDGED]["hit_ratio"] - best, 4)
    return row


def read(name: str) -> Trace:
    return make_trace(WORKLOADS[name]()) if name in WORKLOADS else load_trace(name)


def print_table(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["trace"] for row in rows):
        of_trace = [row for row in rows if row["trace"] == name]
        first = of_trace[0]
        print(
            f"\n{name}: {first['requests']:,} requests, {first['references']:,} blocks referred "
            f"to, {first['unique']:,} unique, unbounded {first['ceiling']:.3f}"
        )
        print(f"{'tier size':24}" + "".join(f"{100 * row['share']:7.0f} %" for row in of_trace))
        for policy in (JUDGED, *OTHERS):
            cells = [row["policies"][policy]["hit_ratio"] for row in of_trace]
            print(f"{policy:24}" + "".join(f"{cell:9.3f}" for cell in cells))
        print(f"{'bound':24}" + "".join(f"{row['belady_bound']:9.3f}" for row in of_trace))
        print(
            f"{'auto - best':24}" + "".join(f"{row['auto_minus_best']:+9.3f}" for row in of_trace)
        )


def check(path: str) -> int:
    """Whether LRU and ARC hit as published on the whole conversation trace."""
    trace, num_wrong = load_trace(path), 0
    for policy, expected in PUBLISHED.items():
        for share, ratio in zip(SHARES, expected, strict=True):
            spec = TierSpec("tier", policy, int(trace.num_unique * share))
            found = replay(trace, [spec]).hit_ratio
            is_right = abs(found - ratio) <= TOLERANCE
            num_wrong += not is_right
            verdict = "" if is_right else "  WRONG"
            print(f"{policy} {100 * share:3.0f} %: {found:.4f}, published {ratio:.3f}{verdict}")
    return 1 if num_wrong else 0


def environment() -> dict[str, str]:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Hit ratios of all policies.")
    parser.add_argument("--trace", action="append", default=[], metavar="FILE")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--sizes", default=",".join(map(str, SHARES)), help="shares, by comma")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", metavar="FILE")
    parser.add_argument("--check", metavar="FILE")
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    names = [*args.trace, *filter(None, args.workloads.split(","))]
    jobs = [(name, float(share)) for name in names for share in args.sizes.split(",")]
    with Pool(args.processes) as pool:
        rows = pool.map(measure, jobs, chunksize=1)
    print_table(rows)
    if args.out:
        Path(args.out).write_text(
            json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
