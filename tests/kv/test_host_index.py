"""Slots of the host tier: random histories against a simple model, and the rules one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.policy.factory import make_policy

NUM_SLOTS, NUM_GROUPS = 4, 2
ALL = 3
NAMES = st.sampled_from([bytes([i]) * 32 for i in range(8)])
BITS = st.sampled_from([1, 2, ALL])


def new_index(policy: str = "lru") -> HostIndex:
    return HostIndex(NUM_SLOTS, NUM_GROUPS, make_policy(policy, NUM_SLOTS))


def put(index: HostIndex, name: bytes, groups: int = ALL) -> int:
    slot = index.reserve(name, groups)
    assert slot is not None
    assert index.commit(slot, index.generation(slot), groups)
    return slot


A, B, C, D, E = (bytes([i]) * 32 for i in range(5))


def test_a_block_is_found_group_by_group_once_its_bytes_are_there():
    index = new_index()
    slot = index.reserve(A, 1)
    assert slot is not None
    assert not index.has(A, 0)
    assert index.commit(slot, index.generation(slot), 1)
    assert index.has(A, 0) and not index.has(A, 1) and not index.is_complete(A)
    assert index.reserve(A, 2) == slot, "the second group goes into the same slot"
    assert index.reserve(A, 2) is None, "it is on its way"
    assert index.commit(slot, index.generation(slot), 2)
    assert index.is_complete(A)
    index.check_integrity()


def test_the_least_recently_used_block_leaves_unless_it_is_held_claimed_pinned_or_written():
    index = new_index()
    for name in (A, B, C):
        put(index, name)
    writing = index.reserve(D, ALL)
    index.acquire(A)
    index.claim(B)
    index.pin(C, True)
    assert writing is not None
    assert index.reserve(E, ALL) is None, "nothing may leave"
    index.unclaim(B)
    assert index.reserve(E, ALL) is not None
    assert not index.has(B, 0) and index.has(A, 0) and index.has(C, 0)
    index.check_integrity()


def test_a_block_that_is_forgotten_while_it_is_read_or_written_is_not_found_and_then_freed():
    index = new_index()
    slot = put(index, A)
    index.acquire(A)
    assert index.forget(A)
    assert not index.has(A, 0) and index.num_used == 1
    index.release(slot)
    assert index.num_used == 0
    slot = index.reserve(B, ALL)
    assert slot is not None and index.forget(B)
    assert index.reserve(B, ALL) is None, "its slot is not free yet"
    assert not index.commit(slot, index.generation(slot), ALL)
    assert index.num_used == 0
    index.check_integrity()


def test_a_claimed_block_is_admitted_against_the_policy():
    index = new_index("lru?store_threshold=2")
    assert index.reserve(A, ALL) is None
    assert index.reserve(A, ALL) is not None, "the second offer"
    index.claim(B)
    assert index.reserve(B, ALL) is not None


def test_aborting_the_only_write_frees_the_slot_and_a_later_one_leaves_the_rest():
    index = new_index()
    slot = index.reserve(A, 1)
    assert slot is not None
    index.abort(slot, index.generation(slot), 1)
    assert index.num_used == 0
    slot = put(index, A, 1)
    assert index.reserve(A, 2) == slot
    index.abort(slot, index.generation(slot), 2)
    assert index.has(A, 0)
    index.check_integrity()


class Histories(RuleBasedStateMachine):
    """What is resident is what was committed and neither evicted nor forgotten since."""

    def __init__(self) -> None:
        super().__init__()
        self.index = new_index()
        self.writes: list[tuple[int, int, int, bytes]] = []
        self.held: list[tuple[bytes, int]] = []
        self.claims: list[bytes] = []
        self.content: dict[int, bytes] = {}  # by slot: whose bytes are in it

    @rule(name=NAMES, groups=BITS)
    def reserve(self, name: bytes, groups: int):
        slot = self.index.reserve(name, groups)
        if slot is not None:
            assert all(slot != held for _, held in self.held) or self.content.get(slot) == name
            assert all(w[0] != slot or w[3] == name for w in self.writes), "a slot of two writers"
            self.writes.append((slot, self.index.generation(slot), groups, name))

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), is_ok=st.booleans())
    def finish(self, data: st.DataObject, is_ok: bool):
        write = data.draw(st.sampled_from(self.writes))
        self.writes.remove(write)
        slot, generation, groups, name = write
        if is_ok:
            self.content[slot] = name
            self.index.commit(slot, generation, groups)
        else:
            self.index.abort(slot, generation, groups)

    @rule(name=NAMES)
    def acquire(self, name: bytes):
        if self.index.has(name, 0) or self.index.has(name, 1):
            slot = self.index.acquire(name)
            assert self.content[slot] == name, "the slot holds another block"
            self.held.append((name, slot))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        held = data.draw(st.sampled_from(self.held))
        self.held.remove(held)
        self.index.release(held[1])

    @rule(name=NAMES)
    def forget(self, name: bytes):
        self.index.forget(name)
        assert not self.index.has(name, 0) and not self.index.has(name, 1)

    @rule(name=NAMES)
    def claim(self, name: bytes):
        self.claims.append(name)
        self.index.claim(name)

    @precondition(lambda self: self.claims)
    @rule()
    def unclaim(self):
        self.index.unclaim(self.claims.pop())

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: bytes, pinned: bool):
        self.index.pin(name, pinned)

    @invariant()
    def holds(self):
        self.index.check_integrity()
        assert all(self.content[slot] == name for name, slot in self.held)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_policy_has_the_size_of_the_tier():
    with pytest.raises(AssertionError):
        HostIndex(4, 1, make_policy("lru", 5))
