"""Every policy against a naive tier, and what each is there for."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.kv.policy import check_policy, make_policy
from jaxserve.kv.policy.factory import POLICIES

SPECS = (*POLICIES, "lru?store_threshold=2", "arc?store_threshold=3", "s3fifo?small=0.4")
KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(24)]

NAMES = st.integers(0, len(KEYS) - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), NAMES),
        st.tuples(st.just("use"), NAMES),
        st.tuples(st.just("use"), NAMES),
        st.tuples(st.just("take back"), NAMES),
        st.tuples(st.just("hold"), NAMES),
        st.tuples(st.just("let go"), NAMES),
        st.tuples(st.just("ask"), NAMES),
    ),
    max_size=150,
)


class Tier:
    """What a tier does with a policy, and which keys it holds."""

    def __init__(self, spec: str, capacity: int):
        self.policy = make_policy(spec, capacity)
        self.resident: set[bytes] = set()
        self.held: set[bytes] = set()
        self.num_stores = 0

    def may_leave(self, key: bytes) -> bool:
        assert key in self.resident, "asked about a key that is not resident"
        return key not in self.held

    def victim(self) -> bytes | None:
        victim = self.policy.victim(self.may_leave)
        assert (victim is None) == (self.resident <= self.held)
        assert victim is None or victim in self.resident - self.held
        return victim

    def use(self, key: bytes) -> bool:
        """Look a key up and store it if it was not there; whether it was."""
        if key in self.resident:
            self.policy.touch(key)
            return True
        self.policy.miss(key)
        if not self.policy.admits(key):
            return False
        if len(self.resident) == self.policy.capacity:
            victim = self.victim()
            if victim is None:
                return False
            self.remove(victim, evicted=True)
        self.policy.insert(key)
        self.resident.add(key)
        self.num_stores += 1
        return False

    def remove(self, key: bytes, *, evicted: bool) -> None:
        self.resident.remove(key)
        self.policy.remove(key, evicted=evicted)

    def step(self, what: str, key: bytes) -> None:
        if what == "use":
            self.use(key)
        elif what == "hold":
            self.held.add(key)
        elif what == "let go":
            self.held.discard(key)
        elif what == "ask":
            self.victim()
        elif key in self.resident - self.held:
            self.remove(key, evicted=False)

    def count_hits(self, names: list[int]) -> int:
        return sum(self.use(key_of(name)) for name in names)


def key_of(name: int) -> bytes:
    return hashlib.sha256(name.to_bytes(8, "little")).digest()


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 10), steps=STEPS)
def test_a_policy_keeps_the_books_of_its_tier(spec: str, capacity: int, steps):
    tier = Tier(spec, capacity)
    for what, name in steps:
        tier.step(what, KEYS[name])
        assert len(tier.resident) <= capacity
        tier.policy.check_integrity(tier.resident)


@pytest.mark.parametrize("spec", SPECS)
def test_asking_for_a_victim_twice_gives_the_same_one_until_it_may_not_leave(spec: str):
    tier = Tier(spec, 4)
    tier.count_hits([0, 1, 2, 3, 0, 1, 0, 2, 3, 0, 0, 1])
    first = tier.victim()
    assert first is not None and tier.victim() == first
    tier.held.add(first)
    assert tier.victim() not in (None, first)


@pytest.mark.parametrize("spec", POLICIES)
def test_the_search_for_a_victim_does_not_pass_over_the_same_held_keys_each_time(spec: str):
    tier, num_asked = Tier(spec, 1000), 0
    tier.count_hits(list(range(1000)))
    tier.held = {key_of(name) for name in range(500)}
    may_leave = tier.may_leave

    def counting(key: bytes) -> bool:
        nonlocal num_asked
        num_asked += 1
        return may_leave(key)

    tier.may_leave = counting
    tier.count_hits(list(range(1000, 2000)))
    assert num_asked < 20 * 1000, "looking for 1,000 victims among 500 held keys"


def test_lru_evicts_what_was_used_longest_ago():
    tier = Tier("lru", 3)
    tier.count_hits([1, 2, 3, 1, 4])
    assert tier.resident == {key_of(1), key_of(3), key_of(4)}


def test_a_gate_stores_a_block_at_its_nth_offer():
    tier = Tier("lru?store_threshold=3", 8)
    for num_stores in (0, 0, 1, 1):
        tier.use(key_of(7))
        assert tier.num_stores == num_stores


@pytest.mark.parametrize("spec", ["arc", "s3fifo", "tinylfu", "lru?store_threshold=2"])
def test_what_resists_scans_keeps_a_popular_set_that_lru_loses(spec: str):
    popular, scan = list(range(40)), 10_000
    names = popular * 3
    for round_index in range(30):
        names += popular + list(range(scan + 100 * round_index, scan + 100 * (round_index + 1)))
    hits = {name: Tier(name, 100).count_hits(names) for name in (spec, "lru")}
    assert hits["lru"] <= 40 * 2 + 40 and hits[spec] >= 0.85 * 40 * 30


def test_arc_moves_its_border_towards_recency_and_back():
    tier = Tier("arc", 20)
    often = [name for name in range(15) for _ in range(2)]
    tier.count_hits(often)
    recent = [name for start in range(100, 400, 5) for name in (*range(start, start + 12),)]
    late_hits = tier.count_hits(recent)
    assert late_hits > 0.4 * len(recent), "ARC did not adapt to a workload of recency"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("lur", "did you mean 'lru'"),
        ("lru?store_treshold=2", "did you mean 'store_threshold'"),
        ("lru?store_threshold=0", "from 1 on"),
        ("lru?store_threshold=two", "from 1 on"),
        ("s3fifo?small=1.5", "between 0 and 1"),
        ("s3fifo?small=nan", "between 0 and 1"),
        ("s3fifo?small", "name=value"),
        ("s3fifo?small=0.2&small=0.1", "twice"),
        ("", "expected one of auto"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_is_valid(spec: str, told: str):
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        check_policy(spec)


def test_a_tier_without_room_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        make_policy("lru", 0)
