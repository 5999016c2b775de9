"""The circuit breaker on a clock that stands still."""

from jaxserve.kv.stores.breaker import BreakerState, CircuitBreaker
from tests.kv.stores.conftest import FakeClock


def make(clock: FakeClock) -> CircuitBreaker:
    return CircuitBreaker(3, min_backoff_s=1.0, max_backoff_s=8.0, clock=clock, num_to_trust=4)


def open_for(breaker: CircuitBreaker, clock: FakeClock) -> float:
    return breaker.retry_at_s - clock()


def test_only_failures_in_a_row_open_it():
    breaker = make(FakeClock())
    for _ in range(10):
        assert not breaker.fail() and not breaker.fail()
        breaker.succeed()
    assert breaker.is_closed
    assert not breaker.fail() and not breaker.fail() and breaker.fail()
    assert breaker.state is BreakerState.OPEN and breaker.num_openings == 1


def test_each_failed_trial_doubles_the_wait_up_to_a_bound():
    clock = FakeClock()
    breaker = make(clock)
    for _ in range(3):
        breaker.fail()
    waits = []
    for _ in range(5):
        waits.append(open_for(breaker, clock))
        assert not breaker.is_due
        clock.now_s += waits[-1]
        assert breaker.is_due
        breaker.begin_trial()
        assert breaker.fail(is_trial=True)
        assert not breaker.was_trusted, "its opening is no news"
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_a_flapping_store_is_asked_less_and_less_and_a_healed_one_is_trusted_again():
    clock = FakeClock()
    breaker = make(clock)
    for _ in range(3):
        breaker.fail()
    waits = []
    for _ in range(3):  # up for the trial, and down again
        waits.append(open_for(breaker, clock))
        clock.now_s += waits[-1]
        breaker.begin_trial()
        breaker.succeed(is_trial=True)
        assert breaker.is_closed
        assert breaker.fail(), "one failure is enough while it is not trusted"
    assert waits == [1.0, 2.0, 4.0]
    clock.now_s += open_for(breaker, clock)
    breaker.begin_trial()
    breaker.succeed(is_trial=True)
    for _ in range(4):
        breaker.succeed()
    assert not breaker.fail() and not breaker.fail() and breaker.fail()
    assert open_for(breaker, clock) == 1.0


def test_late_answers_of_other_calls_decide_nothing():
    clock = FakeClock()
    breaker = make(clock)
    for _ in range(3):
        breaker.fail()
    breaker.succeed()
    assert not breaker.fail() and breaker.state is BreakerState.OPEN
    clock.now_s += 1
    breaker.begin_trial()
    breaker.succeed()
    assert not breaker.fail() and breaker.state is BreakerState.HALF_OPEN
    breaker.abort_trial()
    assert breaker.is_due
