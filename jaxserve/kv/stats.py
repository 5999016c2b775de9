"""What the tiers hold and what they have done, as one frozen value.

Metrics, the command, the HTTP routes and notebooks all show this value and no other. Residency
counts blocks that can be found by their names; memory that transfers hold meanwhile is none of it.
Counts are from the start of the engine. Knows nothing of how any of it is measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.kv.stores.stats import OperationStats, WorkerStats


@dataclass(frozen=True, slots=True)
class TierStats:
    """How full a tier is.

    Attributes:
        name: "device", "host", or a store's name.
        num_blocks: blocks that can be found: pages of all KV groups on the device, slots on the
            host, records in a store (those of other engines that share it included).
        num_bytes: what they occupy.
        max_bytes: the tier's budget; 0: it is not bounded here.
        num_evicted: blocks that left to make room; stores that do not say: 0.
        num_pinned: blocks that may not be evicted; stores that do not say: 0.
        num_damaged: records that a store found not to be what was written, and dropped.
        is_known: False if a store did not answer in time, or is left alone because it fails; then
            the numbers are the last known.
    """

    name: str
    num_blocks: int
    num_bytes: int
    max_bytes: int
    num_evicted: int = 0
    num_pinned: int = 0
    num_damaged: int = 0
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store's name and what its worker counted."""

    name: str
    worker: WorkerStats


@dataclass(frozen=True, slots=True)
class KVStats:
    """A moment of all tiers.

    Attributes:
        at_s: seconds since the epoch.
        tiers: device first, then host and stores in their order.
        stores: the workers' counters.
        queried_tokens: tokens of requests that looked for cached blocks.
        hit_tokens: those that were not computed, by the tier they came from.
        loaded_blocks, lost_blocks: blocks asked of lower tiers that were used, or did not come.
        saved_blocks, dropped_saves, failed_saves: device to host; dropped: the host had no room
            or its policy did not want the block.
        saved_bytes, loaded_bytes: moved from the device to the host, and back.
        verdicts: records read from stores by what their check said; all but "ok" are misses.
        decisions: what was done about blocks of lower tiers: load, split or recompute.
        num_preemptions, recomputed_tokens: the latter were computed again because of the former.
    """

    at_s: float
    tiers: tuple[TierStats, ...]
    stores: tuple[StoreStats, ...]
    queried_tokens: int
    hit_tokens: Mapping[str, int]
    loaded_blocks: Mapping[str, int]
    lost_blocks: Mapping[str, int]
    saved_blocks: int
    dropped_saves: int
    failed_saves: int
    saved_bytes: int
    loaded_bytes: int
    verdicts: Mapping[str, int]
    decisions: Mapping[str, int]
    num_preemptions: int
    recomputed_tokens: int

    @property
    def num_rejected(self) -> int:
        """Records that failed their check: damaged, expired, or not what was asked for."""
        return sum(count for verdict, count in self.verdicts.items() if verdict != "ok")

    def as_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists, texts and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "KVStats":
        """Undo `as_json`; raises TypeError or KeyError if it is something else."""
        stores = [
            StoreStats(store["name"], WorkerStats(**_worker(store["worker"])))
            for store in body["stores"]
        ]
        tiers = [TierStats(**tier) for tier in body["tiers"]]
        return cls(**{**body, "tiers": tuple(tiers), "stores": tuple(stores)})

    def __str__(self) -> str:
        """The same for people, in a few lines."""
        rows = [("tier", "blocks", "bytes", "of", "evicted", "pinned", "hit tokens")]
        for tier in self.tiers:
            rows.append(
                (
                    tier.name,
                    f"{tier.num_blocks:,}",
                    show_bytes(tier.num_bytes) + ("" if tier.is_known else " ?"),
                    show_bytes(tier.max_bytes) if tier.max_bytes else "no bound",
                    f"{tier.num_evicted:,}",
                    f"{tier.num_pinned:,}",
                    f"{self.hit_tokens.get(tier.name, 0):,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.append(
            f"prompt tokens: {self.queried_tokens:,} asked for, "
            f"{sum(self.hit_tokens.values()):,} cached; preemptions: {self.num_preemptions:,}, "
            f"{self.recomputed_tokens:,} tokens recomputed"
        )
        lines.append(
            f"moved: {show_bytes(self.saved_bytes)} to the host, "
            f"{show_bytes(self.loaded_bytes)} back; dropped saves: {self.dropped_saves:,}"
        )
        damaged = {tier.name: tier.num_damaged for tier in self.tiers}
        for store in self.stores:
            one = store.worker
            notes = [f"{damaged[store.name]:,} damaged"] if damaged.get(store.name) else []
            for what, breaker in (("loads", one.load_breaker), ("writes", one.write_breaker)):
                notes += (
                    [] if breaker == "closed" else [f"{what} {_BREAKERS.get(breaker, breaker)}"]
                )
            lines.append(
                f"{store.name}: {show_bytes(one.bytes_written)} written, "
                f"{show_bytes(one.bytes_read)} read, {one.dropped_writes:,} writes dropped; "
                f"waiting: {one.queued_loads:,} loads, {one.queued_writes:,} writes"
                + "".join(f"; {note}" for note in notes)
            )
        for title, counts in (("plans", self.decisions), ("records read", self.verdicts)):
            if any(counts.values()):
                lines.append(
                    f"{title}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())
                )
        return "\n".join(lines)


_BREAKERS = {
    "open": "given up for now: the store fails",
    "half_open": "being tried again",
}


def _worker(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: OperationStats(**value) if isinstance(value, Mapping) else value
        for name, value in body.items()
    }


def show_bytes(num_bytes: float) -> str:
    """A size for people: three digits and a binary unit."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while num_bytes >= 1000 and unit != "TiB":
        num_bytes /= 1024
        unit = next(units)
    return f"{num_bytes:.3g} {unit}"
