"""Sequences that load: preempted ones take back what is theirs, and nobody waits in vain."""

import random

import pytest

from jaxserve.kv.planner import LoadPlanner
from tests.scheduler.fake_tiers import STORE, FakeTiers
from tests.scheduler.simulation import Simulation, kv_groups


def prompt(length: int, first: int = 1) -> list[int]:
    """A prompt that differs from those with another `first` in its first block."""
    return [first, *((7 * i + 3) % 90 + 1 for i in range(length - 1))]


@pytest.mark.parametrize("lateness", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("windows", [(None,), (None, 5), (7,)])
def test_nothing_is_computed_twice_while_the_host_has_room_however_late_saves_are(
    lateness: float, windows: tuple[int | None, ...]
):
    num_preemptions = 0
    for seed in range(4):
        rng = random.Random(seed)
        tiers = FakeTiers(2000, len(windows), 4, lateness=lateness, seed=seed)
        sim = Simulation(
            groups=kv_groups(*windows),
            num_pages=(14 if None in windows else 5,) * len(windows),
            max_num_seqs=6,
            policy=rng.choice(["fcfs", "priority"]),
            tiers=tiers,
        )
        for number in range(12):
            tokens = prompt(rng.randint(5, 20), first=number)
            sim.add(f"{number}", tokens, priority=rng.randint(0, 2), max_tokens=rng.randint(1, 30))
            for _ in range(rng.randint(0, 4)):
                sim.step()
        sim.run()
        sim.check_answers()
        sim.check_all_is_free()
        assert sim.scheduler.stats().recomputed_tokens == 0
        assert tiers.tiers.counters.saves_dropped == 0
        num_preemptions += sim.scheduler.stats().num_preemptions
    assert num_preemptions >= 2, "the pools are too large to test preemption"


def restarted(sim: Simulation, **tiers_options) -> Simulation:
    """The same stores, everything else empty; loads whatever there is."""
    assert sim.tiers is not None
    tiers = FakeTiers(200, 1, 4, has_store=True, lateness=0, **tiers_options)
    tiers.records = sim.tiers.records
    return Simulation(
        tiers=tiers, load_planner=LoadPlanner(4, "load"), policy="priority", max_num_seqs=1
    )


def filled_store() -> Simulation:
    tiers = FakeTiers(200, 1, 4, saves_early=True, has_store=True, lateness=0)
    sim = Simulation(tiers=tiers)
    sim.add("first", prompt(60), max_tokens=2)
    sim.run()
    sim.check_all_is_free()
    assert len(tiers.records) >= 15
    return sim


def test_a_sequence_that_is_preempted_while_it_loads_loads_again():
    sim = restarted(filled_store())
    assert sim.tiers is not None
    held: list[tuple] = []

    def hold(piece_id: int, slots) -> None:
        held.append((piece_id, slots))

    stage, sim.tiers.stage = sim.tiers.stage, hold
    sim.add("loading", prompt(60), priority=1, max_tokens=3)
    while not held:
        sim.step()
    sim.add("urgent", prompt(5, first=2), max_tokens=2)
    for _ in range(20):
        sim.step()
    sim.tiers.stage = stage
    for piece in held:
        stage(*piece)
    sim.run()
    sim.check_answers()
    assert sim.scheduler.stats().num_preemptions == 1
    assert sum(plan.num_tokens - plan.num_decodes for plan in sim.plans) <= 4 + 5
    assert sim.events["loading"][0].num_cached_tokens == 56, "all but the last block was loaded"
    reuse = sim.events["loading"][0].reuse
    assert reuse is not None and sum(reuse.cached.values()) == 56
    assert sim.scheduler.stats().hit_tokens == 56, "nothing may be counted twice"


def test_nobody_waits_for_a_load_that_was_given_up():
    sim = restarted(filled_store(), hangs=True)
    assert sim.tiers is not None
    sim.tiers._known.update(sim.tiers.records)
    sim.add("first", prompt(60), max_tokens=3)
    while not sim.scheduler._roster.loading:
        sim.step()
    assert sim.tiers.tiers.counters.loaded.get(STORE, 0) == 0
    sim.abort("first")
    sim.add("second", prompt(60), max_tokens=3)
    for _ in range(30):
        sim.step()
    assert len(sim.tokens("second")) == 3, "it waits for a store that hangs, for nobody"


def test_a_preempted_sequence_goes_on_though_the_head_of_its_window_was_forgotten():
    """Its last block is partial, so its window reaches one block further back."""
    sim = Simulation(groups=kv_groups(5), max_num_seqs=1, policy="priority")
    sim.add("victim", prompt(9), max_tokens=20, priority=1, ignore_eos=True)
    while len(sim.tokens("victim")) < 1:
        sim.step()
    sim.add("urgent", prompt(3, first=2), max_tokens=2)
    while sim.scheduler.stats().num_preemptions == 0:
        sim.step()
    (group,) = sim.scheduler.index.groups
    victim = sim.scheduler._roster.live["victim"]
    assert victim.parked is not None and len(victim.parked.private) == 1
    assert group.forget(victim.parked.names[1])
    sim.run()
    sim.check_answers()
    sim.check_all_is_free()
