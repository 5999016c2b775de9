"""`jaxserve kv simulate`: what policies and tier sizes would have done on a recorded workload."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.cli.flags import Parser, add_command
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.kv.simulate import Report, Result, TierSpec
    from jaxserve.kv.traces import Trace

POLICIES = "auto,lru,arc,s3fifo,tinylfu,lru?store_threshold=2"
SIZES = "1%,5%,20%"
MAX_BLOCKS = 1 << 28
HEADER = ("tiers", "hit ratio", "bound", "stores/ref", "written", "loaded")


def add_simulate_command(commands: Parser.Commands) -> None:
    command = add_command(
        commands,
        "simulate",
        "[options] TRACE",
        "replay a trace of block hashes through tiers of any policy and size",
        simulate,
    )
    command.add_argument(
        "trace", metavar="TRACE", help="JSON lines with hash_ids and timestamp; .gz is unpacked"
    )
    command.add_argument(
        "--policies",
        metavar="LIST",
        default=POLICIES,
        help=f"policies to compare, separated by commas (default: {POLICIES})",
    )
    command.add_argument(
        "--sizes",
        metavar="LIST",
        help="tier sizes to compare: shares of the trace's unique blocks, or bytes such as 8GiB "
        f"(default: {SIZES})".replace("%", "%%"),
    )
    command.add_argument(
        "--tiers",
        metavar="LIST",
        help="one cascade instead, nearest first, as name:size:policy, e.g. "
        "device:1%%:lru,host:5%%:auto,disk:20%%:arc; a block is copied to every tier early",
    )
    command.add_argument(
        "--block-bytes", metavar="BYTES", help="size of a block, such as 2MiB (default: 1MiB)"
    )
    command.add_argument("--json", action="store_true", help="one JSON line per result, no table")


def simulate(args: argparse.Namespace) -> int:
    """Print a table, or JSON lines."""
    if args.tiers and args.sizes:
        raise ConfigError("give either --sizes or --tiers: the tiers have their own sizes")

    from jaxserve.kv.policy import check_policy
    from jaxserve.kv.simulate import TierSpec, belady_hit_ratio, replay
    from jaxserve.kv.stores.options import as_bytes
    from jaxserve.kv.traces import load_trace
    from jaxserve.progress import Progress

    block_bytes = as_bytes("--block-bytes", args.block_bytes or "1MiB")
    cascades: list[list[tuple[str, str, str]]]
    if args.tiers:
        cascades = [[_tier(text) for text in _split("--tiers", args.tiers)]]
    else:
        policies = _split("--policies", args.policies)
        sizes = _split("--sizes", args.sizes or SIZES)
        cascades = [[("tier", size, policy)] for size in sizes for policy in policies]
    for cascade in cascades:
        for _, size, policy in cascade:
            _num_blocks(size, 1, block_bytes)
            check_policy(policy)
    trace = load_trace(args.trace)
    bounds: dict[int, float] = {}
    rows = []
    with Progress() as report:
        for cascade in cascades:
            specs = [
                TierSpec(name, policy, _num_blocks(size, trace.num_unique, block_bytes))
                for name, size, policy in cascade
            ]
            total = sum(spec.capacity for spec in specs)
            if total not in bounds:
                bounds[total] = belady_hit_ratio(trace, total)
            rows.append(_row(trace, specs, bounds[total], block_bytes, report, replay))
    if args.json:
        for row in rows:
            print(json.dumps(row))
    else:
        _print_table(trace, rows)
    return 0


def _row(
    trace: "Trace",
    specs: "Sequence[TierSpec]",
    bound: float,
    block_bytes: int,
    report: "Report",
    replay: Any,
) -> dict[str, Any]:
    result: Result = replay(trace, specs, report)
    tiers = [
        {
            "name": tier.spec.name,
            "policy": tier.spec.policy,
            "blocks": tier.spec.capacity,
            "share": round(tier.spec.capacity / trace.num_unique, 6),
            "hit_ratio": round(tier.num_hits / trace.num_references, 6),
            "stores_per_reference": round(tier.num_stores / trace.num_references, 6),
            "written_bytes": tier.num_stores * block_bytes,
            "loaded_bytes": tier.num_hits * block_bytes,
            "evictions": tier.num_evictions,
        }
        for tier in result.tiers
    ]
    return {
        "hit_ratio": round(result.hit_ratio, 6),
        "belady_bound": round(bound, 6),
        "ceiling": round(trace.ceiling, 6),
        "tiers": tiers,
        "requests": len(trace.requests),
        "references": trace.num_references,
        "unique_blocks": trace.num_unique,
        "duration_s": round(trace.duration_s, 3),
        "block_bytes": block_bytes,
    }


def _print_table(trace: "Trace", rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{len(trace.requests):,} requests in {trace.duration_s:,.0f} s, "
        f"{trace.num_references:,} blocks referred to, {trace.num_unique:,} unique; "
        f"hit ratio without bounds {trace.ceiling:.3f}"
    )
    lines: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        tiers = row["tiers"]
        if len(tiers) > 1:
            lines.append(
                ("together", f"{row['hit_ratio']:.3f}", f"{row['belady_bound']:.3f}", "", "", "")
            )
        for tier in tiers:
            bound = f"{row['belady_bound']:.3f}" if len(tiers) == 1 else ""
            lines.append(
                (
                    f"{tier['name']} {tier['policy']}, {tier['blocks']:,} blocks "
                    f"({100 * tier['share']:.3g} %)",
                    f"{tier['hit_ratio']:.3f}",
                    bound,
                    f"{tier['stores_per_reference']:.2f}",
                    _readable(tier["written_bytes"]),
                    _readable(tier["loaded_bytes"]),
                )
            )
    width = max(len(line[0]) for line in lines)
    for first, *others in lines:
        print(f"{first:<{width}}" + "".join(f"{text:>12}" for text in others))


def _tier(text: str) -> tuple[str, str, str]:
    name, _, rest = text.partition(":")
    size, _, policy = rest.partition(":")
    if not (name and size and policy):
        raise ConfigError(f"--tiers has {text!r:.80}; expected name:size:policy, e.g. host:5%:auto")
    return name, size, policy


def _num_blocks(size: str, num_unique: int, block_bytes: int) -> int:
    """Blocks of a tier whose size is a share of the unique blocks, or in bytes."""
    if size.endswith("%"):
        try:
            share = float(size[:-1]) / 100
        except ValueError:
            share = float("nan")
        if not 0 < share <= 100:
            raise ConfigError(f"tier size {size!r:.40} is not a share; expected e.g. 5% or 8GiB")
        return max(1, int(num_unique * share))
    from jaxserve.kv.stores.options import as_bytes

    num_blocks = as_bytes("tier size", size) // block_bytes
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise ConfigError(
            f"tier size {size} holds {num_blocks} blocks of {block_bytes} bytes; expected 1 to "
            f"{MAX_BLOCKS}"
        )
    return num_blocks


def _split(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} is {text!r:.80}; expected values separated by commas")
    return parts


def _readable(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
