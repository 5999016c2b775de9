"""Over-committed random workloads: every query sees the right keys, every answer is right."""

import random

import pytest

from tests.scheduler.fake_device import VOCAB
from tests.scheduler.simulation import Simulation, kv_groups

NUM_WORKLOADS = 200
PER_TEST = 20


def make_simulation(rng: random.Random) -> Simulation:
    """Random shape of model, pool and limits; pools hold a fraction of what is asked."""
    windows = rng.choice([(None,), (None,), (None, 5), (None, 1, 9), (7,), (3, 16), (None, None)])
    page_size = rng.choice([1, 1, 2, 4, 8])
    max_num_seqs = rng.choice([1, 3, 6, 6, 12])
    return Simulation(
        groups=kv_groups(*windows),
        num_pages=tuple(rng.randint(20, 50) // page_size + 3 for _ in windows),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, rng.choice([1, 5, 16, 40])),
        max_model_len=rng.choice([24, 48]),
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.8,
    )


def add_request(
    sim: Simulation, rng: random.Random, shared: list[list[int]], name: str, no_store: bool = False
) -> None:
    room = min(sim.max_model_len - 1, sim.scheduler._roster.pager.max_tokens)
    head = rng.choice(shared)[: rng.choice([0, 0, 8, 20])]
    prompt = head + [rng.randrange(VOCAB) for _ in range(rng.randint(0 if head else 1, 6))]
    sim.add(
        name,
        prompt[:room],
        priority=rng.randint(0, 2),
        salt=rng.choice(["", "", "", "tenant"]),
        no_store=no_store,
        max_tokens=rng.choice([1, 4, 16, 40, 40]),
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 4]))),
        logprobs=rng.choice([None, None, None, 0, 2]),
        prompt_logprobs=rng.choice([None] * 6 + [0, 1]),
    )


def run_workload(seed: int) -> Simulation:
    rng = random.Random(seed)
    sim = make_simulation(rng)
    shared = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(2)]
    num_requests, num_added = rng.randint(6, 16), 0
    while num_added < num_requests or sim.scheduler.has_work or sim.in_flight:
        if num_added < num_requests and (rng.random() < 0.4 or not sim.scheduler.has_work):
            for _ in range(min(rng.randint(1, 6), num_requests - num_added)):
                add_request(sim, rng, shared, f"{seed}-{num_added}")
                num_added += 1
        if rng.random() < 0.03:
            sim.abort(rng.choice(list(sim.requests)))
        sim.step()
        assert len(sim.plans) < 5000, "no end in sight"
    sim.check_answers()
    sim.check_all_is_free()
    return sim


@pytest.mark.parametrize("first", range(0, NUM_WORKLOADS, PER_TEST))
def test_answers_are_right_and_all_pages_free_under_random_overcommitted_load(first: int):
    stats = [run_workload(seed).scheduler.stats() for seed in range(first, first + PER_TEST)]
    assert sum(s.num_preemptions for s in stats) >= 10, "the pools are too large to test preemption"
    assert sum(s.hit_tokens for s in stats) > 50, "the prompts share too little to test the cache"
