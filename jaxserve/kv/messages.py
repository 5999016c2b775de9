"""What movers and stores report to the engine's thread, through the inbox of `Tiers`."""

from typing import NamedTuple, TypeAlias

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.transfer_plan import PageSave


class Saved(NamedTuple):
    """A page's bytes are in its slot, or will not be."""

    save: PageSave
    is_ok: bool


class Staged(NamedTuple):
    """A piece is on the device, or will not be. Its slots are no longer read."""

    piece_id: int
    is_ok: bool
    num_bytes: int
    duration_s: float


class Fetched(NamedTuple):
    """A store has answered for a piece: which of its blocks are in their slots, verified.

    If it was not asked after all, nothing is known of those that are not.
    """

    piece_id: int
    is_ok: tuple[bool, ...]
    was_asked: bool = True


class Offered(NamedTuple):
    """The stores no longer read a slot; bit i of `stored`: the i-th has the block."""

    name: BlockHash
    slot: int
    stored: int


class LookedUp(NamedTuple):
    """What stores have; bit i of `found[n]`: the i-th has block n. A ticket: that is the answer."""

    ticket: int | None
    names: tuple[BlockHash, ...]
    found: tuple[int, ...]


Message: TypeAlias = Saved | Staged | Fetched | Offered | LookedUp
