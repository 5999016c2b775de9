"""The one interface of replacement policies; a tier owns one object of it.

A policy orders the keys that are resident in a tier, and may remember some that are not (ghosts).
It decides; the tier acts: the tier calls `admits` for a key it could store, evicts what `victim`
names, and reports each change. All sizes are in blocks, which are equal within a tier.

Blocks of a sequence are inserted and touched suffix first, so that a policy that goes by recency
evicts a suffix before the head it needs. Knows nothing of time, bytes, tiers or jax. Every
operation is O(1) per key, amortised; memory is O(capacity).
"""

from collections.abc import Callable, Sequence, Set
from typing import Protocol

from jaxserve.kv.blocks import BlockHash


class Policy(Protocol):
    """Order and admission of one tier's blocks."""

    capacity: int
    """Most blocks that the tier holds; at least 1."""

    def admits(self, key: BlockHash) -> bool:
        """Whether a key that is not resident may be stored now. Counts as an offer of it."""
        ...

    def insert(self, key: BlockHash) -> None:
        """The key has become resident; it was not before."""
        ...

    def touch(self, key: BlockHash) -> None:
        """A resident key has been used."""
        ...

    def miss(self, key: BlockHash) -> None:
        """A key that is not resident was looked for."""
        ...

    def observe(self, keys: Sequence[BlockHash]) -> None:
        """A request needs these blocks, head first, whatever tier they are in or come from.

        Told once per request, before it touches or offers any; a policy may learn from it which
        prefixes would have been hits. Optional for the tier: what learns does with less.
        """
        ...

    def victim(self, may_leave: Callable[[BlockHash], bool]) -> BlockHash | None:
        """The resident key that should leave first among those that may; None if none may.

        A question, not an order: the key stays resident until the tier calls `remove`. A policy
        may age its keys meanwhile, and counts a key that may not leave as just used.
        """
        ...

    def remove(self, key: BlockHash, *, evicted: bool) -> None:
        """The key is no longer resident: `evicted` to make room, or taken back for good."""
        ...

    def check_integrity(self, resident: Set[BlockHash]) -> None:
        """Assert, for tests, that the policy's keys are those resident in the tier, and no more."""
        ...
