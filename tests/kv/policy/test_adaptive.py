"""The default policy learns: it comes close to whichever fixed policy suits a workload."""

import math
import random

import pytest

from bench.kv_workloads import WORKLOADS
from bench.policy_traces import retries, upheaval
from jaxserve.kv.policy import make_policy
from jaxserve.kv.policy.adaptive import Adaptive
from jaxserve.kv.policy.shadows import BALANCES, Balance, Mixture, Shadows
from jaxserve.kv.policy.use_classes import (
    NUM_CLASSES,
    PastUses,
    UseClasses,
    UseMemory,
    class_of,
    typical_uses,
)
from jaxserve.kv.simulate import TierSpec, replay
from jaxserve.kv.traces import make_trace

KEYS = [random.Random(index).randbytes(16) for index in range(5000)]


def hit_ratio(workload: str, policy: str, share: float, num_requests: int) -> float:
    trace = make_trace(WORKLOADS[workload](num_requests=num_requests))
    spec = TierSpec("tier", policy, int(trace.num_unique * share))
    return replay(trace, [spec]).hit_ratio


@pytest.mark.parametrize(
    ("workload", "share", "rival", "margin"),
    [
        ("chat", 0.2, "lru", -0.01),
        ("shared_prompts", 0.01, "tinylfu", -0.005),
        ("scans", 0.05, "lru?store_threshold=2", -0.005),
        ("documents", 0.05, "arc", 0.01),
        ("drift", 0.05, "s3fifo", 0.02),
        ("loop", 0.2, "lru", 0.1),
    ],
)
def test_it_keeps_up_with_the_policy_that_suits_a_workload(
    workload: str, share: float, rival: str, margin: float
):
    learned = hit_ratio(workload, "auto", share, 4000)
    assert learned >= hit_ratio(workload, rival, share, 4000) + margin


def test_without_being_told_of_requests_it_keeps_the_balance_that_it_starts_with():
    policy = make_policy("auto", 100)
    assert isinstance(policy, Adaptive)
    for key in KEYS:
        if policy.admits(key):
            victim = policy.victim(lambda key: True)
            if len(policy._resident) == 100:
                assert victim is not None
                policy.remove(victim, evicted=True)
            policy.insert(key)
    assert policy._shadows.mixture.shares == ((BALANCES[0], 1.0),)
    policy.check_integrity(set(KEYS[-100:]))


def leader(policy: Adaptive) -> Balance:
    return max(policy._shadows.mixture.shares, key=lambda of: of[1])[0]


def test_shadows_change_the_leader_when_the_workload_changes():
    policy = Adaptive(64)
    leaders = set()
    popular = KEYS[:50]
    for number in range(3000):  # popular keys among scans, then keys that are used twice in a row
        policy.observe([popular[number % 50]])
        policy.observe(KEYS[100 + 7 * number % 4000 :][:3])
        leaders.add(leader(policy))
    for number in range(20_000):
        policy.observe([KEYS[(number // 2 * 31 + number % 2 * 17) % 5000]])
        policy.observe([KEYS[number // 60 * 40 % 5000 + number % 60 % 40]])
    assert len(leaders | {leader(policy)}) >= 2
    policy.check_integrity(set())


def test_where_bursts_pass_by_it_lets_in_only_what_comes_again():
    """The room that one long request takes for a moment is what a gate saves."""
    learned = hit_ratio("tides", "auto", 0.01, 5000)
    assert learned >= hit_ratio("tides", "lru?store_threshold=2", 0.01, 5000) - 0.005


def test_shadows_let_time_pass_within_a_request_as_the_tier_does():
    """Else a request's own tail is ageless there and takes the room of what is used often."""
    balance = Balance(8.0)
    shadows = Shadows(8)
    for _ in range(3):
        shadows.observe(KEYS[:4])
    shadows.observe(KEYS[100:140])
    (of_balance,) = (shadow for shadow in shadows._shadows if shadow.balance == balance)
    assert all(key in of_balance._keys for key in KEYS[:4])


def test_a_mixture_goes_between_its_balances():
    lru, half, gated = Balance(0.0), Balance(0.5), Balance(1.0, gate=2.0)
    even = Mixture.of((lru, 1.0), (Balance(1.0), 1.0))
    assert even.weights == pytest.approx(half.weights()), "the mean of powers 0 and 1"
    assert Mixture.of((half, 3.0), (gated, 0.01)).shares == ((half, 1.0),), "negligible"
    mostly_open = Mixture.of((lru, 3.0), (gated, 2.0))
    assert mostly_open.lets_in(math.inf, is_trickle_shut=True)
    mostly_gated = Mixture.of((lru, 1.0), (gated, 2.0), (Balance(0.0, gate=math.inf), 0.5))
    assert mostly_gated.gate == 2.0, "the open and the widest gate are less than half"
    assert mostly_gated.lets_in(1.9, is_trickle_shut=True)
    assert not mostly_gated.lets_in(2.1, is_trickle_shut=True)


def test_where_scores_are_close_several_balances_count_and_where_they_are_not_one_does():
    shadows = Shadows(64)
    for one in shadows._shadows:
        one.score = 0.0 if one.balance.trickle else 1000.0
    shadows._choose()
    assert len(shadows.mixture.shares) == len(BALANCES) - 1
    shadows._shadows[6].score = 2000.0
    shadows._choose()
    assert [balance for balance, _ in shadows.mixture.shares] == [BALANCES[6]]


def test_a_key_that_was_used_more_often_waits_longer():
    classes = UseClasses()
    classes.put(KEYS[0], 4, now=0)
    classes.put(KEYS[1], 1, now=10)
    lru, lfu = BALANCES[1].weights(), BALANCES[7].weights()
    assert classes.first(lru, now=20) == KEYS[0]
    assert classes.first(lfu, now=20) == KEYS[1]


def test_classes_grow_with_the_number_of_uses():
    classes = [class_of(num_uses) for num_uses in range(1, 256)]
    assert classes == sorted(classes) and set(classes) == set(range(NUM_CLASSES))
    for index in range(NUM_CLASSES - 1):
        members = [num_uses for num_uses in range(1, 256) if class_of(num_uses) == index]
        assert min(members) <= typical_uses(index) <= max(members)


def test_uses_are_remembered_for_at_least_the_keys_used_last():
    memory, start = UseMemory(1000), (1 << 32) - 2000  # times of more than 32 bits, too
    for index, key in enumerate(KEYS):
        memory.put(key, 1 + index % 200, start + index)
    for index in range(4000, 5000):
        expected = PastUses(1 + index % 200, age=6000 - index)
        assert memory.get(KEYS[index], start + 6000) == expected
    forgotten = [memory.get(KEYS[index], start + 6000) for index in range(3000)]
    assert set(forgotten) == {PastUses(0, math.inf)}, "more than twice as many"


def test_uses_of_keys_never_put_in_are_zero():
    memory = UseMemory(2500)
    for now, key in enumerate(KEYS[:2500]):
        memory.put(key, 9, now)
    assert not any(memory.get(key, 2500).num_uses for key in KEYS[2500:])


def test_a_gate_opens_to_what_was_used_within_its_reach():
    forever, brief = Balance(0.0, gate=math.inf), Balance(0.5, gate=2.0)
    assert not forever.lets_in(math.inf, is_trickle_shut=False), "never used before"
    assert forever.lets_in(1000.0, is_trickle_shut=False)
    assert brief.lets_in(1.9, is_trickle_shut=False)
    assert not brief.lets_in(2.1, is_trickle_shut=False)


def test_where_popularity_turns_over_a_gate_forgets_what_was_popular_before():
    """A gate without end lets in all that was popular once."""
    trace = make_trace(upheaval(507, 4000, every=500))
    capacity = int(trace.num_unique * 0.01)
    learned = replay(trace, [TierSpec("tier", "auto", capacity)]).hit_ratio
    assert learned >= replay(trace, [TierSpec("tier", "arc", capacity)]).hit_ratio + 0.01


def test_where_a_second_use_is_mostly_the_last_keys_used_once_stay_longest():
    trace = make_trace(retries(514, 2500, lag=100))
    capacity = int(trace.num_unique * 0.05)
    learned = replay(trace, [TierSpec("tier", "auto", capacity)]).hit_ratio
    assert learned >= replay(trace, [TierSpec("tier", "arc", capacity)]).hit_ratio + 0.05
