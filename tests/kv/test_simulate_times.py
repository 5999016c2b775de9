"""The planner's decisions in a simulated cascade, and the seconds that follow."""

import pytest

from jaxserve.kv.simulate import TierSpec, replay
from jaxserve.kv.simulate_times import Costs, PlanMeter
from jaxserve.kv.traces import make_trace

PREFILL = Costs(
    block_tokens=100, block_bytes=1000, prefill_tokens_per_s=1000.0, bytes_per_s=(1e5, 1e3)
)


def test_blocks_on_the_device_cost_nothing_and_the_rest_is_computed():
    meter = PlanMeter(PREFILL)
    meter.serve(10, [4, 0, 0])
    assert meter.seconds.planned == meter.seconds.never_load == pytest.approx(0.6)
    assert sum(meter.decisions.values()) == 0


def test_fast_tiers_are_loaded_from():
    meter = PlanMeter(PREFILL)
    meter.serve(10, [0, 10, 0])
    assert meter.decisions == {"load": 1, "split": 0, "recompute": 0}
    assert meter.seconds.planned == meter.seconds.always_load == pytest.approx(0.1)
    assert meter.seconds.never_load == pytest.approx(1.0)


def test_tiers_slower_than_computing_are_not_waited_for():
    meter = PlanMeter(PREFILL)
    meter.serve(2, [0, 0, 2])
    assert meter.seconds.always_load == pytest.approx(2.0 + 0.02)
    assert meter.seconds.planned <= meter.seconds.never_load == pytest.approx(0.2)


def test_a_long_range_is_split_where_computing_meets_loading():
    costs = Costs(100, 1000, 1000.0, (2e4, 2e4))  # loading a block takes as long as computing it
    meter = PlanMeter(costs)
    meter.serve(100, [0, 0, 100])
    assert meter.decisions["split"] == 1
    assert meter.seconds.planned == pytest.approx(5.0, rel=0.05)
    assert meter.seconds.always_load == meter.seconds.never_load == pytest.approx(10.0)


def test_what_is_near_is_loaded_though_what_is_far_is_not():
    meter = PlanMeter(PREFILL)
    meter.serve(12, [0, 10, 2])
    assert meter.seconds.planned == pytest.approx(0.1 + 0.2)


def test_planning_beats_both_fixed_rules_on_a_trace():
    requests = [[f"{n}.{depth}" for depth in range(1 + n % 60)] for n in range(120)]
    meter = PlanMeter(Costs(100, 1000, 1000.0, (1e5, 2e4)))
    specs = [TierSpec(name, "lru", size) for name, size in (("d", 60), ("h", 400), ("s", 9999))]
    replay(make_trace(requests * 3), specs, meter=meter)
    seconds = meter.seconds
    assert seconds.planned < min(seconds.always_load, seconds.never_load)
