"""The index against a naive model, and the few promises that the model does not make."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from jaxserve.kv.index import GroupIndex, KVIndex, LookupState
from jaxserve.types import KVGroup, LayerCache

HASHES = [bytes([i]) * 32 for i in range(12)]


class IndexMachine(RuleBasedStateMachine):
    """Random use of one group, beside a model made of plain lists and dicts."""

    references = Bundle("references")

    @initialize(num_pages=st.integers(1, 6))
    def create(self, num_pages: int):
        self.index = GroupIndex(num_pages)
        self.num_pages = num_pages
        self.held: dict[int, int] = {}
        self.names: dict[int, bytes] = {}
        self.pins: dict[int, int] = {}
        self.lru: list[int] = []  # released longest ago first
        self.generations = [0] * num_pages

    def is_idle(self, page: int) -> bool:
        return not self.held.get(page) and not self.pins.get(page)

    def place_of(self, name: bytes) -> int | None:
        return next((page for page, other in self.names.items() if other == name), None)

    def retire(self, page: int) -> None:
        if self.is_idle(page) and page in self.names:
            self.lru.append(page)

    @property
    def evictable(self) -> list[int]:
        return [page for page in self.lru if self.is_idle(page)]

    @property
    def num_blank(self) -> int:
        return sum(self.is_idle(p) and p not in self.names for p in range(self.num_pages))

    @rule(target=references)
    def allocate(self):
        evictable = self.evictable
        if not self.num_blank and not evictable:
            assert self.index.num_available == 0
            return multiple()
        page = self.index.allocate()
        if self.num_blank:
            assert page not in self.names, "a cached block was evicted though a page was free"
            assert self.is_idle(page)
        else:
            assert page == evictable[0], "not the page that was released longest ago"
            del self.names[page]
            self.lru.remove(page)
        self.held[page] = 1
        self.generations[page] += 1
        return page

    @rule(target=references, name=st.sampled_from(HASHES))
    def acquire(self, name: bytes):
        page = self.place_of(name)
        found = self.index.lookup(name)
        if page is None:
            assert found.state is LookupState.MISS
            return multiple()
        assert (found.state, found.page) == (LookupState.HIT, page)
        assert found.generation == self.generations[page]
        assert self.index.acquire(name) == page
        self.held[page] = self.held.get(page, 0) + 1
        if page in self.lru:
            self.lru.remove(page)
        return page

    @rule(page=consumes(references))
    def release(self, page: int):
        self.index.release(page)
        self.held[page] -= 1
        self.retire(page)

    @rule(page=references, name=st.sampled_from(HASHES), is_late=st.booleans())
    def publish(self, page: int, name: bytes, is_late: bool):
        if not is_late and page in self.names and self.place_of(name) is None:
            return  # a page in use keeps its content, so nobody publishes it twice
        generation = self.generations[page] - is_late
        is_first = not is_late and self.place_of(name) in (None, page)
        assert self.index.publish(page, name, generation) == is_first
        if is_first:
            self.names[page] = name

    @rule(name=st.sampled_from(HASHES))
    def pin(self, name: bytes):
        page = self.place_of(name)
        assert self.index.pin(name) == (page is not None)
        if page is not None:
            self.pins[page] = self.pins.get(page, 0) + 1
            if page in self.lru:
                self.lru.remove(page)

    @rule(name=st.sampled_from(HASHES))
    def unpin(self, name: bytes):
        page = self.place_of(name)
        is_pinned = page is not None and self.pins.get(page, 0) > 0
        assert self.index.unpin(name) == is_pinned
        if page is not None and is_pinned:
            self.pins[page] -= 1
            self.retire(page)

    @rule(name=st.sampled_from(HASHES))
    def forget(self, name: bytes):
        page = self.place_of(name)
        assert self.index.forget(name) == (page is not None)
        if page is not None:
            del self.names[page]
            self.pins.pop(page, None)
            if page in self.lru:
                self.lru.remove(page)

    @invariant()
    @precondition(lambda self: hasattr(self, "index"))
    def agrees_with_the_model(self):
        self.index.check_integrity(self.held)
        assert self.index.num_free == self.num_blank
        assert self.index.num_cached == len(self.evictable)
        assert self.index.num_available == self.num_blank + len(self.evictable)
        for name in HASHES:
            found = self.index.lookup(name)
            assert (found.page if found.state is LookupState.HIT else None) == self.place_of(name)


TestIndexAgainstModel = IndexMachine.TestCase
TestIndexAgainstModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


def published(index: GroupIndex, names) -> list[int]:
    pages = [index.allocate() for _ in names]
    for page, name in zip(pages, names, strict=True):
        assert index.publish(page, name)
    return pages


def test_check_integrity_names_a_page_that_leaks():
    index = GroupIndex(3)
    page = index.allocate()
    with pytest.raises(AssertionError, match=f"page {page} has 1 references, expected 0"):
        index.check_integrity({})


def test_check_integrity_finds_a_page_in_two_states():
    index = GroupIndex(3)
    page = index.allocate()
    index._free.append(page)
    with pytest.raises(AssertionError, match=f"page {page}: 1 references"):
        index.check_integrity()


def test_pages_released_from_the_tail_are_evicted_before_the_head():
    index = GroupIndex(4)
    for page in reversed(published(index, HASHES[:4])):
        index.release(page)
    for num_left in (3, 2, 1, 0):
        index.allocate()
        assert index.count_leading(HASHES[:4]) == num_left


def test_releasing_more_often_than_taking_is_refused():
    index = GroupIndex(2)
    page = index.allocate()
    index.release(page)
    with pytest.raises(AssertionError, match="released more often"):
        index.release(page)


def make_kv_index(windows: tuple[int | None, ...], num_pages: int = 32) -> KVIndex:
    groups = [KVGroup(i, (i,), LayerCache(1, 8, w)) for i, w in enumerate(windows)]
    return KVIndex(groups, [num_pages] * len(windows), page_size=4)


@pytest.mark.parametrize(
    ("window", "resident", "expected"),
    [
        (None, {0, 1, 2, 4}, 3),
        (1, set(), 6),  # a window of one token sees nothing before it
        (5, {0, 1, 2, 4}, 5),  # the query at 20 sees [16, 20]: block 4 alone
        (6, {0, 1, 2, 4}, 3),  # the query at 20 sees [15, 20]: block 3 is missing
        (6, {1, 2}, 3),
        (9, {0, 3, 5}, 1),
        (100, {1, 2, 3}, 0),
    ],
)
def test_a_prefix_can_be_skipped_if_all_that_the_next_query_sees_is_resident(
    window: int | None, resident: set[int], expected: int
):
    index = make_kv_index((window,))
    published(index.groups[0], [HASHES[block] for block in sorted(resident)])
    assert index.longest_prefix(HASHES[:6]) == expected


@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=1, max_size=3),
    masks=st.lists(st.integers(0, 2**8 - 1), min_size=3, max_size=3),
    num_tokens=st.integers(29, 32),
)
def test_the_skipped_prefix_is_the_longest_that_satisfies_all_groups(windows, masks, num_tokens):
    """The last block may be partial, as that of a preempted sequence is."""
    index = make_kv_index(tuple(windows))
    resident = [{b for b in range(8) if mask >> b & 1} for mask in masks[: len(windows)]]
    for group, blocks in zip(index.groups, resident, strict=True):
        published(group, [HASHES[block] for block in sorted(blocks)])

    def can_skip(num_blocks: int) -> bool:
        end = min(4 * num_blocks, num_tokens)
        return all(
            block in blocks
            for blocks, window in zip(resident, windows, strict=True)
            for block in range(0 if window is None else max(0, end - window + 1) // 4, num_blocks)
        )

    longest = index.longest_prefix(HASHES[:8], max_tokens=num_tokens)
    assert longest == max(n for n in range(9) if can_skip(n))
