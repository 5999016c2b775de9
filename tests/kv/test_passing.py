"""Blocks that the host's policy does not want: the stores hear of them all the same."""

import numpy as np

from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.messages import Saved
from jaxserve.kv.policy.factory import make_policy
from tests.scheduler.fake_tiers import STORE, FakeTiers

NUM_SLOTS = 4


def tiers_with_a_gate(*, has_store: bool) -> FakeTiers:
    """A host tier that wants a block only when it is seen a second time."""
    return FakeTiers(
        NUM_SLOTS, 1, 4, has_store=has_store, lateness=0.0, policy="lru?store_threshold=2"
    )


def save(fake: FakeTiers, first: int, count: int) -> None:
    """Let blocks lose their pages, and everything arrive."""
    for block in range(first, first + count):
        fake.tiers.evicted(0, block, bytes([block]) * 32)
    for planned in fake.tiers.collect_saves(lambda group, page: None):
        fake.tiers.inbox.append(Saved(planned, True))
    fake.tiers.poll()
    fake.tick(everything=True)
    fake.tiers.poll()


def test_what_the_policy_does_not_want_passes_through_to_the_stores():
    fake = tiers_with_a_gate(has_store=True)
    for first in range(0, 12, 2):
        save(fake, first, 2)
    assert len(fake.records) == 12
    assert not list(fake.tiers.host.names()), "the policy's will was not done"
    fake.tiers.check_integrity()


def test_without_stores_it_is_dropped():
    fake = tiers_with_a_gate(has_store=False)
    save(fake, 0, 2)
    assert fake.tiers.counters.saves_dropped == 2 and not fake.tiers.host.num_used


def test_a_slot_for_what_somebody_waits_for_needs_no_admission():
    index = HostIndex(NUM_SLOTS, 1, make_policy("lru?store_threshold=2", NUM_SLOTS))
    assert index.reserve(b"a" * 32, 1) is None
    assert index.reserve(b"b" * 32, 1, is_needed=True) is not None


def test_a_block_of_which_the_host_has_a_part_is_fetched_whole_from_a_store():
    fake = FakeTiers(NUM_SLOTS, 2, 4, has_store=True, lateness=0.0)
    name = bytes([1]) * 32
    fake.records[name] = np.array([[5] * 4, [6] * 4])
    fake._known.add(name)
    fake.tiers.evicted(0, 0, name)
    for planned in fake.tiers.collect_saves(lambda group, page: None):
        fake.tiers.inbox.append(Saved(planned, True))
    fake.tiers.poll()
    assert fake.tiers.host.has(name, 0) and not fake.tiers.host.has(name, 1)
    piece = fake.tiers.start_piece([name], 0, 1, STORE)
    assert piece is not None, "it would be computed, though a store has it"
    fake.tick(everything=True)
    fake.tiers.poll()
    assert fake.tiers.host.is_complete(name)
    fake.tiers.give_up(piece)
    fake.check_idle()
