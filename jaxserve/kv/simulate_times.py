"""What the planner would decide in a simulated cascade, and the seconds that prefills would take.

The first tier is the device, whose blocks cost nothing; the second is the host, the others are
stores. Costs are given, not measured: seconds per prompt token, and bytes per second from each
tier. Requests do not wait for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.kv.planner import Choice, LoadPlanner

CALIBRATION_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Costs:
    """The simulated machine.

    Attributes:
        block_tokens: tokens per block of the trace.
        block_bytes: bytes per block.
        prefill_tokens_per_s: speed of computing.
        bytes_per_s: from the host to the device, then from each store to the host.
    """

    block_tokens: int
    block_bytes: int
    prefill_tokens_per_s: float
    bytes_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Sums over all requests of the time until the prompt's keys and values are there."""

    planned: float
    always_load: float
    never_load: float


class PlanMeter:
    """Asks the planner about each request and adds up what follows."""

    def __init__(self, costs: Costs):
        self._costs = costs
        self._planner = LoadPlanner(costs.block_tokens)
        self._planner.prefill.observe(
            CALIBRATION_TOKENS, 0.0, CALIBRATION_TOKENS / costs.prefill_tokens_per_s
        )
        self.decisions = {choice.value: 0 for choice in Choice}
        self._planned_s = self._load_s = self._compute_s = 0.0

    @property
    def seconds(self) -> Seconds:
        return Seconds(self._planned_s, self._load_s, self._compute_s)

    def serve(self, num_blocks: int, hits: Sequence[int]) -> None:
        """A request of so many blocks, of which so many leading ones are in each tier.

        Args:
            hits: per tier, how many leading blocks it served because no nearer one had them.
        """
        first, end = hits[0], sum(hits)
        host_end = first + hits[1] if len(hits) > 1 else first
        rest_s = self._compute(end, num_blocks)
        if end == first:
            self._add(rest_s, rest_s, rest_s)
            return
        decision = self._planner.decide(
            first,
            host_end,
            end,
            lambda count: self._load(1, count),
            lambda count: max(self._load(tier, count) for tier in range(2, len(hits))),
        )
        self.decisions[decision.choice.value] += 1
        compute_s = self._compute(first, end)
        load_s = self._load(1, end - first)  # what stores send passes through the host
        load_s += sum(self._load(tier, hits[tier]) for tier in range(2, len(hits)))
        if decision.choice is Choice.RECOMPUTE:
            planned_s = compute_s
        elif decision.choice is Choice.SPLIT:
            planned_s = self._compute(first, decision.compute_until // self._costs.block_tokens)
        else:  # a plan may stop short of what is far away
            planned_s = load_s if decision.end == end else self._load(1, decision.end - first)
            planned_s += self._compute(decision.end, end)
        self._add(planned_s + rest_s, load_s + rest_s, compute_s + rest_s)

    def _add(self, planned_s: float, load_s: float, compute_s: float) -> None:
        self._planned_s += planned_s
        self._load_s += load_s
        self._compute_s += compute_s

    def _compute(self, start: int, end: int) -> float:
        return (end - start) * self._costs.block_tokens / self._costs.prefill_tokens_per_s

    def _load(self, tier: int, num_blocks: int) -> float:
        return num_blocks * self._costs.block_bytes / self._costs.bytes_per_s[tier - 1]
