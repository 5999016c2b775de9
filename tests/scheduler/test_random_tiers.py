"""Random over-committed load over lower tiers that are late, lossy, small, lying or hanging.

After every few steps each tier holds, under every name, what that name says. Some workloads are
served by several engines one after the other, which share the stores.
"""

import random
from collections import Counter

import numpy as np
import pytest

from jaxserve.kv import loads as loads_module
from jaxserve.kv import tiers as tiers_module
from jaxserve.kv.planner import Choice, Decision, LoadPlanner
from tests.scheduler.fake_tiers import STORE, FakeTiers
from tests.scheduler.simulation import Simulation, kv_groups
from tests.scheduler.test_random_workloads import VOCAB, add_request
from tests.scheduler.truth import Truth

NUM_WORKLOADS = 200
PER_TEST = 50
WINDOWS = [(None,), (None,), (None, 5), (None, 1, 9), (7,), (3, 16), (None, None)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short prompts are loaded in several pieces, and raced in several steps."""
    monkeypatch.setattr(tiers_module, "PIECE_BLOCKS", 4)
    monkeypatch.setattr(loads_module, "RACE_TOKENS", 3)


def make_planner(rng: random.Random, page_size: int) -> LoadPlanner:
    """One that decides by costs, one that is told what to do, or one that decides at random."""
    planner = LoadPlanner(page_size, rng.choice(["auto", "load", "recompute"]))
    if rng.random() < 0.5:
        planner.prefill.observe(100, 1e4, rng.choice([1e-6, 0.1, 1.0, 10.0]))
    dice = random.Random(rng.random())

    def decide(first: int, host_end: int, end: int, *args, can_split: bool = True, **kwargs):
        found = end - first
        end = dice.choice([end, end, host_end, dice.randint(first, end)])
        start, wait_s = first * page_size, dice.choice([0, 0.01, 0.05, 0.2, 5])
        if end <= first:
            return Decision(Choice.RECOMPUTE, first, start, 0.0, 0.0, 0.0, found)
        if can_split and dice.random() < 0.6:
            until = dice.randint(start, end * page_size)
            return Decision(Choice.SPLIT, end, until, wait_s, 0.0, 0.0, found)
        return Decision(Choice.LOAD, end, start, wait_s, 0.0, 0.0, found)

    if rng.random() < 0.7:
        planner.decide = decide  # pyright: ignore[reportAttributeAccessIssue]
    return planner


def make_simulation(
    rng: random.Random,
    windows: tuple[int | None, ...],
    page_size: int,
    has_store: bool,
    records: dict[bytes, np.ndarray],
) -> Simulation:
    max_num_seqs = rng.choice([1, 3, 6, 6, 12])
    tiers = FakeTiers(
        rng.choice([6, 12, 20, 200] if has_store else [1, 5, 30, 200, 1000]),
        len(windows),
        page_size,
        saves_early=rng.random() < 0.5,
        has_store=has_store,
        failure_rate=rng.choice([0, 0, 0.1, 0.5]),
        lateness=rng.choice([0, 0.5, 0.9]),
        hangs=rng.random() < 0.1,
        wrong_rate=rng.choice([0, 0, 0.3]),
        store_s=page_size * rng.choice([0, 0.001, 0.005, 0.02, 0.1]),
        records=records,
        policy=rng.choice(["lru", "arc", "s3fifo", "tinylfu", "auto", "lru?store_threshold=2"]),
        piece_blocks=3,
        seed=rng.randrange(1 << 30),
    )
    return Simulation(
        groups=kv_groups(*windows),
        num_pages=tuple(rng.randint(20, 50) // page_size + 3 for _ in windows),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, rng.choice([1, 5, 16, 40])),
        max_model_len=rng.choice([24, 48]),
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.85,
        tiers=tiers,
        load_planner=make_planner(rng, page_size),
        jitter=random.Random(rng.random()) if rng.random() < 0.5 else None,
    )


def forget_some(sim: Simulation, rng: random.Random) -> None:
    """What an operator may do at any time: clear tiers, or erase a tenant that has requests."""
    assert sim.tiers is not None
    tiers, live = sim.tiers.tiers, list(sim.scheduler._roster.live.values())
    if live and rng.random() < 0.3:
        sim.scheduler.stop_storing(rng.choice(live).tenant)
    tiers.poll()
    for holder in (*sim.scheduler.index.groups, tiers.host):
        if rng.random() < 0.6:
            for name in list(holder.names()):
                if not tiers.is_private(name) and rng.random() < 0.5:
                    holder.forget(name)


def serve(sim: Simulation, rng: random.Random, name: str, heads: list[list[int]], truth: Truth):
    num_requests, num_added, num_steps = rng.randint(10, 25), 0, 0
    while num_added < num_requests or sim.scheduler.has_work or sim.in_flight:
        if num_added < num_requests and (rng.random() < 0.3 or not sim.scheduler.has_work):
            for _ in range(min(rng.randint(1, 6), num_requests - num_added)):
                request_id = f"{name}-{num_added}"
                add_request(sim, rng, heads, request_id, no_store=rng.random() < 0.15)
                truth.note(sim.requests[request_id])
                num_added += 1
        if sim.requests and rng.random() < 0.05:
            sim.abort(rng.choice(list(sim.requests)))
        if rng.random() < 0.03:
            forget_some(sim, rng)
        sim.step()
        num_steps += 1
        if num_steps % 8 == 0:
            truth.check(sim)
        assert len(sim.plans) < 5000 and num_steps < 50_000, "no end in sight"
    sim.check_answers()
    sim.check_all_is_free()
    truth.check(sim)


def run_workload(seed: int) -> list[Simulation]:
    rng = random.Random(seed)
    heads = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(3)]
    windows, page_size = rng.choice(WINDOWS), rng.choice([1, 2, 4, 4, 8])
    has_store = rng.random() < 0.7
    truth, records, sims = Truth(page_size), {}, []
    for generation in range(rng.randint(1, 3) if has_store else 1):
        sim = make_simulation(rng, windows, page_size, has_store, records)
        serve(sim, rng, f"{seed}-{generation}", heads, truth)
        assert sim.tiers is not None
        records = sim.tiers.records
        sims.append(sim)
    return sims


@pytest.mark.parametrize("first", range(0, NUM_WORKLOADS, PER_TEST))
def test_answers_are_right_over_late_lossy_lying_and_hanging_tiers(first: int):
    sims = [sim for seed in range(first, first + PER_TEST) for sim in run_workload(seed)]
    loaded, choices = Counter[str](), Counter[str]()
    for sim in sims:
        assert sim.tiers is not None
        loaded.update(sim.tiers.tiers.counters.loaded)
        choices.update(sim.scheduler.stats().decisions)
    assert sum(sim.scheduler.stats().num_preemptions for sim in sims) >= 10
    assert loaded["host"] > 20, "the host tier was hardly used"
    assert loaded[STORE] > 10, "the store was hardly used"
    assert choices["split"] > 0, "nothing was computed while it was loaded"
