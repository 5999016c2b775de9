"""Counters and gauges of the scheduler, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GroupPages:
    """How the pages of one KV group are used."""

    num_pages: int
    num_free: int
    num_cached: int
    num_in_use: int


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot. `num_*` of sequences and pages are of now, the rest count from the start.

    `recomputed_tokens` are positions that were computed again after a preemption.
    `queried_tokens` are the known tokens of admitted requests that looked for cached blocks,
    `hit_tokens` those that were found; resumed requests are left out of both.
    `hit_tokens_by_source` are the latter by tier: "device", "host", or a store's name.
    `decisions` counts what was done about blocks of lower tiers: load, split or recompute.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    recomputed_tokens: int
    scheduled_prefill_tokens: int
    scheduled_decode_tokens: int
    queried_tokens: int
    hit_tokens: int
    pages: tuple[GroupPages, ...]
    hit_tokens_by_source: Mapping[str, int] = field(default_factory=dict)
    decisions: Mapping[str, int] = field(default_factory=dict)
