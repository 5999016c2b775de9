"""Page tables of sequences: how they grow, slide, share and give back pages.

Joins the index (pages, no sequences) and the sequences (no policy). Knows nothing of steps.
Invariant: in each group a sequence holds exactly one reference to each page from `held_from` on.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.index import KVIndex, LookupState
from jaxserve.scheduler.sequence import NEVER, Parked, Sequence

NO_PAGE = -1
"""A page that is yet to be allocated; only between `hold_prefix` and `fill_prefix`."""


class PageEntry(NamedTuple):
    """One new entry of a group's page table."""

    slot: int
    page_index: int
    page: int


class Pager:
    """Moves pages between the index and sequences.

    Args:
        index: the pages of all groups.
        enable_prefix_caching: name blocks and look for them.
    """

    def __init__(self, index: KVIndex, enable_prefix_caching: bool):
        self.index = index
        self.page_size = index.page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.label: Callable[[Seq[BlockHash], bytes], None] | None = None
        """Told whose blocks are about to be named."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of KV that one sequence alone can have in the pools."""
        return min(
            NEVER
            if window is not None and group.num_pages >= self._max_span(window, 1)
            else group.num_pages * self.page_size
            for group, window in zip(self.index.groups, self.index.windows, strict=True)
        )

    def _max_span(self, window: int, num_queries: int) -> int:
        """Most pages that hold what `num_queries` neighbouring positions see and write."""
        return (window + num_queries + self.page_size - 3) // self.page_size + 1

    def missing_pages(self, seq: Sequence, num_queries: int) -> list[int]:
        """Pages per group until all known tokens and the next one are computed.

        Args:
            num_queries: most positions that one step computes.
        """
        num_entries = len(seq.tokens) // self.page_size + 1
        missing = []
        for pages, held_from, window in zip(
            seq.pages, seq.held_from, self.index.windows, strict=True
        ):
            wanted = num_entries - held_from
            if window is not None:
                wanted = min(wanted, self._max_span(window, num_queries))
            missing.append(max(0, wanted - (len(pages) - held_from)))
        return missing

    def hold_prefix(
        self, seq: Sequence, names: Seq[BlockHash], num_blocks: int, end_tokens: int
    ) -> list[list[int]]:
        """Hold the pages of the first blocks that are on the device, as far as they are needed.

        Args:
            names: of the blocks up to `end_tokens`.
            num_blocks: so many of them are on the device in every group, under their hashes.
            end_tokens: the position from which the sequence will go on.

        Returns:
            Per group the blocks that are needed and not there; `fill_prefix` must follow, or
            `release`.
        """
        missing: list[list[int]] = []
        for group_index, (group, window) in enumerate(
            zip(self.index.groups, self.index.windows, strict=True)
        ):
            first = self.index.first_needed(window, end_tokens)
            pages, lacking = [0] * min(first, len(names)), []
            for block in range(first, len(names)):
                if group.lookup(names[block]).state is LookupState.HIT:
                    pages.append(group.acquire(names[block]))
                else:
                    pages.append(NO_PAGE)
                    lacking.append(block)
            seq.pages[group_index] = pages
            seq.held_from[group_index] = first
            missing.append(lacking)
        seq.num_published = num_blocks
        seq.publish_at = (num_blocks + 1) * self.page_size if self.enable_prefix_caching else NEVER
        return missing

    def fill_prefix(self, seq: Sequence, missing: list[list[int]]) -> tuple[dict[int, int], ...]:
        """Allocate pages for what `hold_prefix` found missing; by group, the page of each block."""
        filled = []
        for group, pages, lacking in zip(self.index.groups, seq.pages, missing, strict=True):
            for block in lacking:
                pages[block] = group.allocate()
            filled.append({block: pages[block] for block in lacking})
        return tuple(filled)

    def grow(self, seq: Sequence, num_tokens: int, new_entries: list[list[PageEntry]]) -> int:
        """Add pages until the table covers `num_tokens` tokens or pages run out.

        Args:
            new_entries: per group, receives what was added.

        Returns:
            How many of the `num_tokens` tokens are covered.
        """
        before = seq.num_page_entries
        num_new = min(-(-num_tokens // self.page_size) - before, self.index.num_available)
        for index in range(before, before + num_new):
            for group, pages, entries in zip(
                self.index.groups, seq.pages, new_entries, strict=True
            ):
                page = group.allocate()
                pages.append(page)
                entries.append(PageEntry(seq.slot, index, page))
        return min(num_tokens, seq.num_page_entries * self.page_size)

    def slide(self, seq: Sequence, next_position: int) -> None:
        """Give back the pages that no query at `next_position` or later can see."""
        for group_index, window in enumerate(self.index.windows):
            if window is None:
                continue
            first = self.index.first_needed(window, next_position)
            group, pages = self.index.groups[group_index], seq.pages[group_index]
            for index in range(seq.held_from[group_index], first):
                group.release(pages[index])
            seq.held_from[group_index] = max(first, seq.held_from[group_index])

    def attention_at(self, seq: Sequence) -> int:
        """The next position at which the table must grow or can slide."""
        position = seq.num_page_entries * self.page_size
        for held_from, window in zip(seq.held_from, self.index.windows, strict=True):
            if window is not None:
                position = min(position, (held_from + 1) * self.page_size + window - 1)
        return position

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Let lookups find the full blocks in the first `num_tokens` tokens.

        These tokens must be known, and the steps that compute them planned.
        """
        if not self.enable_prefix_caching or seq.request.no_store or seq.parked is not None:
            return
        num_blocks = seq.hash_blocks(num_tokens, self.page_size)
        if self.label is not None and num_blocks > seq.num_published:
            self.label(seq.hashes[seq.num_published : num_blocks], seq.tenant)
        for block in range(seq.num_published, num_blocks):
            for group, pages, held_from in zip(
                self.index.groups, seq.pages, seq.held_from, strict=True
            ):
                if block >= held_from:
                    group.publish(pages[block], seq.hashes[block])
        if num_blocks > seq.num_published:
            seq.num_published = num_blocks
            seq.publish_at = (num_blocks + 1) * self.page_size

    def name_privately(self, seq: Sequence, parked: Parked) -> None:
        """Name the blocks that no hash names, so that they outlive the sequence's pages."""
        first = len(parked.names) - len(parked.private)
        for group, pages, held_from in zip(
            self.index.groups, seq.pages, seq.held_from, strict=True
        ):
            for block in range(max(first, held_from), len(parked.names)):
                if group.hash_of(pages[block]) is None:
                    group.publish(pages[block], parked.names[block])

    def forget_private(self, parked: Parked) -> None:
        """Undo `name_privately`; pages that the sequence holds again stay with it, unnamed."""
        for group in self.index.groups:
            for name in parked.private:
                group.forget(name)

    def release(self, seq: Sequence) -> None:
        """Give all pages back, last page first, so that heads outlive their suffixes."""
        for group, pages, held_from in zip(
            self.index.groups, seq.pages, seq.held_from, strict=True
        ):
            for index in range(len(pages) - 1, held_from - 1, -1):
                if pages[index] != NO_PAGE:
                    group.release(pages[index])
        seq.forget_pages()

    def check_integrity(self, running: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        """Recount the pages that sequences hold; AssertionError says what is wrong."""
        references = [Counter[int]() for _ in self.index.groups]
        for seq in running:
            name = seq.request.request_id
            lengths = {len(pages) for pages in seq.pages}
            assert len(lengths) == 1, f"{name} has page tables of lengths {lengths}"
            for group_index, (pages, held_from) in enumerate(
                zip(seq.pages, seq.held_from, strict=True)
            ):
                references[group_index].update(pages[held_from:])
                group = self.index.groups[group_index]
                for block in range(held_from, seq.num_published):
                    found = group.hash_of(pages[block])
                    assert found in (None, seq.hashes[block]), (
                        f"{name} holds page {pages[block]} of group {group_index} as block "
                        f"{block}, but the index knows it as another block"
                    )
        for seq in others:
            name = seq.request.request_id
            assert not any(seq.pages), f"{name} does not run, but holds pages"
        self.index.check_integrity(references)
