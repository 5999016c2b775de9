"""Which page holds which block: reference counts, reuse, eviction.

Per KV group, each page is in exactly one of three states:

    free      no content worth keeping
    in use    some sequence holds it (references > 0); it may also be named by a block hash
    cached    nobody holds it, but it is named: found by lookups until it is evicted

Free pages are handed out first, then the cached page that was released longest ago. A sequence
releases its pages last page first, so a suffix is evicted before the head that it needs.
Every operation is O(1) in the number of pages. The index has no arrays and knows no sequences.
A `Listener` hears of each block that gets a name and of each that loses its page to another: lower
tiers live from that.
"""

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from jaxserve.kv.blocks import BlockHash
from jaxserve.types import KVGroup


class Tier(enum.Enum):
    """Where a block can be resident."""

    DEVICE = "device"
    HOST = "host"
    STORE = "store"


class LookupState(enum.Enum):
    """What a lookup can say; PENDING and RETRY belong to tiers that answer late."""

    MISS = "miss"
    HIT = "hit"
    PENDING = "pending"
    RETRY = "retry"


class Lookup(NamedTuple):
    """Where a block is: a place in a tier, and how often that place had been reused."""

    state: LookupState
    tier: Tier | None = None
    page: int = -1
    generation: int = -1


_MISS = Lookup(LookupState.MISS)


class Listener(Protocol):
    """Hears what becomes of named blocks; must not change the index."""

    def published(self, group: int, page: int, block_hash: BlockHash) -> None:
        """The page has got a name; what it holds is written by steps already planned."""
        ...

    def evicted(self, group: int, page: int, block_hash: BlockHash) -> None:
        """The page is about to be reused; it holds the block until the next step."""
        ...


class GroupIndex:
    """Pages of one KV group on the device.

    Args:
        num_pages: pages of the group's pool.
        group: number of the group, for the listener.
    """

    def __init__(self, num_pages: int, group: int = 0):
        self.num_pages = num_pages
        self.group = group
        self.num_evicted = 0
        """Named blocks that lost their page to another."""
        self.listener: Listener | None = None
        self._references = [0] * num_pages
        self._pins = [0] * num_pages
        self._generations = [0] * num_pages
        self._hashes: list[BlockHash | None] = [None] * num_pages
        self._pages: dict[BlockHash, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # first: released longest ago

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Named pages that nobody holds, pinned ones left out."""
        return len(self._evictable)

    @property
    def num_blocks(self) -> int:
        """Blocks that a lookup can find."""
        return len(self._pages)

    def names(self) -> Iterator[BlockHash]:
        """The names of all resident blocks."""
        return iter(self._pages)

    def has(self, block_hash: BlockHash) -> bool:
        """Whether a lookup would find the block."""
        return block_hash in self._pages

    def lookup(self, block_hash: BlockHash) -> Lookup:
        """Where the block is. Takes no reference and does not count as a use."""
        page = self._pages.get(block_hash)
        if page is None:
            return _MISS
        return Lookup(LookupState.HIT, Tier.DEVICE, page, self._generations[page])

    def count_leading(self, hashes: Sequence[BlockHash]) -> int:
        """How many blocks from the first one on are resident without a gap."""
        pages = self._pages
        for index, block_hash in enumerate(hashes):
            if block_hash not in pages:
                return index
        return len(hashes)

    def acquire(self, block_hash: BlockHash) -> int:
        """Take a reference to a resident block; return its page."""
        page = self._pages[block_hash]
        if self._references[page] == 0 and self._pins[page] == 0:
            del self._evictable[page]
        self._references[page] += 1
        return page

    def allocate(self) -> int:
        """Take a page for new content, with one reference; evicts if no page is free."""
        if self._free:
            page = self._free.pop()
        else:
            assert self._evictable, "no page is available; the caller checks num_available"
            page, _ = self._evictable.popitem(last=False)
            block_hash = self._unname(page)
            self.num_evicted += 1
            if self.listener is not None:
                self.listener.evicted(self.group, page, block_hash)
        self._references[page] = 1
        self._generations[page] += 1
        return page

    def release(self, page: int) -> None:
        """Give a reference back; the last one makes the page cached if named, free if not."""
        assert self._references[page] > 0, f"page {page} is released more often than taken"
        self._references[page] -= 1
        if self._references[page] == 0 and self._pins[page] == 0:
            self._retire(page)

    def generation(self, page: int) -> int:
        """How often the page has been handed out; a change means that its content is another."""
        return self._generations[page]

    def publish(self, page: int, block_hash: BlockHash, generation: int | None = None) -> bool:
        """Name the content of a page in use, so that lookups find it.

        Returns:
            False, and nothing changes, if the block is already resident elsewhere, or if the page
            has been reused since `generation`.
        """
        if generation is not None and generation != self._generations[page]:
            return False
        assert self._references[page] > 0, f"page {page} is published, but nobody holds it"
        if block_hash in self._pages:
            return self._pages[block_hash] == page
        assert self._hashes[page] is None, f"page {page} already holds another block"
        self._pages[block_hash] = page
        self._hashes[page] = block_hash
        if self.listener is not None:
            self.listener.published(self.group, page, block_hash)
        return True

    def forget(self, block_hash: BlockHash) -> bool:
        """Make a block unfindable, for instance because its content is in doubt."""
        page = self._pages.get(block_hash)
        if page is None:
            return False
        self._unname(page)
        self._pins[page] = 0
        if self._references[page] == 0:
            self._evictable.pop(page, None)
            self._free.append(page)
        return True

    def pin(self, block_hash: BlockHash) -> bool:
        """Keep a resident block from eviction until `unpin`; pins count."""
        page = self._pages.get(block_hash)
        if page is None:
            return False
        self._pins[page] += 1
        self._evictable.pop(page, None)
        return True

    def unpin(self, block_hash: BlockHash) -> bool:
        """Undo one `pin`. False if the block is not pinned."""
        page = self._pages.get(block_hash)
        if page is None or self._pins[page] == 0:
            return False
        self._pins[page] -= 1
        if self._pins[page] == 0 and self._references[page] == 0:
            self._retire(page)
        return True

    def hash_of(self, page: int) -> BlockHash | None:
        """The name of a page's content, if it has one."""
        return self._hashes[page]

    def _retire(self, page: int) -> None:
        if self._hashes[page] is None:
            self._free.append(page)
        else:
            self._evictable[page] = None

    def _unname(self, page: int) -> BlockHash:
        block_hash = self._hashes[page]
        assert block_hash is not None
        del self._pages[block_hash]
        self._hashes[page] = None
        return block_hash

    def check_integrity(self, references: Mapping[int, int] | None = None) -> None:
        """Recount everything; AssertionError says what is wrong.

        Args:
            references: if given, how many references each page should have (absent: none).
        """
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & evictable, f"pages both free and cached: {sorted(free & evictable)}"
        for page in range(self.num_pages):
            held, pinned = self._references[page], self._pins[page]
            named = self._hashes[page]
            assert held >= 0, f"page {page} has {held} references"
            assert pinned >= 0, f"page {page} has {pinned} pins"
            assert not pinned or named is not None, f"page {page} is pinned but has no name"
            in_use = held > 0 or pinned > 0
            assert (page in free) == (not in_use and named is None), (
                f"page {page}: {held} references, named {named is not None}, free {page in free}"
            )
            assert (page in evictable) == (not in_use and named is not None), (
                f"page {page}: {held} references, {pinned} pins, named {named is not None}, "
                f"evictable {page in evictable}"
            )
            assert named is None or self._pages.get(named) == page, (
                f"page {page} has a name that leads to page {self._pages.get(named)}"
            )
            if references is not None:
                expected = references.get(page, 0)
                assert held == expected, f"page {page} has {held} references, expected {expected}"
        num_named = sum(block_hash is not None for block_hash in self._hashes)
        assert num_named == len(self._pages), f"{num_named} named pages, {len(self._pages)} names"


class KVIndex:
    """The groups of one model together.

    Args:
        kv_groups: the model's groups.
        num_pages: pages per group.
        page_size: tokens per page, the same in all groups.
    """

    def __init__(self, kv_groups: Sequence[KVGroup], num_pages: Sequence[int], page_size: int):
        assert len(kv_groups) == len(num_pages) > 0
        self.page_size = page_size
        self.groups = tuple(GroupIndex(count, group) for group, count in enumerate(num_pages))
        self.windows = tuple(group.cache.window for group in kv_groups)
        self.has_windows = any(window is not None for window in self.windows)

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of all groups' blocks from now on."""
        for group in self.groups:
            group.listener = listener

    @property
    def num_available(self) -> int:
        """Pages that every group could hand out now."""
        return min(group.num_available for group in self.groups)

    def first_needed(self, window: int | None, next_position: int) -> int:
        """Index of the first page that a query at `next_position` or later can see."""
        if window is None:
            return 0
        return max(0, next_position - window + 1) // self.page_size

    def longest_prefix(
        self,
        hashes: Sequence[BlockHash],
        elsewhere: Callable[[BlockHash, int], bool] | None = None,
        max_tokens: int | None = None,
    ) -> int:
        """Most leading blocks that can be skipped: what the next query sees is all resident.

        A group that sees everything must hold all of them, a window group only those that reach
        into the window of the first position after them.

        Args:
            elsewhere: says whether a block of a group can be had from another tier; without it
                only the device counts.
            max_tokens: where the next query is at the latest, if the last block is partial.
        """
        num_blocks = len(hashes)
        if max_tokens is None:
            max_tokens = num_blocks * self.page_size
        windowed: list[tuple[GroupIndex, int]] = []
        for group, window in zip(self.groups, self.windows, strict=True):
            if window is not None:
                windowed.append((group, window))
            elif elsewhere is None:
                num_blocks = group.count_leading(hashes[:num_blocks])
            else:
                num_blocks = _count_leading(group, hashes[:num_blocks], elsewhere)
        before = -1
        while windowed and before != num_blocks:
            before = num_blocks
            for group, window in windowed:
                num_blocks = self._shrink_to_window(
                    group, window, hashes, num_blocks, elsewhere, max_tokens
                )
        return num_blocks

    def _shrink_to_window(
        self,
        group: GroupIndex,
        window: int,
        hashes: Sequence[BlockHash],
        num_blocks: int,
        elsewhere: Callable[[BlockHash, int], bool] | None,
        max_tokens: int,
    ) -> int:
        """The largest count, at most `num_blocks`, whose window is resident in the group."""
        block = num_blocks
        while block > self.first_needed(window, min(num_blocks * self.page_size, max_tokens)):
            block -= 1
            block_hash = hashes[block]
            if group.lookup(block_hash).state is LookupState.HIT:
                continue
            if elsewhere is None or not elsewhere(block_hash, group.group):
                num_blocks = block
        return num_blocks

    def check_integrity(self, references: Sequence[Mapping[int, int]] | None = None) -> None:
        """`GroupIndex.check_integrity` of each group; the message names the group."""
        for group_index, group in enumerate(self.groups):
            try:
                group.check_integrity(references[group_index] if references else None)
            except AssertionError as error:
                raise AssertionError(f"KV group {group_index}: {error}") from error


def _count_leading(
    group: GroupIndex, hashes: Sequence[BlockHash], elsewhere: Callable[[BlockHash, int], bool]
) -> int:
    """How many blocks from the first one on are on the device or elsewhere, without a gap."""
    for index, block_hash in enumerate(hashes):
        if group.lookup(block_hash).state is LookupState.MISS:
            if not elsewhere(block_hash, group.group):
                return index
    return len(hashes)
