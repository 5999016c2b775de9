"""Shadow tiers: several balances tried on a sample of the traffic; names only, no blocks.

A key belongs to the sample if the last bits of its hash are zero, so the sample is a scaled-down
image of the traffic (Waldspurger et al., FAST 2015), and a shadow that holds capacity / 2**bits of
its keys behaves as a tier of full size would. The score of a shadow is the number of its hits in
leading blocks, of which old ones count less and less. The tier goes between the balances whose
scores are too close to say which is best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.use_classes import (
    MOST_USES,
    NUM_CLASSES,
    UseClasses,
    UseMemory,
    num_remembered,
    typical_uses,
)

MIN_KEYS = 512
"""A shadow holds at least so many keys, if the tier does."""

HALF_LIFE = 16
"""A hit counts half once so many times the shadow's capacity have been referred to since."""

CHOOSE_EVERY = 64
"""References of the sample between two choices of a leader."""

OPEN_SHARE = 1 / 64
"""How much of the time a trickle lets keys in."""

TRICKLE_LEAD = 1.5
"""How many times the best score without a gate a trickle must have to lead. What a trickle keeps
depends on when it was last open, so its shadow's luck says less about the tier than that of the
others."""

NOISE = 0.5
"""A balance counts 1/e as much as the best one if its score is behind by so many times the square
root of the best score, which is how much chance moves a count."""

LEAST_SHARE = 0.01
"""A balance that counts less than this is left out."""

GATE_LEAD = 2
"""How many times the score of a trickle that could lead a gate must have to lead instead. What a
gate keeps of a loop it loses when all of the loop has come twice."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What counts how much when a key has to leave.

    Attributes:
        power: of the number of uses by which ages are divided.
        once: how long keys used once may stay, compared to what `power` gives them.
        trickle: a full tier lets hardly anything in, which keeps part of a loop that is larger
            than the tier.
        gate: a full tier lets in what was used before, and no longer ago than so many capacities
            of references; None lets in all. However soon keys used once have to leave, a long
            request of them would first take the room of others.
        head_start: this balance counts e**head_start times what its score says.
    """

    power: float
    once: float = 1.0
    trickle: bool = False
    gate: float | None = None
    head_start: float = 0.0

    def weights(self) -> list[float]:
        """Per class of uses, what its keys' ages are multiplied by."""
        weights = [typical_uses(index) ** -self.power for index in range(NUM_CLASSES)]
        return [weights[0] / self.once, *weights[1:]]

    def lets_in(self, since: float, *, is_trickle_shut: bool) -> bool:
        """Whether a full tier takes a key.

        Args:
            since: capacities of references since its last use; infinite if none is remembered.
        """
        if self.gate is not None and since >= self.gate:
            return False
        return not (self.trickle and is_trickle_shut)


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a tier does that goes between balances.

    Attributes:
        shares: the balances and how much each counts; 1 in all.
        weights: per class of uses, the geometric mean of theirs.
        gate: that of at least half of them, by shares, as in `Balance`.
        trickle: a trickle is all there is.
    """

    shares: tuple[tuple[Balance, float], ...]
    weights: tuple[float, ...]
    gate: float | None
    trickle: bool

    @classmethod
    def of(cls, *counts: tuple[Balance, float]) -> "Mixture":
        """Of balances that count so much in relation to each other, but for negligible ones."""
        total = sum(count for _, count in counts)
        kept = [(balance, count) for balance, count in counts if count > LEAST_SHARE * total]
        total = sum(count for _, count in kept)
        shares = tuple((balance, count / total) for balance, count in kept)
        logs = [[share * math.log(weight) for weight in one.weights()] for one, share in shares]
        return cls(
            shares,
            tuple(math.exp(sum(column)) for column in zip(*logs, strict=True)),
            _gate_of_half(shares),
            any(balance.trickle for balance, _ in shares),
        )

    def lets_in(self, since: float, *, is_trickle_shut: bool) -> bool:
        """Whether a full tier takes a key; see `Balance.lets_in`."""
        if self.gate is not None and since >= self.gate:
            return False
        return not (self.trickle and is_trickle_shut)


def _gate_of_half(shares: Sequence[tuple[Balance, float]]) -> float | None:
    """The narrowest gate that lets in all that balances with half of the shares let in."""
    so_far = sum(share for balance, share in shares if balance.gate is None)
    if so_far >= 0.5:
        return None
    gated = [(balance.gate, share) for balance, share in shares if balance.gate is not None]
    *wider, narrowest = sorted(gated, reverse=True)
    for gate, share in wider:
        so_far += share
        if so_far >= 0.5:
            return gate
    return narrowest[0]


BALANCES = (
    Balance(0.5, head_start=2.0),  # large tiers see few references: where they know nothing...
    Balance(0.0, head_start=2.0),  # ...these two are never far off
    Balance(0.0, once=0.3),
    Balance(0.0, once=0.03),
    Balance(1.0),
    Balance(1.0, once=0.1),
    Balance(2.0),
    Balance(4.0),
    Balance(8.0),
    Balance(0.0, trickle=True),
    Balance(0.0, gate=math.inf),
    Balance(0.5, gate=8.0),
    Balance(0.0, gate=1.25),
    Balance(0.0, once=4.0),
)


class Shadows:
    """One shadow per balance, and what they say that the tier should do.

    Args:
        capacity: of the tier that they are shadows of.
    """

    def __init__(self, capacity: int):
        bits = max(0, (capacity // MIN_KEYS).bit_length() - 1)
        num_keys = max(1, capacity >> bits)
        self._mask = (1 << bits) - 1
        self._capacity = capacity
        self._memory = UseMemory(max(num_keys, num_remembered(capacity) >> bits))
        self._shadows = [_Shadow(balance, num_keys) for balance in BALANCES]
        self._mixture = Mixture.of((BALANCES[0], 1.0))
        self._decay = 0.5 ** (CHOOSE_EVERY / (HALF_LIFE * num_keys))
        self._now = 0
        self._num_until_choice = CHOOSE_EVERY

    @property
    def mixture(self) -> Mixture:
        """The balances that have had the most hits lately."""
        return self._mixture

    def observe(self, keys: Sequence[BlockHash]) -> None:
        """A request needs these blocks, head first."""
        self._now += len(keys)
        now, mask = self._now, self._mask
        uses: list[_Use] = []
        for depth, key in enumerate(keys):
            if not int.from_bytes(key[:4], "little") & mask:
                time = now - depth  # the suffix is used first
                count, age = self._memory.get(key, time)
                self._memory.put(key, count + 1, time)
                uses.append(_Use(key, min(count + 1, MOST_USES), time, age / self._capacity))
        if not uses:
            return
        is_shut = is_trickle_shut(now, self._capacity)
        for shadow in self._shadows:
            shadow.serve(uses, is_shut)
        self._num_until_choice -= len(uses)
        while self._num_until_choice <= 0:
            self._num_until_choice += CHOOSE_EVERY
            self._choose()

    def check_integrity(self) -> None:
        for shadow in self._shadows:
            shadow.check_integrity()

    def _choose(self) -> None:
        for shadow in self._shadows:
            shadow.score *= self._decay
        self._mixture = self._mix()

    def _mix(self) -> Mixture:
        """The steady balances by their scores, or the trickle that is clearly ahead of them."""
        steady = [shadow for shadow in self._shadows if not shadow.balance.trickle]
        best = max(shadow.score for shadow in steady)
        best_open = max(shadow.score for shadow in steady if shadow.balance.gate is None)
        for shadow in self._shadows:
            is_ahead = shadow.score >= max(TRICKLE_LEAD * best_open, best / GATE_LEAD)
            if shadow.balance.trickle and is_ahead:  # or nothing hits at all
                return Mixture.of((shadow.balance, 1.0))
        noise = NOISE * math.sqrt(max(best, 1.0))
        counts = (
            (one.balance, math.exp((one.score - best) / noise + one.balance.head_start))
            for one in steady
        )
        return Mixture.of(*counts)


class _Use(NamedTuple):
    """A sampled key, how often it has now been used, when, and how long after the time before.

    Attributes:
        time: in references.
        since: in capacities of references; infinite if no use before is remembered.
    """

    key: BlockHash
    num_uses: int
    time: int
    since: float


class _Shadow:
    """One balance and the keys that a tier would hold by it."""

    def __init__(self, balance: Balance, capacity: int):
        self.balance = balance
        self.weights = balance.weights()
        self.score = 0.0
        self._capacity = capacity
        self._keys = UseClasses()

    def serve(self, request: Sequence[_Use], is_shut: bool) -> None:
        """Count the leading hits, then take the blocks in, suffix first."""
        keys = self._keys
        for use in request:
            if use.key not in keys:
                break
            self.score += 1
        for key, num_uses, now, since in reversed(request):
            if key in keys:
                keys.use(key, now)
            elif len(keys) < self._capacity:
                keys.put(key, num_uses, now)
            elif self.balance.lets_in(since, is_trickle_shut=is_shut):
                victim = keys.first(self.weights, now)
                assert victim is not None
                keys.pop(victim)
                keys.put(key, num_uses, now)

    def check_integrity(self) -> None:
        assert len(self._keys) <= self._capacity


def is_trickle_shut(now: int, capacity: int) -> bool:
    """Whether a trickle lets nothing in at this time; it opens for a moment, again and again."""
    return now % capacity >= max(1, int(capacity * OPEN_SHARE))
