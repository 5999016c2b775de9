"""Random over-committed load over lower tiers that are late, lossy, small or hanging."""

import random

import pytest

from jaxserve.kv.planner import LoadPlanner
from tests.scheduler.fake_tiers import STORE, FakeTiers
from tests.scheduler.simulation import Simulation, kv_groups
from tests.scheduler.test_random_workloads import VOCAB, add_request

NUM_WORKLOADS = 200
PER_TEST = 50


def make_simulation(rng: random.Random) -> Simulation:
    windows = rng.choice([(None,), (None,), (None, 5), (None, 1, 9), (7,), (None, None)])
    page_size = rng.choice([1, 2, 4, 4, 8, 8])
    max_num_seqs = rng.choice([1, 3, 6, 6, 12])
    has_store = rng.random() < 0.7
    tiers = FakeTiers(
        rng.choice([6, 12, 20] if has_store else [1, 5, 30, 200, 1000]),
        len(windows),
        page_size,
        saves_early=rng.random() < 0.5,
        has_store=has_store,
        failure_rate=rng.choice([0, 0, 0.1, 0.5]),
        lateness=rng.choice([0, 0.5, 0.9]),
        hangs=rng.random() < 0.1,
        policy=rng.choice(["lru", "arc", "s3fifo", "tinylfu", "lru?store_threshold=2"]),
        seed=rng.randrange(1 << 30),
    )
    planner = LoadPlanner(page_size, rng.choice(["auto", "auto", "load", "load", "recompute"]))
    if rng.random() < 0.5:
        planner.prefill.observe(100, 1e4, rng.choice([1e-6, 0.1, 10.0]))
    return Simulation(
        groups=kv_groups(*windows),
        num_pages=tuple(rng.randint(20, 50) // page_size + 3 for _ in windows),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, rng.choice([1, 5, 16, 40])),
        max_model_len=rng.choice([24, 48]),
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.8,
        tiers=tiers,
        load_planner=planner,
    )


def run_workload(seed: int) -> Simulation:
    rng = random.Random(seed)
    sim = make_simulation(rng)
    shared = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(3)]
    num_requests, num_added = rng.randint(10, 30), 0
    while num_added < num_requests or sim.scheduler.has_work or sim.in_flight:
        if num_added < num_requests and (rng.random() < 0.3 or not sim.scheduler.has_work):
            for _ in range(min(rng.randint(1, 6), num_requests - num_added)):
                add_request(sim, rng, shared, f"{seed}-{num_added}")
                num_added += 1
        if rng.random() < 0.03:
            sim.abort(rng.choice(list(sim.requests)))
        sim.step()
        assert len(sim.plans) < 5000 and sim.now_s < 1000, "no end in sight"
    sim.check_answers()
    sim.check_all_is_free()
    return sim


@pytest.mark.parametrize("first", range(0, NUM_WORKLOADS, PER_TEST))
def test_answers_are_right_over_late_lossy_and_hanging_tiers(first: int):
    sims = [run_workload(seed) for seed in range(first, first + PER_TEST)]
    loaded = {"host": 0, STORE: 0}
    for sim in sims:
        assert sim.tiers is not None
        for source, count in sim.tiers.tiers.counters.loaded.items():
            loaded[source] += count
    assert sum(sim.scheduler.stats().num_preemptions for sim in sims) >= 10
    assert loaded["host"] > 20, "the host tier was hardly used"
    assert loaded[STORE] > 0, "the store was not used"
