"""The fake engine with figures: pages that fill while it works, and three tiers."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jaxserve.kv.stats import KVStats, StoreStats, TierStats
from jaxserve.kv.stores.stats import OperationStats, WorkerStats
from jaxserve.scheduler.stats import GroupPages, SchedulerStats
from jaxserve.types import LoadDecision, PromptReuse, Request, TokenEvent
from tests.fake_engine import FakeEngine

NUM_PAGES = 512
BLOCK_BYTES = 1 << 20
GIB = 1 << 30


@dataclass
class WatchedEngine(FakeEngine):
    """Every prompt finds half of its tokens somewhere, the device first, then host and disk."""

    max_model_len: int = 4096
    broken_store: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request) -> None:
        super().add(request)
        self._seen_prompts.clear()  # nothing is cached but what is said here
        num = len(request.prompt_ids)
        cached = {"device": num // 4, "host": num // 5, "disk": num // 8}
        self.reuse = PromptReuse(cached, LoadDecision("load", 4, 4, 0.01, 0.2))
        self.counts.update({f"hit-{name}": count for name, count in cached.items()})
        self.counts.update(prompt=num, blocks=1, load=1)

    def step(self) -> list[TokenEvent]:
        events = super().step()
        self.counts.update(decode=len(events), steps=1)
        return events

    def stats(self) -> SchedulerStats:
        counts, running = self.counts, min(len(self.live_ids), self.config.scheduler.max_num_seqs)
        cached = min(60 + 8 * counts["blocks"], NUM_PAGES - 40)
        in_use = min(12 * running, NUM_PAGES - cached)
        return SchedulerStats(
            num_running=running,
            num_waiting=len(self.live_ids) - running,
            num_steps=counts["steps"],
            num_preemptions=0,
            recomputed_tokens=0,
            scheduled_prefill_tokens=counts["prompt"],
            scheduled_decode_tokens=counts["decode"],
            queried_tokens=counts["prompt"],
            hit_tokens=sum(self.hits().values()),
            pages=(GroupPages(NUM_PAGES, NUM_PAGES - cached - in_use, cached, in_use),),
            hit_tokens_by_source=self.hits(),
            decisions=self.decisions(),
        )

    def kv_stats(self) -> KVStats:
        blocks = self.counts["blocks"]
        used = min(60 + 8 * blocks, NUM_PAGES) * BLOCK_BYTES
        tiers = (
            TierStats("device", 60, used, NUM_PAGES * BLOCK_BYTES, 12 * blocks),
            TierStats("host", 900, 3 * GIB + 40 * blocks * BLOCK_BYTES, 8 * GIB, 40, 3),
            TierStats("disk", 21_000, 61 * GIB, 100 * GIB),
        )
        return KVStats(
            at_s=0.0,
            tiers=tiers,
            stores=(StoreStats("disk", _worker(blocks, self.broken_store)),),
            queried_tokens=self.counts["prompt"],
            hit_tokens=self.hits(),
            loaded_blocks={"host": blocks},
            lost_blocks={"disk": 2} if self.broken_store else {},
            saved_blocks=9 * blocks,
            dropped_saves=0,
            failed_saves=0,
            saved_bytes=40 * blocks * BLOCK_BYTES,
            loaded_bytes=12 * blocks * BLOCK_BYTES,
            verdicts={"ok": 40 * blocks, "corrupt": 1 if self.broken_store else 0},
            decisions=self.decisions(),
            num_preemptions=0,
            recomputed_tokens=0,
        )

    def hits(self) -> dict[str, int]:
        return {name: self.counts[f"hit-{name}"] for name in ("device", "host", "disk")}

    def decisions(self) -> dict[str, int]:
        return {"load": self.counts["load"], "split": 0, "recompute": 0}


def _worker(blocks: int, is_broken: bool) -> WorkerStats:
    calls: dict[str, Any] = dict.fromkeys(("probe", "put", "alone"), OperationStats())
    reads = OperationStats(calls=40, latency_counts=(10, 29, 1) + (0,) * 8)
    return WorkerStats(
        **calls,
        get=OperationStats(calls=40, failures=7) if is_broken else reads,
        probe_hits=0,
        probe_misses=0,
        hits=30,
        misses=10,
        bytes_read=(7 * GIB) + 12 * blocks * BLOCK_BYTES,
        bytes_written=(61 * GIB) + 20 * blocks * BLOCK_BYTES,
        stored=100,
        present=0,
        declined=0,
        full=0,
        failed=0,
        dropped_writes=0,
        refused_loads=0,
        cancelled=0,
        queued_loads=0,
        queued_load_bytes=0,
        queued_writes=3,
        queued_write_bytes=0,
        stuck_threads=0,
        load_breaker="open" if is_broken else "closed",  # pyright: ignore[reportArgumentType]
        write_breaker="closed",  # pyright: ignore[reportArgumentType]
        num_breaker_openings=0,
        load_bytes_per_s=1.9e9,
        write_bytes_per_s=8e8,
    )
