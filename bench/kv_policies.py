"""Hit ratios of every replacement policy over traces and generated workloads.

    python -m bench.kv_policies [--trace FILE ...] [--workloads chat,loop] [--out FILE]
    python -m bench.kv_policies --read FILE ...  tables of what was measured
    python -m bench.kv_policies --check FILE     the published LRU and ARC figures, within 0.005

Prints a table per trace and appends a JSON line for each trace, size and policy: the ratio of
blocks that were leading hits, blocks stored and CPU time per block referred to. `auto` is judged
against the best of the others at each size. Of two equal measurements the later one counts, so
that `--policies auto` is enough where only that has changed.
"""

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.kv_workloads import WORKLOADS
from bench.policy_traces import TRACES
from jaxserve.kv.simulate import TierSpec, belady_hit_ratio, replay
from jaxserve.kv.traces import load_trace, make_trace

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


BOUND = "bound"
"""In the place of a policy: Belady's choice."""

GENERATED = WORKLOADS | TRACES

Row = dict[str, Any]


def measure(name: str, shares: Sequence[float], policies: Sequence[str]) -> Iterator[Row]:
    """One trace at these sizes, policy by policy."""
    trace = make_trace(GENERATED[name]()) if name in GENERATED else load_trace(name)
    about: Row = {"trace": Path(name).stem, "requests": len(trace.requests)}
    about |= {"references": trace.num_references, "unique": trace.num_unique}
    about |= {"ceiling": round(trace.ceiling, 4)}
    for share, policy in itertools.product(shares, policies):
        capacity = max(8, int(trace.num_unique * share))
        row = about | {"share": share, "blocks": capacity, "policy": policy}
        if policy == BOUND:
            yield row | {"hit_ratio": round(belady_hit_ratio(trace, capacity), 4)}
            continue
        started_s = time.process_time()
        result = replay(trace, [TierSpec("tier", policy, capacity)])
        cpu_s = time.process_time() - started_s
        yield row | {
            "hit_ratio": round(result.hit_ratio, 4),
            "stores_per_reference": round(result.stores_per_reference, 3),
            "us_per_reference": round(1e6 * cpu_s / trace.num_references, 2),
        }


def print_tables(rows: Iterable[Row]) -> None:
    """A table for each trace: hit ratios by policy and size, and what `auto` is ahead."""
    by_trace: dict[str, list[Row]] = {}
    for row in rows:
        by_trace.setdefault(row["trace"], []).append(row)
    for name, of_trace in by_trace.items():
        first = of_trace[0]
        ratios = {(row["policy"], row["share"]): row["hit_ratio"] for row in of_trace}
        shares = sorted({row["share"] for row in of_trace})
        print(
            f"\n{name}: {first['requests']:,} requests, {first['references']:,} blocks referred "
            f"to, {first['unique']:,} unique, unbounded {first['ceiling']:.3f}"
        )
        print(f"{'tier size':24}" + "".join(f"{100 * share:7.0f} %" for share in shares))
        for policy in dict.fromkeys(row["policy"] for row in of_trace):
            cells = [ratios.get((policy, share), math.nan) for share in shares]
            print(f"{policy:24}" + "".join(f"{cell:9.3f}" for cell in cells))
        ahead = [_ahead(ratios, share) for share in shares]
        print(f"{'auto - best':24}" + "".join(f"{lead:+9.4f}" for lead in ahead))


def _ahead(ratios: dict[tuple[str, float], float], share: float) -> float:
    best = max(ratios.get((policy, share), math.nan) for policy in OTHERS)
    return ratios.get((JUDGED, share), math.nan) - best


def read_rows(paths: Sequence[str]) -> list[Row]:
    """The last measurement of each trace, size and policy."""
    rows: dict[tuple[str, float, str], Row] = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            rows[row["trace"], row["share"], row["policy"]] = row
    return list(rows.values())


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
    parser.add_argument("--workloads", default=",".join(GENERATED))
    parser.add_argument("--sizes", default=",".join(map(str, SHARES)), help="shares, by comma")
    parser.add_argument("--policies", default=",".join((JUDGED, *OTHERS, BOUND)))
    parser.add_argument("--out", metavar="FILE", help="lines are appended")
    parser.add_argument("--read", nargs="+", metavar="FILE")
    parser.add_argument("--check", metavar="FILE")
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    if args.read:
        print_tables(read_rows(args.read))
        return 0
    shares = [float(share) for share in args.sizes.split(",")]
    about = environment()
    for name in [*args.trace, *filter(None, args.workloads.split(","))]:
        rows = []
        for row in measure(name, shares, args.policies.split(",")):
            rows.append(row)
            if args.out:
                with Path(args.out).open("a") as out:
                    out.write(json.dumps(row | about) + "\n")
        print_tables(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
