"""What moves between the device's pages and lower tiers around one step, as pure descriptions."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


class PageSave(NamedTuple):
    """Copy a page of a group into a host slot, as its content is before the step runs.

    A save that is needed (a preempted sequence waits for the block) is worth holding the step up
    for; others are given up where too many are on their way.
    """

    group: int
    page: int
    slot: int
    generation: int
    is_needed: bool = False


@dataclass(frozen=True, slots=True)
class PieceLoad:
    """Write a staged piece into pages before the step runs.

    Attributes:
        piece_id: names what was staged.
        pages: per KV group, a page for each block of the piece; -1: the group does not need it.
    """

    piece_id: int
    pages: tuple[Int32[np.ndarray, " blocks"], ...]


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What moves between tiers just before a step: first all loads, then all saves.

    A page that is loaded was allocated by an earlier plan, which saved what it held.
    """

    loads: tuple[PieceLoad, ...] = ()
    saves: tuple[PageSave, ...] = ()


NO_TRANSFERS = TransferPlan()
