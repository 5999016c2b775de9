"""What the planner is told: estimates from measured calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kv.stores.costs import CostPrior, OperationCosts
from tests.kv.stores.conftest import FakeClock

PRIOR = CostPrior(latency_s=0.01, units_per_s=1e9)


def test_the_prior_holds_until_something_was_measured():
    costs = OperationCosts(PRIOR, FakeClock())
    assert costs.seconds(10**8) == pytest.approx(0.11)
    assert costs.units_per_s() == 1e9


@pytest.mark.parametrize("num_bytes", [50_000, 300_000, 3_000_000, 20_000_000, 60_000_000])
def test_estimates_between_and_beyond_what_was_measured(num_bytes: int):
    """A store with 5 ms latency and 200 MB/s, seen at four sizes."""

    def truth(amount: int) -> float:
        return 0.005 + amount / 2e8

    costs = OperationCosts(PRIOR, FakeClock())
    for _ in range(5):
        for amount in (100_000, 1_000_000, 4_000_000, 16_000_000):
            costs.observe(amount, truth(amount))
    assert costs.seconds(num_bytes) == pytest.approx(truth(num_bytes), rel=0.1)


def test_it_follows_a_store_that_becomes_slower():
    costs = OperationCosts(PRIOR, FakeClock())
    for _ in range(20):
        costs.observe(1_000_000, 0.01)
    for _ in range(20):
        costs.observe(1_000_000, 0.5)
    assert costs.seconds(1_000_000) == pytest.approx(0.5, rel=0.05)


def test_a_first_call_that_was_held_up_is_soon_outvoted():
    costs = OperationCosts(PRIOR, FakeClock())
    costs.observe(1_000_000, 0.5)
    for _ in range(4):
        costs.observe(1_000_000, 0.02)
    assert costs.seconds(1_000_000) == pytest.approx((0.5 + 4 * 0.02) / 5)


def test_deviations_make_an_estimate_cautious():
    costs = OperationCosts(PRIOR, FakeClock())
    for step in range(100):
        costs.observe(1_000_000, 0.1 if step % 2 else 0.3)
    assert costs.seconds(1_000_000) == pytest.approx(0.2, abs=0.03)
    assert costs.seconds(1_000_000, num_deviations=2) == pytest.approx(0.4, abs=0.06)


@given(
    st.lists(st.tuples(st.integers(1, 2**30), st.floats(1e-6, 100)), max_size=30),
    st.lists(st.integers(1, 2**34), min_size=2, max_size=10),
)
def test_more_never_takes_less_and_nothing_takes_no_time(calls, amounts):
    costs = OperationCosts(PRIOR, FakeClock())
    for amount, seconds in calls:
        costs.observe(amount, seconds)
    estimates = [costs.seconds(amount) for amount in sorted(amounts)]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(estimates, estimates[1:], strict=False))
    assert estimates[0] > 0
