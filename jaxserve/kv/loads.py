"""A sequence's blocks on their way from lower tiers to its pages.

A job covers the blocks [first, end) of one sequence, in pieces. Pieces are asked for from the tail
while the head may be computed meanwhile (Cake, arXiv 2410.03065). Whatever has arrived is written
into its pages at once, so that it does not take up the device's memory twice; what follows the
computed part without a gap is taken over. So a piece that is late, lost or corrupt costs computing
it and nothing else.

    FETCHING    on its way from a store into host slots
    STAGING     on its way from host slots to the device
    READY       on the device, for the next step to write it into its pages
    WRITTEN     in its pages; counts once everything before it is there
    TAKEN       the sequence goes on behind it, or it was computed meanwhile
    LOST        will not come

Pure state: no arrays, no jax, no clock of its own.
"""

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from jaxserve.kv.blocks import BlockHash

STORE_PIECE_BLOCKS = 16
"""Most blocks that a store is asked for at a time: less arrives sooner, more costs fewer calls."""

RACE_TOKENS = 512
"""Computed at a time while late pieces may still arrive, and twice that if none has come; later as
much as has been computed so far: small steps cost more, and what is late by much may never come."""


class PieceState(enum.Enum):
    """Where a piece is; see the module docstring."""

    FETCHING = "fetching"
    STAGING = "staging"
    READY = "ready"
    WRITTEN = "written"
    TAKEN = "taken"
    LOST = "lost"


_COMING = (PieceState.FETCHING, PieceState.STAGING, PieceState.READY)


@dataclass(slots=True, eq=False)
class Piece:
    """Neighbouring blocks [start, end) that move together.

    Attributes:
        piece_id: unique.
        slots: host slot of each block, held until the piece is staged.
        source: where the blocks were found: "host", or a store's name.
        wanted: somebody still waits for it.
    """

    piece_id: int
    start: int
    end: int
    state: PieceState
    source: str
    slots: list[int] = field(default_factory=list)
    wanted: bool = True

    @property
    def is_live(self) -> bool:
        """It may still be taken over."""
        return self.wanted and (self.is_coming or self.state is PieceState.WRITTEN)

    @property
    def is_coming(self) -> bool:
        """It is not in its pages yet."""
        return self.state in _COMING


@dataclass(slots=True, eq=False)
class LoadJob:
    """What one sequence loads.

    Attributes:
        names: of all blocks from the sequence's first one to the last of the job.
        end_tokens: tokens that are there once all pieces are: the end of the last block, or less.
        page_size: tokens per block.
        pages: per KV group, the page of each block that the group needs, by block.
        all_or_nothing: a group has a window, so only the whole job can be taken over, and nothing
            can be computed before: the pages that the head needs are not there.
        compute_until: position up to which to compute before `deadline_s`.
        deadline_s: on the engine's clock; later the sequence computes on, piece by piece.
        started_s: on the same clock.
        patience_s: the deadline is no sooner than this after the last piece that came, as long as
            loading is no slower than computing, which would take `compute_s` for the whole job.
        pieces: tail first.
    """

    names: Seq[BlockHash]
    end_tokens: int
    page_size: int
    pages: tuple[dict[int, int], ...]
    all_or_nothing: bool
    compute_until: int
    deadline_s: float
    pieces: list[Piece] = field(default_factory=list)
    started_s: float = 0.0
    patience_s: float = 0.0
    compute_s: float = 0.0
    num_arrived: int = 0

    def note_arrivals(self, now_s: float) -> None:
        """Put the deadline off if pieces have come since the last time, fast enough."""
        num_blocks = num_arrived = 0
        for piece in self.pieces:
            num_blocks += piece.end - piece.start
            if piece.state in (PieceState.WRITTEN, PieceState.TAKEN):
                num_arrived += piece.end - piece.start
        if num_arrived <= self.num_arrived:
            return
        self.num_arrived = num_arrived
        if (now_s - self.started_s) * num_blocks <= self.compute_s * num_arrived:
            self.deadline_s = max(self.deadline_s, now_s + self.patience_s)

    def compute_limit(self, position: int, now_s: float) -> int | None:
        """Position up to which the sequence may compute now; None: no limit.

        What lies before the first piece that may still come is computed without waiting.
        """
        if position >= self.end_tokens:
            return None
        if self.all_or_nothing:
            return position  # its pages hold what the end of the job sees, not what this would
        live = [piece for piece in self.pieces if piece.is_live]
        if not live:
            return None
        limit = self.end_tokens
        if any(piece.is_coming for piece in live):
            is_early = now_s < self.deadline_s
            first = min(piece.start for piece in live) * self.page_size
            until = max(position, self.compute_until, first)
            limit = until if is_early else max(first, self._race_until(position))
        starts = (piece.start * self.page_size for piece in live if not piece.is_coming)
        return min((limit, *(start for start in starts if start > position)))

    def _race_until(self, position: int) -> int:
        start = min(piece.start for piece in self.pieces) * self.page_size
        least = RACE_TOKENS if self.num_arrived else 2 * RACE_TOKENS
        return position + max(least, position - start)

    def passed(self, position: int) -> list[Piece]:
        """Pieces that are on their way for nothing: what they bring has been computed."""
        return [
            piece
            for piece in self.pieces
            if piece.wanted
            and piece.is_coming
            and (piece.end * self.page_size <= position or position >= self.end_tokens)
        ]

    def arrived(self) -> list[Piece]:
        """The ready pieces, to be written into their pages now; they are WRITTEN then."""
        ready = [p for p in self.pieces if p.wanted and p.state is PieceState.READY]
        for piece in ready:
            piece.state = PieceState.WRITTEN
        return ready

    def take(self, position: int) -> list[Piece]:
        """The written pieces that follow `position` without a gap, head first; now TAKEN."""
        if self.all_or_nothing and any(p.state is not PieceState.WRITTEN for p in self.pieces):
            return []
        run: list[Piece] = []
        block = position // self.page_size
        for piece in reversed(self.pieces):
            if not piece.is_live:
                continue
            if piece.start > block or piece.is_coming:
                break
            piece.state = PieceState.TAKEN
            run.append(piece)
            block = piece.end
        return run

    def position_after(self, piece: Piece) -> int:
        """The position that follows a piece."""
        return min(piece.end * self.page_size, self.end_tokens)

    def is_over(self, position: int) -> bool:
        """Nothing more can come of the job."""
        if position >= self.end_tokens:
            return True
        if self.all_or_nothing and any(piece.state is PieceState.LOST for piece in self.pieces):
            return True
        return not any(piece.is_live for piece in self.pieces)
