"""`jaxserve kv simulate`: what policies and tier sizes would have done on a recorded workload."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from jaxserve.cli.app import option
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.kv.simulate import Report, TierSpec
    from jaxserve.kv.simulate_times import Costs
    from jaxserve.kv.traces import Trace

POLICIES = "auto,lru,arc,s3fifo,tinylfu,lru?store_threshold=2"
SIZES = "1%,5%,20%"
MAX_BLOCKS = 1 << 28
HEADER = ("tiers", "hit ratio", "bound", "stores/ref", "written", "loaded")


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE", help="JSON lines with hash_ids and timestamp; .gz is unpacked"
        ),
    ],
    *,
    policies: Annotated[
        str,
        option(
            "--policies",
            metavar="LIST",
            help=f"policies to compare, separated by commas; default: {POLICIES}",
        ),
    ] = POLICIES,
    sizes: Annotated[
        str | None,
        option(
            "--sizes",
            metavar="LIST",
            help="tier sizes to compare: shares of the trace's unique blocks, up to 100%, or "
            f"bytes such as 8GiB; default: {SIZES}",
        ),
    ] = None,
    tiers: Annotated[
        str | None,
        option(
            "--tiers",
            metavar="LIST",
            help="one cascade instead, nearest first, as name:size:policy, such as "
            "device:1%:lru,host:5%:auto,disk:20%:arc; a block is copied to every tier early; with "
            "--prefill-rate, every tier but the first also has a speed, such as host:5%:auto:20GiB",
        ),
    ] = None,
    prefill_rate: Annotated[
        float | None,
        option(
            "--prefill-rate",
            metavar="N",
            help="prompt tokens computed per second: ask the planner, too, when to load",
        ),
    ] = None,
    block_tokens: Annotated[
        int, option("--block-tokens", metavar="N", help="tokens per block; default: 16")
    ] = 16,
    block_bytes: Annotated[
        str,
        option(
            "--block-bytes", metavar="BYTES", help="size of a block, such as 2MiB; default: 1MiB"
        ),
    ] = "1MiB",
    as_json: Annotated[bool, option("--json", help="one JSON line per result, no table")] = False,
) -> int:
    """Replay a trace of block hashes through tiers of any policy and size."""
    if tiers is not None and sizes is not None:
        raise ConfigError("give either --sizes or --tiers: the tiers have their own sizes")

    from jaxserve.kv.policy import check_policy
    from jaxserve.kv.stores.options import as_bytes
    from jaxserve.kv.traces import load_trace

    num_bytes = as_bytes("--block-bytes", block_bytes)
    cascades: list[list[TierText]]
    if tiers is not None:
        cascades = [_cascade(tiers)]
    else:
        names = _split("--policies", policies)
        shares = _split("--sizes", SIZES if sizes is None else sizes)
        cascades = [
            [TierText("tier", share, policy, option="--sizes")]
            for share in shares
            for policy in names
        ]
    for cascade in cascades:
        for tier in cascade:
            _num_blocks(tier, 1, num_bytes)
            check_policy(tier.policy)
    planner = Planner(prefill_rate, block_tokens)
    costs = planner.costs(cascades[0], tiers is not None, num_bytes)
    loaded = load_trace(trace)
    rows = _rows(loaded, cascades, num_bytes, costs)
    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        _print_table(loaded, rows)
    return 0


def _rows(
    trace: "Trace",
    cascades: Sequence[Sequence["TierText"]],
    block_bytes: int,
    costs: "Costs | None",
) -> list[dict[str, Any]]:
    from jaxserve.kv.simulate import TierSpec, belady_hit_ratio
    from jaxserve.progress import Progress

    bounds: dict[int, float] = {}
    rows = []
    with Progress() as report:
        for cascade in cascades:
            specs = [
                TierSpec(tier.name, tier.policy, _num_blocks(tier, trace.num_unique, block_bytes))
                for tier in cascade
            ]
            total = sum(spec.capacity for spec in specs)
            if total not in bounds:
                bounds[total] = belady_hit_ratio(trace, total)
            rows.append(_row(trace, specs, bounds[total], block_bytes, report, costs))
    return rows


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
    """A tier as it was given, and by which option."""

    name: str
    size: str
    policy: str
    speed: str = ""
    option: str = "--tiers"


def _cascade(text: str) -> list[TierText]:
    tiers = [_tier(part) for part in _split("--tiers", text)]
    names = [tier.name for tier in tiers]
    if len(set(names)) < len(names):
        raise ConfigError(f"--tiers is {text!r:.80}; expected a name of its own for every tier")
    return tiers


def _tier(text: str) -> TierText:
    parts = text.split(":")
    if not 3 <= len(parts) <= 4 or not all(parts):
        raise ConfigError(f"--tiers has {text!r:.80}; expected name:size:policy, e.g. host:5%:auto")
    return TierText(*parts)


class Planner(NamedTuple):
    """What `--prefill-rate` and `--block-tokens` say."""

    prefill_rate: float | None
    block_tokens: int

    def costs(
        self, tiers: Sequence[TierText], is_cascade: bool, block_bytes: int
    ) -> "Costs | None":
        """What the planner needs to know; None if it is not asked."""
        from jaxserve.kv.simulate_times import Costs
        from jaxserve.kv.stores.options import as_bytes

        if not 1 <= self.block_tokens <= 1 << 20:
            raise ConfigError(f"--block-tokens is {self.block_tokens}; expected 1 to {1 << 20}")
        if self.prefill_rate is None:
            if any(tier.speed for tier in tiers):
                raise ConfigError(
                    "a tier has a speed, but there is no --prefill-rate to compare with"
                )
            return None
        if not 0 < self.prefill_rate < 1e12:
            raise ConfigError(
                f"--prefill-rate is {self.prefill_rate:g}; expected a number of tokens above 0"
            )
        if not is_cascade or tiers[0].speed or not all(tier.speed for tier in tiers[1:]):
            raise ConfigError(
                "--prefill-rate needs --tiers with the bytes per second of every tier but the "
                "first, e.g. device:1%:lru,host:5%:auto:20GiB,disk:20%:auto:2GiB"
            )
        what = "the speed in --tiers of"
        speeds = tuple(float(as_bytes(f"{what} {tier.name}", tier.speed)) for tier in tiers[1:])
        return Costs(self.block_tokens, block_bytes, self.prefill_rate, speeds)


def _num_blocks(tier: TierText, num_unique: int, block_bytes: int) -> int:
    """Blocks of a tier whose size is a share of the unique blocks, or in bytes."""
    size, said = tier.size, f"{tier.option} has the size {tier.size!r:.40}"
    if size.endswith("%"):
        try:
            percent = float(size[:-1])
        except ValueError:
            percent = math.nan
        if not 0 < percent <= 100:
            raise ConfigError(
                f"{said}; expected a share of the trace's unique blocks from above 0% to 100%, or "
                "bytes such as 8GiB"
            )
        return max(1, int(num_unique * percent / 100))
    from jaxserve.kv.stores.options import as_bytes

    try:
        num_blocks = as_bytes("size", size) // block_bytes
    except ConfigError:
        raise ConfigError(f"{said}; expected a share such as 5%, or bytes such as 8GiB") from None
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise ConfigError(
            f"{said}, which is {num_blocks} blocks of {block_bytes} bytes; expected 1 to "
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
