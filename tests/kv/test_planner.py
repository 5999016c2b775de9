"""Load or recompute: the fit of the costs, and the choice between three speeds of stores."""

import random

import pytest

from jaxserve.kv.planner import MAX_IDLE_S, MAX_IDLE_SHARE, PATIENCE, Choice, LoadPlanner
from jaxserve.kv.prefill_cost import PrefillCost, Steps

A, C = 1e-4, 2e-9  # seconds per position and per pair


def fitted(noise: float = 0.0) -> PrefillCost:
    rng, cost = random.Random(1), PrefillCost()
    for _ in range(200):
        start, tokens = rng.randrange(0, 8000), rng.randrange(64, 2048)
        pairs = ((start + tokens) ** 2 - start**2) / 2
        seconds = A * tokens + C * pairs
        cost.observe(tokens, pairs, seconds * (1 + rng.uniform(-noise, noise)))
    return cost


def true_seconds(start: int, end: int) -> float:
    return A * (end - start) + C * (end * end - start * start) / 2


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_fit_finds_the_cost_of_computing(noise: float):
    cost = fitted(noise)
    for start, end in ((0, 100), (0, 4000), (4000, 8000)):
        assert cost.seconds(start, end) == pytest.approx(true_seconds(start, end), rel=0.02 + noise)


def test_estimates_are_never_negative_even_from_odd_measurements():
    cost = PrefillCost()
    cost.observe(100, 5000.0, 1.0)
    cost.observe(1000, 500_000.0, 0.1)
    cost.observe(10, 1e6, 0.0)
    assert cost.seconds(0, 10) >= 0 and cost.seconds(0, 100_000) >= 0


def test_the_fit_follows_a_machine_that_becomes_slower():
    cost = fitted()
    for _ in range(200):
        cost.observe(1000, 500_000.0, 10 * (A * 1000 + C * 500_000))
    assert cost.seconds(0, 1000) == pytest.approx(10 * true_seconds(0, 1000), rel=0.1)


def test_steps_cost_something_each_and_are_paid_as_large_as_they_are_padded():
    rng, cost = random.Random(2), PrefillCost(lambda count: Steps(3, 3 * 512))
    for _ in range(100):
        size = rng.choice([16, 64, 512])
        cost.observe(size, 0.0, 0.01 + A * size)
    assert cost.seconds(0, 1100) == pytest.approx(3 * (0.01 + A * 512), rel=0.02)


def test_steps_of_one_size_say_what_a_token_costs_not_what_a_step_costs():
    cost = PrefillCost()
    for _ in range(20):
        cost.observe(2048, 0.0, 0.5)
    assert cost.seconds(0, 128) == pytest.approx(0.5 / 16, rel=0.05)


def test_steps_that_were_held_up_spoil_little():
    cost = PrefillCost()
    for size in (16, 64, 512, 2048):
        cost.observe(size, size * size / 2, 3.0)  # the first of each
        cost.observe(size, size * size / 2, 0.005 + A * size + C * size * size / 2)
    assert true_seconds(0, 2048) < cost.seconds(0, 2048) < 2.2 * (0.005 + true_seconds(0, 2048))


def planner(mode: str = "auto") -> LoadPlanner:
    made = LoadPlanner(16, mode)
    made.prefill = fitted()
    return made


def store_at(s_per_block: float, latency_s: float = 0.0):
    return lambda blocks: latency_s + blocks * s_per_block


FREE = store_at(0.0)
COMPUTE_BLOCK_S = true_seconds(0, 4000) / 250


def test_a_fast_store_is_loaded_whole_and_nothing_computed_meanwhile():
    decision = planner().decide(0, 0, 250, FREE, store_at(COMPUTE_BLOCK_S / 20))
    assert decision.choice is Choice.LOAD and decision.end == 250
    assert decision.compute_until == 0
    assert decision.load_s / 16 < decision.wait_s < decision.compute_s, "until the first piece"


def test_a_store_as_fast_as_computing_is_met_halfway():
    decision = planner().decide(0, 0, 250, FREE, store_at(COMPUTE_BLOCK_S))
    assert decision.choice is Choice.SPLIT
    assert 100 * 16 < decision.compute_until < 160 * 16


def test_what_cannot_be_split_is_loaded_whole_or_not_at_all():
    """Nothing is computed while it waits, so it waits only for what comes quickly."""
    for blocks, choice in ((0.4, Choice.LOAD), (0.7, Choice.RECOMPUTE)):
        store = store_at(COMPUTE_BLOCK_S * blocks)
        decision = planner().decide(0, 0, 250, FREE, store, can_split=False)
        assert decision.choice is choice and decision.compute_until == 0
    store = store_at(COMPUTE_BLOCK_S * 2)
    decision = planner().decide(0, 100, 250, FREE, store, can_split=False)
    assert decision.choice is Choice.LOAD and decision.end == 100


def test_one_piece_is_loaded_if_that_is_quicker_by_less_than_half_too():
    """A block of a short prompt: its head is no shorter than itself, and its load is soon over."""
    compute_s = true_seconds(0, 40) - true_seconds(16, 40)
    for share, choice in ((0.3, Choice.LOAD), (0.6, Choice.LOAD), (1.1, Choice.RECOMPUTE)):
        store = store_at(share * compute_s)
        decision = planner().decide(0, 0, 1, FREE, store, num_tokens=40, is_reliable=True)
        assert decision.choice is choice and decision.compute_until == 0


def test_a_slow_store_is_left_alone():
    decision = planner().decide(0, 0, 250, FREE, store_at(COMPUTE_BLOCK_S, latency_s=10.0))
    assert decision.choice is Choice.RECOMPUTE and decision.end == 0


def test_a_short_prefix_is_recomputed_where_a_long_one_is_loaded():
    store = store_at(COMPUTE_BLOCK_S / 20, latency_s=true_seconds(0, 600))
    assert planner().decide(0, 0, 20, FREE, store).choice is Choice.RECOMPUTE
    assert planner().decide(0, 0, 250, FREE, store).choice is not Choice.RECOMPUTE


def test_what_the_host_has_is_loaded_even_if_the_store_is_too_slow_for_the_rest():
    decision = planner().decide(0, 100, 250, FREE, store_at(1.0, latency_s=100.0))
    assert decision.choice is Choice.LOAD and decision.end == 100


def test_a_closed_store_is_recomputed():
    closed = store_at(float("inf"))
    assert planner().decide(0, 0, 250, FREE, closed).choice is Choice.RECOMPUTE


@pytest.mark.parametrize(("mode", "choice"), [("load", "load"), ("recompute", "recompute")])
def test_a_forced_mode_does_the_one_thing(mode: str, choice: str):
    made = planner(mode)
    assert made.decide(0, 0, 250, FREE, store_at(1.0)).choice == choice
    assert made.decide(0, 0, 250, FREE, FREE).choice == choice


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2, 0.5, 0.9, 2.0])
def test_whatever_a_store_promises_a_stop_of_it_costs_little(share: float):
    """The time without computing is bounded: by the deadline, less what the head takes."""
    all_s = true_seconds(0, 4000)
    decision = planner().decide(0, 0, 250, FREE, store_at(share * all_s / 250))
    idle_s = decision.wait_s - true_seconds(0, decision.compute_until)
    assert max(idle_s, decision.patience_s) <= 1.05 * MAX_IDLE_SHARE * all_s
    assert planner().look_up_wait_s(0, 250, 4000, share * all_s) <= 1.05 * MAX_IDLE_SHARE * all_s


SHORT_S = true_seconds(0, 40)


def short_wait_s(look_up_s: float, **about) -> float:
    """Of a request of 40 tokens whose first 32 may be in a store."""
    return planner().look_up_wait_s(0, 2, 40, look_up_s, **about)


def test_a_short_request_waits_only_for_stores_that_have_kept_their_word():
    look_up_s = 0.2 * SHORT_S
    assert look_up_s < MAX_IDLE_S / PATIENCE, "short enough to be waited for"
    assert short_wait_s(look_up_s) == 0.0
    assert look_up_s < short_wait_s(look_up_s, is_reliable=True) <= MAX_IDLE_S
    store = store_at(0.1 * SHORT_S)
    assert planner().decide(0, 0, 2, FREE, store, 40).choice is not Choice.LOAD
    decision = planner().decide(0, 0, 2, FREE, store, 40, is_reliable=True)
    assert decision.choice is Choice.LOAD
    assert decision.wait_s == decision.patience_s == MAX_IDLE_S, "a busy core may hold it up"


def test_stores_are_not_asked_for_what_would_take_longer_to_load_than_to_compute():
    assert not planner().is_worth_asking(0, 2, 40, SHORT_S)
    assert planner().is_worth_asking(0, 2, 40, 0.1 * SHORT_S)
    assert planner().is_worth_asking(0, 250, 4000, SHORT_S), "a part of it would pay"
    assert planner("load").is_worth_asking(0, 2, 40, 1.0)
    assert not planner("recompute").is_worth_asking(0, 250, 4000, 0.0)
    assert LoadPlanner(16).is_worth_asking(0, 2, 40, 1.0), "nothing has been measured yet"


def test_nobody_waits_for_look_ups_that_never_find_anything():
    look_up_s = 0.05 * true_seconds(0, 4000)
    assert planner().look_up_wait_s(0, 250, 4000, look_up_s, hit_share=1.0) > look_up_s
    assert planner().look_up_wait_s(0, 250, 4000, look_up_s, hit_share=0.02) == 0.0


def test_a_look_up_is_not_waited_for_if_loading_would_take_what_it_saves():
    assert short_wait_s(0.2 * SHORT_S, is_reliable=True, load_s=0.5 * SHORT_S) > 0.0
    assert short_wait_s(0.2 * SHORT_S, is_reliable=True, load_s=0.7 * SHORT_S) == 0.0


def test_what_is_in_memory_is_waited_for_though_it_takes_a_while():
    decision = planner().decide(0, 250, 250, store_at(0.3 * COMPUTE_BLOCK_S), FREE)
    assert decision.choice is Choice.LOAD and decision.compute_until == 0


def test_what_a_load_saves_is_measured_in_steps_that_are_spared():
    """Computing 32 tokens takes a step as large as computing 64 of them does."""
    made = LoadPlanner(16, steps=lambda count: Steps(1, 64 * -(-count // 64)))
    for size in (64, 128, 256):
        made.prefill.observe(size, 0.0, 1e-3 * size)
    fast = store_at(1e-3)
    assert made.decide(0, 0, 2, FREE, fast, num_tokens=64).choice is Choice.RECOMPUTE
    assert made.decide(0, 0, 2, FREE, fast, num_tokens=65).choice is Choice.LOAD


def test_what_the_host_has_is_not_mixed_with_what_is_slower_than_computing():
    decision = planner().decide(0, 200, 250, FREE, store_at(2 * COMPUTE_BLOCK_S))
    assert decision.choice is Choice.LOAD and decision.end == 200


def test_a_store_that_answers_late_is_met_from_the_head_even_if_it_is_fast():
    late = store_at(0.01 * COMPUTE_BLOCK_S, latency_s=0.2 * true_seconds(0, 4000))
    decision = planner().decide(0, 0, 250, FREE, late)
    assert decision.choice is Choice.SPLIT and decision.compute_until > 0
    assert planner().look_up_wait_s(0, 250, 4000, 0.2 * true_seconds(0, 4000)) == 0.0


def test_a_look_up_that_takes_longer_than_computing_is_not_waited_for():
    assert planner().look_up_wait_s(0, 2, 40, 1.0) == 0.0
    assert planner("recompute").look_up_wait_s(0, 250, 4000, 1e-6) == 0.0
    assert planner("load").look_up_wait_s(0, 250, 4000, 1e-6) == float("inf")
