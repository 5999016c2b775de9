"""What `Tiers` asks of its partners: whoever moves bytes to and from the device, and the stores.

Both take orders at once, act on threads of their own, and report to the inbox of `Tiers`.
"""

from collections.abc import Sequence
from typing import Protocol

from jaxserve.kv.blocks import BlockHash


class Mover(Protocol):
    """Moves bytes between host slots and the device; reports to the inbox."""

    @property
    def has_room(self) -> bool:
        """A save can start at once; otherwise it holds the engine up until another one is done, if
        it is needed, and else is given up."""
        ...

    def stage(self, piece_id: int, slots: Sequence[int]) -> None:
        """Start to bring the slots' blocks to the device as one piece; answers `Staged`."""
        ...

    def drop(self, piece_id: int) -> None:
        """A staged piece will not be used."""
        ...


class Cascade(Protocol):
    """The stores in their order; reports to the inbox."""

    def refresh(self) -> None:
        """Leave out stores that take no loads now."""
        ...

    def look_up(self, ticket: int, names: Sequence[BlockHash]) -> bool:
        """Ask the stores for blocks of which nothing is known; True: answers `LookedUp`."""
        ...

    def note_found(self, names: Sequence[BlockHash], found: Sequence[int]) -> None:
        """Take in what a look-up has found."""
        ...

    def note_stored(self, name: BlockHash, stored: int) -> None:
        """Take in which stores have a block now."""
        ...

    def forget(self, names: Sequence[BlockHash], source: str) -> None:
        """A store may no longer have these blocks."""
        ...

    def estimate_look_up_s(self, num_names: int) -> float:
        """Seconds that looking up takes."""
        ...

    def estimate_found_s(self, num_names: int) -> float:
        """Seconds that fetching takes what a look-up may find."""
        ...

    @property
    def is_reliable(self) -> bool:
        """The stores have kept to the estimates lately, and nothing is overdue."""
        ...

    def where(self, name: BlockHash) -> str | None:
        """The first store that is known to have a block."""
        ...

    def piece_blocks(self, source: str) -> int:
        """Blocks to ask a store for at a time."""
        ...

    def fetch(self, piece_id: int, names: Sequence[BlockHash], slots: Sequence[int]) -> None:
        """Start to read blocks into reserved slots; answers `Fetched`."""
        ...

    def withdraw(self, piece_id: int) -> None:
        """Do not read a piece that waits for its turn; then answers `Fetched`, too."""
        ...

    def offer(self, name: BlockHash, slot: int) -> bool:
        """Start to write a slot to every store that lacks it; True: answers `Offered`."""
        ...

    def estimate_s(self, names: Sequence[BlockHash]) -> float:
        """Seconds that fetching these blocks would take now."""
        ...
