"""Look-ups over several stores: who waits for whom."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxserve.kv.cascade import StoreCascade
from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.messages import LookedUp, Message
from jaxserve.kv.policy.factory import make_policy
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.faults import FaultPlan, FaultyStore
from jaxserve.kv.stores.url import open_worker
from jaxserve.kv.tiers import PROMPT_ANSWER_S, Tiers

SLOT = memoryview(bytearray(64))
NAMES = [bytes([i]) * 32 for i in range(3)]


class Desk:
    """Two stores with all blocks in each; the one called `hangs` does not answer."""

    def __init__(self, hangs: str):
        self.inbox: deque[Message] = deque()
        self._arrived = threading.Event()
        workers = [
            open_worker(f"fault+memory://?name={name}&probe_timeout=1m") for name in ("near", "far")
        ]
        self.cascade = StoreCascade(
            workers, bytes(16), lambda slot: SLOT, len(SLOT), self.inbox, self._arrived.set
        )
        for name in NAMES:
            self.cascade.offer(name, 0)
        self.until(lambda: len(self.inbox) == len(NAMES))
        self.inbox.clear()
        for worker in workers:
            assert isinstance(worker.store, FaultyStore)
            worker.store.plan = FaultPlan(hang=worker.name == hangs)

    def until(self, is_done) -> bool:
        """Wait up to ten seconds; shorter if it comes."""
        for _ in range(1000):
            if is_done():
                return True
            self._arrived.wait(0.01)
            self._arrived.clear()
        return False

    def answer(self) -> LookedUp | None:
        """What whoever waits for the look-up was told."""
        messages = [m for m in self.inbox if isinstance(m, LookedUp) and m.ticket == 7]
        assert len(messages) <= 1, "a look-up was answered twice"
        return messages[0] if messages else None

    def recover(self) -> None:
        """Nothing hangs any more."""
        for worker in self.cascade.workers:
            assert isinstance(worker.store, FaultyStore)
            worker.store.plan = FaultPlan()

    def close(self) -> None:
        self.recover()
        self.cascade.close()


def test_nobody_waits_for_a_far_store_once_nearer_ones_have_everything():
    desk = Desk(hangs="far")
    assert desk.cascade.look_up(7, NAMES)
    assert desk.until(lambda: desk.answer() is not None)
    answer = desk.answer()
    assert answer is not None and answer.found == (1, 1, 1)
    desk.close()


def test_a_near_store_is_heard_before_a_far_one_is_read():
    desk = Desk(hangs="near")
    assert desk.cascade.look_up(7, NAMES)
    assert desk.until(
        lambda: any(isinstance(m, LookedUp) and m.found == (2, 2, 2) for m in desk.inbox)
    )
    assert desk.answer() is None
    desk.recover()
    assert desk.until(lambda: desk.answer() is not None)
    answer = desk.answer()
    assert answer is not None and answer.found == (3, 3, 3)
    desk.close()


class SaidToTake:
    """Stores that are expected to answer in `seconds`, and do not."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def estimate_look_up_s(self, num_names: int) -> float:
        return self._seconds

    def look_up(self, ticket: int, names: Sequence[bytes]) -> bool:
        return True

    def refresh(self) -> None:
        pass

    def note_found(self, names: Sequence[bytes], found: Sequence[int]) -> None:
        pass


@pytest.mark.parametrize(("seconds", "is_expected"), [(0.001, True), (0.05, False)])
def test_a_step_waits_only_for_fresh_look_ups_of_prompt_stores(seconds: float, is_expected: bool):
    now_s = 100.0
    host = HostIndex(4, 1, make_policy("lru", 4))
    cascade: Any = SaidToTake(seconds)
    mover: Any = None
    tiers = Tiers(host, 1, 64, mover, saves_early=False, cascade=cascade, clock=lambda: now_s)
    assert not tiers.expects_answers
    ticket = tiers.look_up(NAMES)
    assert ticket is not None and tiers.expects_answers == is_expected
    now_s += PROMPT_ANSWER_S
    assert not tiers.expects_answers and tiers.is_looking(ticket)
    now_s -= PROMPT_ANSWER_S
    tiers.inbox.append(LookedUp(ticket, tuple(NAMES), (0, 0, 0)))
    tiers.poll()
    assert not tiers.expects_answers and not tiers.is_looking(ticket)


def test_a_disk_store_says_at_once_what_it_has_and_nobody_waits(tmp_path: Path):
    inbox: deque[Message] = deque()
    workers = [open_worker(f"file://{tmp_path}/kv?max_bytes=2MiB")]
    arrived = threading.Event()
    slot = memoryview(bytearray(8192))
    cascade = StoreCascade(workers, bytes(16), lambda _: slot, len(slot), inbox, arrived.set)
    cascade.offer(NAMES[0], 0)
    assert arrived.wait(10)
    inbox.clear()
    assert not cascade.look_up(1, NAMES), "it answers later what it could say now"
    assert not inbox
    assert [cascade.where(name) for name in NAMES] == ["disk", None, None]
    store = workers[0].store
    assert isinstance(store, DiskStore)
    with store._lock:  # a thread of the store is at work
        assert cascade.look_up(2, NAMES[1:])
        assert not any(isinstance(m, LookedUp) and m.ticket == 2 for m in inbox)
    until_s = time.monotonic() + 10
    while not any(isinstance(m, LookedUp) and m.ticket == 2 for m in inbox):
        assert time.monotonic() < until_s
        time.sleep(0.001)
    cascade.close()
    assert cascade.workers[0].probe_at_once(NAMES) is None, "a closed store says nothing"
