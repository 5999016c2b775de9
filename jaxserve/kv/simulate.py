"""Replays traces through the tiers' own index and policies; no bytes move.

A request hits its leading blocks, each in the first tier that has it, up to the first block that
no tier has. Then every tier is told of all of the request's blocks, suffix first: those that it
has are used, the others offered. That is a cascade that copies early: a block goes to every tier
whose policy lets it in. A tier alone behaves as in the usual studies of one cache.

Knows nothing of where traces come from, of time (a trace's order is its clock), bytes or jax;
a `PlanMeter` beside it adds what the planner would do and how long that would take.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.policy.factory import make_policy
from jaxserve.kv.simulate_times import PlanMeter
from jaxserve.kv.traces import Trace, count_leading

GROUP = 0
REPORT_EVERY = 500
NEVER = 1 << 60

Report = Callable[[str, int, int], object]


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One simulated tier.

    Attributes:
        name: what it is called in the result.
        policy: as in `make_policy`.
        capacity: blocks that it holds.
    """

    name: str
    policy: str
    capacity: int


@dataclass(frozen=True, slots=True)
class TierResult:
    """What one tier did, in blocks."""

    spec: TierSpec
    num_hits: int
    num_stores: int
    num_evictions: int


@dataclass(frozen=True, slots=True)
class Result:
    """What the tiers did together."""

    tiers: tuple[TierResult, ...]
    num_references: int

    @property
    def hit_ratio(self) -> float:
        """Blocks served by any tier, of all blocks that were asked for."""
        return sum(tier.num_hits for tier in self.tiers) / max(1, self.num_references)

    @property
    def stores_per_reference(self) -> float:
        return sum(tier.num_stores for tier in self.tiers) / max(1, self.num_references)


class _Tier:
    """A host tier's index, driven as the tiers drive it."""

    def __init__(self, spec: TierSpec):
        self.spec = spec
        self.num_hits = self.num_stores = 0
        self._policy = make_policy(spec.policy, spec.capacity)
        self._index = HostIndex(spec.capacity, 1, self._policy)

    def has(self, key: BlockHash) -> bool:
        return self._index.has(key, GROUP)

    def refer(self, request: Sequence[BlockHash]) -> None:
        index = self._index
        self._policy.observe(request)
        for key in reversed(request):
            index.touch(key)
            if index.has(key, GROUP):
                continue
            slot = index.reserve(key, 1)
            if slot is not None:
                index.commit(slot, index.generation(slot), 1)
                self.num_stores += 1

    def result(self) -> TierResult:
        self._index.check_integrity()
        return TierResult(self.spec, self.num_hits, self.num_stores, self._index.num_evicted)


def replay(
    trace: Trace,
    specs: Sequence[TierSpec],
    report: Report | None = None,
    meter: PlanMeter | None = None,
) -> Result:
    """What tiers of these sizes and policies would have done, nearest first, empty at the start.

    Args:
        report: told of the progress in requests.
        meter: told how many leading blocks each tier had of each request.

    Raises:
        ConfigError: a policy is unknown, or a tier has no room.
    """
    tiers = [_Tier(spec) for spec in specs]
    what = ", ".join(f"{spec.name} {spec.policy}" for spec in specs)
    for number, request in enumerate(trace.requests, 1):
        hits = _leading_hits(tiers, request)
        for tier, num_hits in zip(tiers, hits, strict=True):
            tier.num_hits += num_hits
        if meter is not None:
            meter.serve(len(request), hits)
        for tier in tiers:
            tier.refer(request)
        if report is not None and (number % REPORT_EVERY == 0 or number == len(trace.requests)):
            report(what, number, len(trace.requests))
    return Result(tuple(tier.result() for tier in tiers), trace.num_references)


def _leading_hits(tiers: Sequence[_Tier], request: Sequence[BlockHash]) -> list[int]:
    """Per tier, how many leading blocks it has that no nearer one has."""
    hits = [0] * len(tiers)
    for key in request:
        index = next((index for index, tier in enumerate(tiers) if tier.has(key)), None)
        if index is None:
            break
        hits[index] += 1
    return hits


def belady_hit_ratio(trace: Trace, capacity: int) -> float:
    """Hits of one tier that knows the future: it keeps what is needed soonest.

    Not stored: what is not needed again, or not before everything that is there. Among blocks
    needed by the same request the suffix leaves first. A bound for policies that cannot look
    ahead; prefixes make it a good heuristic, not a proof.
    """
    futures: dict[BlockHash, deque[int]] = {}
    for time, request in enumerate(trace.requests):
        for key in request:
            futures.setdefault(key, deque()).append(time)
    resident: set[BlockHash] = set()
    due: dict[BlockHash, int] = {}
    latest: list[tuple[int, int, BlockHash]] = []
    num_hits = 0
    for request in trace.requests:
        num_hits += count_leading(request, resident)
        for depth in range(len(request) - 1, -1, -1):
            key = request[depth]
            future = futures[key]
            future.popleft()
            next_use = future[0] if future else NEVER
            if key not in resident:
                if next_use == NEVER or not _make_room(resident, due, latest, capacity, next_use):
                    continue
                resident.add(key)
            due[key] = next_use
            heapq.heappush(latest, (-next_use, -depth, key))
    return num_hits / max(1, trace.num_references)


def _make_room(
    resident: set[BlockHash],
    due: dict[BlockHash, int],
    latest: list[tuple[int, int, BlockHash]],
    capacity: int,
    next_use: int,
) -> bool:
    """Evict the block that is needed last, unless the new one would be needed later still."""
    while len(resident) >= capacity:
        negative_use, _, key = latest[0]
        is_stale = key not in resident or due[key] != -negative_use
        if not is_stale and -negative_use <= next_use:
            return False
        heapq.heappop(latest)
        if not is_stale:
            resident.discard(key)
            del due[key]
    return True
