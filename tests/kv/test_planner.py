"""Load or recompute: the fit of the costs, and the choice between three speeds of stores."""

import random

import pytest

from jaxserve.kv.planner import Choice, LoadPlanner, PrefillCost

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
    assert decision.load_s < decision.wait_s < decision.compute_s


def test_a_store_as_fast_as_computing_is_met_halfway():
    decision = planner().decide(0, 0, 250, FREE, store_at(COMPUTE_BLOCK_S))
    assert decision.choice is Choice.SPLIT
    assert 100 * 16 < decision.compute_until < 160 * 16


def test_what_cannot_be_split_is_loaded_whole_or_not_at_all():
    for blocks, choice in ((0.9, Choice.LOAD), (1.1, Choice.RECOMPUTE)):
        store = store_at(COMPUTE_BLOCK_S * blocks)
        decision = planner().decide(0, 0, 250, FREE, store, can_split=False)
        assert decision.choice is choice and decision.compute_until == 0
    store = store_at(COMPUTE_BLOCK_S * 2)
    decision = planner().decide(0, 100, 250, FREE, store, can_split=False)
    assert decision.choice is Choice.LOAD and decision.end == 100


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
