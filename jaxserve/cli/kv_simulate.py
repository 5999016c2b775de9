"""`jaxserve kv simulate`: what policies and tier sizes would have done on a recorded workload."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxserve.cli.flags import Parser, add_command
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.kv.simulate import Report, TierSpec
    from jaxserve.kv.simulate_times import Costs
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
        "device:1%%:lru,host:5%%:auto,disk:20%%:arc; a block is copied to every tier early; with "
        "--prefill-rate, every tier but the first also has a speed, e.g. host:5%%:auto:20GiB",
    )
    command.add_argument(
        "--prefill-rate",
        metavar="N",
        type=float,
        help="prompt tokens computed per second: ask the planner, too, when to load",
    )
    command.add_argument(
        "--block-tokens", metavar="N", type=int, default=16, help="tokens per block (default: 16)"
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
    from jaxserve.kv.simulate import TierSpec, belady_hit_ratio
    from jaxserve.kv.stores.options import as_bytes
    from jaxserve.kv.traces import load_trace
    from jaxserve.progress import Progress

    block_bytes = as_bytes("--block-bytes", args.block_bytes or "1MiB")
    cascades: list[list[TierText]]
    if args.tiers:
        cascades = [[_tier(text) for text in _split("--tiers", args.tiers)]]
    else:
        policies = _split("--policies", args.policies)
        sizes = _split("--sizes", args.sizes or SIZES)
        cascades = [[TierText("tier", size, policy)] for size in sizes for policy in policies]
    for cascade in cascades:
        for tier in cascade:
            _num_blocks(tier.size, 1, block_bytes)
            check_policy(tier.policy)
    costs = _costs(args, cascades[0], block_bytes)
    trace = load_trace(args.trace)
    bounds: dict[int, float] = {}
    rows = []
    with Progress() as report:
        for cascade in cascades:
            specs = [
                TierSpec(
                    tier.name, tier.policy, _num_blocks(tier.size, trace.num_unique, block_bytes)
                )
                for tier in cascade
            ]
            total = sum(spec.capacity for spec in specs)
            if total not in bounds:
                bounds[total] = belady_hit_ratio(trace, total)
            rows.append(_row(trace, specs, bounds[total], block_bytes, report, costs))
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
    costs: "Costs | None",
) -> dict[str, Any]:
    from jaxserve.kv.simulate import replay
    from jaxserve.kv.simulate_times import PlanMeter

    meter = PlanMeter(costs) if costs is not None else None
    result = replay(trace, specs, report, meter)
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
    plan = {}
    if meter is not None:
        plan = {"decisions": meter.decisions, "prefill_s": asdict(meter.seconds)}
    return plan | {
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
    for row in rows:
        if "decisions" in row:
            counts = ", ".join(f"{count:,} {what}" for what, count in row["decisions"].items())
            seconds = ", ".join(f"{what} {s:,.1f} s" for what, s in row["prefill_s"].items())
            print(f"planner: {counts}; prefills take: {seconds}".replace("_", " "))
    width = max(len(line[0]) for line in lines)
    for first, *others in lines:
        print(f"{first:<{width}}" + "".join(f"{text:>12}" for text in others))


class TierText(NamedTuple):
    """A tier as it was given."""

    name: str
    size: str
    policy: str
    speed: str = ""


def _tier(text: str) -> TierText:
    parts = text.split(":")
    if not 3 <= len(parts) <= 4 or not all(parts):
        raise ConfigError(f"--tiers has {text!r:.80}; expected name:size:policy, e.g. host:5%:auto")
    return TierText(*parts)


def _costs(args: argparse.Namespace, tiers: Sequence[TierText], block_bytes: int) -> "Costs | None":
    """What the planner needs to know; None if it is not asked."""
    from jaxserve.kv.simulate_times import Costs
    from jaxserve.kv.stores.options import as_bytes

    if args.prefill_rate is None:
        if any(tier.speed for tier in tiers):
            raise ConfigError("a tier has a speed, but there is no --prefill-rate to compare with")
        return None
    if not 0 < args.prefill_rate < 1e12 or not 1 <= args.block_tokens <= 1 << 20:
        raise ConfigError(
            f"--prefill-rate is {args.prefill_rate:g} and --block-tokens {args.block_tokens}; "
            "expected positive numbers"
        )
    if not args.tiers or tiers[0].speed or not all(tier.speed for tier in tiers[1:]):
        raise ConfigError(
            "--prefill-rate needs --tiers with the bytes per second of every tier but the first, "
            "e.g. device:1%:lru,host:5%:auto:20GiB,disk:20%:auto:2GiB"
        )
    speeds = tuple(float(as_bytes(f"speed of {tier.name}", tier.speed)) for tier in tiers[1:])
    return Costs(args.block_tokens, block_bytes, args.prefill_rate, speeds)


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
