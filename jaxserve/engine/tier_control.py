"""What can be asked of, and done to, the tiers of a running engine: its thread's part of it.

Every method is short and for the engine's thread, between steps. What may take long (stores) is
left to `KVAdmin`, which calls this. Knows nothing of HTTP, text or threads.
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxserve.engine.history import TierHistory
from jaxserve.engine.recent_prompts import KnownPrompt, RecentPrompts
from jaxserve.engine.tiers import LowerTiers
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.stats import KVStats, StoreStats, TierStats
from jaxserve.kv.stores.usage import UsageReader
from jaxserve.kv.tiers import DEVICE, HOST
from jaxserve.scheduler import Scheduler

MAX_PINNED_SHARE = 0.5
"""Of the host's slots: the rest must be able to come and go."""


class Forgotten(NamedTuple):
    """How many blocks the device (over all groups) and the host forgot."""

    device_blocks: int
    host_blocks: int


class ErasedHere(NamedTuple):
    """What left device and host, and how many requests of the tenant go on."""

    forgotten: Forgotten
    live_requests: int
    is_exact: bool


class Resident(NamedTuple):
    """A block that the device or the host has."""

    name: BlockHash
    tiers: tuple[str, ...]
    num_bytes: int
    tenant: bytes
    is_pinned: bool


class TierControl:
    """The tiers of one engine.

    Args:
        scheduler: owns what is on the device.
        lower: what is below it; None: nothing.
        page_bytes: size of one page, per KV group.
    """

    def __init__(self, scheduler: Scheduler, lower: LowerTiers | None, page_bytes: Sequence[int]):
        self.lower = lower
        self.scheduler = scheduler
        self.prompts = RecentPrompts()
        self.history = TierHistory(self.stats)
        self._page_bytes = tuple(page_bytes)
        workers = lower.cascade.workers if lower is not None and lower.cascade is not None else ()
        self.workers = tuple(workers)
        self._usage = {worker.name: UsageReader(worker.store) for worker in self.workers}

    # --- statistics ---

    def stats(self) -> KVStats:
        """All tiers now; a store that does not answer at once is told by its last known numbers."""
        stats, lower = self.scheduler.stats(), self.lower
        counters = None if lower is None else lower.tiers.counters
        cascade = None if lower is None else lower.cascade
        return KVStats(
            at_s=time.time(),
            tiers=(self._device(), *self._lower_tiers()),
            stores=tuple(StoreStats(worker.name, worker.stats()) for worker in self.workers),
            queried_tokens=stats.queried_tokens,
            hit_tokens=stats.hit_tokens_by_source,
            loaded_blocks=dict(counters.loaded) if counters else {},
            lost_blocks=dict(counters.lost) if counters else {},
            saved_blocks=counters.saved if counters else 0,
            dropped_saves=counters.saves_dropped if counters else 0,
            failed_saves=counters.save_failures if counters else 0,
            saved_bytes=lower.transfers.saved_bytes if lower else 0,
            loaded_bytes=counters.staged_bytes if counters else 0,
            verdicts=dict(cascade.verdicts) if cascade else {},
            decisions=stats.decisions,
            num_preemptions=stats.num_preemptions,
            recomputed_tokens=stats.recomputed_tokens,
        )

    def _device(self) -> TierStats:
        groups = self.scheduler.index.groups
        sizes = list(zip(groups, self._page_bytes, strict=True))
        return TierStats(
            DEVICE,
            num_blocks=sum(group.num_blocks for group in groups),
            num_bytes=sum(group.num_blocks * size for group, size in sizes),
            max_bytes=sum(group.num_pages * size for group, size in sizes),
            num_evicted=sum(group.num_evicted for group in groups),
        )

    def _lower_tiers(self) -> list[TierStats]:
        if self.lower is None:
            return []
        host, pool = self.lower.tiers.host, self.lower.pool
        sizes = zip(host.num_resident, pool.block_bytes, strict=True)
        tiers = [
            TierStats(
                HOST,
                num_blocks=max(host.num_resident),
                num_bytes=sum(count * size for count, size in sizes),
                max_bytes=pool.num_bytes,
                num_evicted=host.num_evicted,
                num_pinned=host.num_pinned,
            )
        ]
        for worker in self.workers:
            name = worker.name
            usage, is_fresh = self._usage[name].read()
            tiers.append(
                TierStats(
                    name,
                    usage.num_records,
                    usage.num_bytes,
                    usage.max_bytes,
                    usage.num_evicted,
                    usage.num_pinned,
                    usage.num_damaged,
                    is_known=is_fresh and worker.stats().load_breaker == "closed",
                )
            )
        return tiers

    # --- what is where ---

    def names_of(self, prompt: KnownPrompt) -> list[BlockHash]:
        """The names of a prompt's full blocks."""
        return self.scheduler.names_of(prompt.token_ids, prompt.cache_salt)

    def on_host(self, names: Sequence[BlockHash]) -> set[BlockHash]:
        """Which of the blocks the host has, whole."""
        if self.lower is None:
            return set()
        return {name for name in names if self.lower.tiers.host.is_complete(name)}

    def resident(self, prefix: str, limit: int) -> list[Resident]:
        """Blocks of device and host whose hex name starts with `prefix`; at most `limit`."""
        found: list[Resident] = []
        groups = self.scheduler.index.groups
        host = None if self.lower is None else self.lower.tiers.host
        names = {name: None for group in groups for name in group.names()}
        names |= dict.fromkeys(host.names() if host is not None else ())
        for name in names:
            if len(found) >= limit:
                break
            if self._is_private(name) or not name.hex().startswith(prefix):
                continue
            sizes = [
                size
                for group, size in zip(groups, self._page_bytes, strict=True)
                if group.has(name)
            ]
            in_host = host is not None and any(host.has(name, g) for g in range(len(groups)))
            tiers = (DEVICE,) * bool(sizes) + (HOST,) * in_host
            slot_bytes = self.lower.pool.slot_bytes if self.lower and in_host else 0
            tenant = self.lower.tiers.labels.of(name) if self.lower is not None else bytes(16)
            is_pinned = host is not None and host.is_pinned(name)
            found.append(Resident(name, tiers, slot_bytes or sum(sizes), tenant, is_pinned))
        return found

    def _is_private(self, name: BlockHash) -> bool:
        return self.lower is not None and self.lower.tiers.is_private(name)

    def integrity(self) -> str:
        """What is wrong with the books of device and host; "" if they add up."""
        try:
            self.scheduler.check_integrity()
        except AssertionError as error:
            return str(error)
        return ""

    # --- forgetting ---

    def clear(self, device: bool, host: bool) -> Forgotten:
        """Forget all blocks that device or host could serve to anybody; running requests go on."""
        forgotten = Forgotten(
            self._forget_on_device(None) if device else 0,
            self._forget_on_host(None) if host else 0,
        )
        if device and host:
            self.prompts.forget()
        return forgotten

    def forget(self, names: Sequence[BlockHash]) -> Forgotten:
        """Forget these blocks."""
        return Forgotten(self._forget_on_device(names), self._forget_on_host(names))

    def erase(self, cache_salt: str) -> ErasedHere:
        """Forget what device and host have of a tenant, and keep nothing more of its requests."""
        tenant = self.scheduler.tenant_of(cache_salt)
        live = self.scheduler.stop_storing(tenant)
        self.prompts.forget(cache_salt)
        if self.lower is None or not self.lower.tiers.labels.is_complete:
            return ErasedHere(self.clear(device=True, host=True), live, is_exact=False)
        labels = self.lower.tiers.labels
        # The labels stay: what is on its way to the stores must arrive there as the tenant's.
        return ErasedHere(self.forget(labels.names_of(tenant)), live, is_exact=True)

    def _forget_on_device(self, names: Sequence[BlockHash] | None) -> int:
        return sum(
            group.forget(name)
            for group in self.scheduler.index.groups
            for name in self._forgettable(group.names() if names is None else names)
        )

    def _forget_on_host(self, names: Sequence[BlockHash] | None) -> int:
        if self.lower is None:
            return 0
        self.lower.tiers.poll()
        host = self.lower.tiers.host
        return sum(
            host.forget(name)
            for name in self._forgettable(host.all_names() if names is None else names)
        )

    def _forgettable(self, names: Iterable[BlockHash]) -> list[BlockHash]:
        """Private blocks belong to a preempted request alone: nobody else can find them."""
        return [name for name in names if not self._is_private(name)]

    def forget_stores(self, names: Sequence[BlockHash] | None = None) -> None:
        """Take it that no store has these blocks (None: any) until one says so again."""
        if self.lower is None or self.lower.cascade is None:
            return
        self.lower.tiers.poll()
        if names is None:
            self.lower.cascade.forget_all()
            return
        for worker in self.workers:
            self.lower.cascade.forget(names, worker.name)

    # --- pins ---

    def pin(self, names: Sequence[BlockHash], pinned: bool) -> int:
        """Keep blocks from eviction on the host, or stop; how many are there and are so now.

        No more slots than `MAX_PINNED_SHARE` are pinned: the first names come first.
        """
        if self.lower is None:
            return 0
        host, count = self.lower.tiers.host, 0
        for name in names:
            is_full = host.num_pinned >= int(host.num_slots * MAX_PINNED_SHARE)
            if pinned and is_full and not host.is_pinned(name):
                break
            count += host.pin(name, pinned)
        return count
