"""Runs tasks on the threads of two lanes: each task has a deadline, each lane a breaker.

Submitting never blocks. A call that is late is ended by the watch thread while its own thread is
still away; a lane whose threads are all away refuses what comes. When a breaker opens, what is
queued in its lane ends at once. Loads are tried again by a trial of the dispatcher's own, so no
request has to wait for it; writes, for which nobody waits, by the next one that comes.

Owns its threads, lanes and breakers. Knows nothing of stores, records or what tasks do.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxserve.kv.stores.base import PutStatus
from jaxserve.kv.stores.breaker import BreakerState, CircuitBreaker
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.stats import StatsCounter
from jaxserve.kv.stores.tasks import Lane, Operation, Outcome, Reason, Scratch, Task, TaskState

_LOG = logging.getLogger(__name__)


class Dispatcher:
    """The threads of one worker. All methods may be called from any thread.

    Args:
        name: of the store, for threads and messages.
        limits: of the worker.
        clock: seconds, never going back.
        ask: one small question to the store; raises if it cannot answer.
        sweep: housekeeping, done on a write thread every `sweep_s`.
        stats: counters, mutated under this object's lock.
    """

    def __init__(
        self,
        name: str,
        limits: WorkerLimits,
        clock: Callable[[], float],
        ask: Callable[[], object],
        sweep: Callable[[], object],
        stats: StatsCounter,
    ):
        self.name = name
        self.lock = threading.Lock()
        self.loads = Lane("load", limits.num_load_threads, self.lock)
        self.writes = Lane("write", limits.num_write_threads, self.lock)
        backoff = (limits.max_failures, limits.min_backoff_s, limits.max_backoff_s, clock)
        self.breakers = {lane.name: CircuitBreaker(*backoff) for lane in (self.loads, self.writes)}
        self._limits = limits
        self._clock = clock
        self._ask = ask
        self._sweep = sweep
        self._sweep_at_s = clock() + limits.sweep_s
        self._stats = stats
        self._watch = threading.Condition(self.lock)
        self._pending: set[Task] = set()  # whose deadline is watched
        self._wake_at_s = math.inf
        self._openings: list[str] = []  # messages to be logged outside the lock
        self._is_closing = self._is_closed = False
        self._threads = [
            threading.Thread(
                target=self._serve, args=(lane,), name=f"{name}-{lane.name}-{i}", daemon=True
            )
            for lane in (self.loads, self.writes)
            for i in range(lane.num_threads)
        ]
        self._threads.append(
            threading.Thread(target=self._watch_deadlines, name=f"{name}-watch", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    def now_s(self) -> float:
        """The dispatcher's clock."""
        return self._clock()

    def takes_loads(self) -> bool:
        """Whether a load would be tried now. Needs the lock."""
        is_able = self.breakers["load"].is_closed and not self.loads.is_stuck
        return is_able and not self._is_closing

    def submit(self, task: Task) -> bool:
        """Queue a task, unless its lane cannot serve it; needs the lock.

        Deletions (`Operation.ALONE`) are tried whatever the breaker says.
        """
        lane = self._lane_of(task)
        if self._is_closing:
            return False
        if task.operation is not Operation.ALONE:
            breaker = self.breakers[lane.name]
            is_trial = lane is self.writes and breaker.is_due
            if lane.is_stuck or not (breaker.is_closed or is_trial):
                return False
            if is_trial:
                breaker.begin_trial()
                task.is_trial = True
        self._queue(lane, task)
        return True

    def cancel(self, task: Task) -> bool:
        """Give a call up; False if it is over, or so nearly that its callback is coming at once."""
        with self.lock:
            if task.is_over or task.state is TaskState.HANDOVER:
                return False
            if task.state is TaskState.QUEUED:
                lane = self._lane_of(task)
                lane.withdraw(task)
                if task.is_trial:
                    self.breakers[lane.name].abort_trial()
                self._pending.discard(task)
            else:
                task.state = TaskState.ABANDONED  # still watched: a hung store must not go unseen
            self._stats.cancelled += 1
            return True

    def begin_handover(self, task: Task) -> bool:
        """Claim the caller's memory, unless the call was given up."""
        with self.lock:
            if task.state is TaskState.RUNNING:
                task.state = TaskState.HANDOVER
            return task.state is TaskState.HANDOVER

    def end_handover(self, task: Task) -> None:
        """Let go of the caller's memory for a while."""
        with self.lock:
            task.state = TaskState.RUNNING

    def has_time(self, task: Task) -> bool:
        """Whether somebody still waits for the call and its deadline has not passed."""
        return not task.is_over and self._clock() < task.deadline_s

    def check_deadlines(self) -> None:
        """End what is too late, and try loads again if they are due; the watch thread does this."""
        with self.lock:
            now_s = self._clock()
            ended: list[_Ended] = []
            for task in [t for t in self._pending if t.deadline_s <= now_s]:
                if task.state is not TaskState.HANDOVER:  # else its own thread ends it
                    ended += self._end_late(task, now_s)
            breaker = self.breakers["load"]
            if breaker.is_due and not self._is_closing:
                breaker.begin_trial()
                self._queue(self.loads, self._own(self._ask, Operation.PROBE, is_trial=True))
            if now_s >= self._sweep_at_s and not self._is_closing:
                self._sweep_at_s = now_s + self._limits.sweep_s
                if self.breakers["write"].is_closed and not self.writes.is_stuck:
                    self._queue(self.writes, self._own(self._sweep, Operation.ALONE))
        self._report(ended)

    def close(self, until_s: float) -> bool:
        """Finish queued writes, give up loads, end the threads; until then on `time.monotonic`.

        Returns:
            Whether all writes were finished and all threads have ended.
        """
        with self.lock:
            self._is_closing = True
            ended = self._withdraw_all(self.loads, Reason.CLOSED)
        self._report(ended)
        with self._watch:
            self._watch.wait_for(
                lambda: self.writes.is_idle or self.writes.is_stuck,
                max(until_s - time.monotonic(), 0),
            )
            is_done = self.writes.is_idle
            ended = self._withdraw_all(self.writes, Reason.CLOSED)
            for task in list(self._pending):
                if task.state is TaskState.RUNNING:
                    ended.append(self._end(task, TaskState.ABANDONED, Reason.CLOSED))
                task.deadline_s = -math.inf  # of one in its hand-over: no further step
            self._is_closed = True
            self._watch.notify_all()
            for lane in (self.loads, self.writes):
                lane.ready.notify_all()
        self._report(ended)
        for thread in self._threads:
            thread.join(max(until_s - time.monotonic(), 0))
        return is_done and not any(thread.is_alive() for thread in self._threads)

    @property
    def is_running(self) -> bool:
        """Whether any thread is left."""
        return any(thread.is_alive() for thread in self._threads)

    # The threads.

    def _serve(self, lane: Lane) -> None:
        scratch = Scratch(self._limits.scratch_bytes)
        while True:
            with self.lock:
                while (task := lane.pop()) is None:
                    if self._is_closed:
                        return
                    lane.ready.wait()
            try:
                reason = Reason.OK if task.run(task, scratch) else Reason.TIMEOUT
            except Exception as error:
                reason = Reason.FAILED
                task.error = " ".join(str(error).split())[:300]
                _LOG.warning("store %s: %s failed: %s", self.name, task.operation, task.error)
            with self.lock:
                ended = []
                was_watched = task in self._pending
                if not task.is_over:
                    ended.append(self._end(task, TaskState.DONE, reason))
                if was_watched:  # else it was judged when it became late
                    self._pending.discard(task)
                    ended += self._judge(lane, task, reason)
                lane.returned(task)
                if lane.is_idle:
                    self._watch.notify_all()
            self._report(ended)
            del task, ended  # and with them the caller's memory

    def _watch_deadlines(self) -> None:
        while True:
            self.check_deadlines()
            with self._watch:
                if self._is_closed:
                    return
                self._wake_at_s = self._sweep_at_s
                if self._pending:
                    earliest_s = min(task.deadline_s for task in self._pending)
                    self._wake_at_s = min(self._wake_at_s, earliest_s)
                breaker = self.breakers["load"]
                if breaker.state is BreakerState.OPEN:
                    self._wake_at_s = min(self._wake_at_s, breaker.retry_at_s)
                wait_s = self._wake_at_s - self._clock()
                # Not positive while a task is in its hand-over at its deadline.
                self._watch.wait(min(max(wait_s, 0.01), 3600.0))

    def _own(
        self, call: Callable[[], object], operation: Operation, is_trial: bool = False
    ) -> Task:
        """A call that nobody asked for."""

        def run(task: Task, scratch: Scratch) -> bool:
            call()
            return True

        now_s, limits = self._clock(), self._limits
        timeout_s = limits.probe_timeout_s if is_trial else limits.alone_timeout_s
        until_s = now_s + timeout_s
        return Task(
            operation, run, None, [], 0, now_s, until_s, is_trial=is_trial, is_counted=False
        )

    # Under the lock.

    def _lane_of(self, task: Task) -> Lane:
        is_load = task.operation in (Operation.PROBE, Operation.GET)
        return self.loads if is_load else self.writes

    def _queue(self, lane: Lane, task: Task) -> None:
        self._pending.add(task)
        lane.push(task)
        if task.deadline_s < self._wake_at_s:
            self._watch.notify_all()

    def _end_late(self, task: Task, now_s: float) -> list["_Ended"]:
        lane = self._lane_of(task)
        if task.state is TaskState.QUEUED:
            was_stuck = lane.is_stuck
            lane.withdraw(task)
            ended = [self._end(task, TaskState.DONE, Reason.TIMEOUT)]
            # Waiting for one's turn is no fault of the store, unless nobody can take a turn.
            is_fault = was_stuck or task.is_trial
            return ended + (self._judge(lane, task, Reason.TIMEOUT) if is_fault else [])
        ended = []
        if task.state is TaskState.RUNNING:
            ended.append(self._end(task, TaskState.ABANDONED, Reason.TIMEOUT))
            if task.on_late is not None:
                task.on_late(now_s - task.submitted_s)
        self._pending.discard(task)  # or it was cancelled before, and its thread is still away
        return ended + self._judge(lane, task, Reason.TIMEOUT)

    def _judge(self, lane: Lane, task: Task, reason: Reason) -> list["_Ended"]:
        """Tell the breaker how a call went; if that opens it, nothing queued has to wait for it."""
        if task.operation is Operation.ALONE:
            return []
        breaker = self.breakers[lane.name]
        is_put = task.operation is Operation.PUT and bool(task.values)
        nothing_stored = is_put and all(status is PutStatus.FAILED for status in task.values)
        if reason is Reason.OK and not nothing_stored:
            breaker.succeed(is_trial=task.is_trial)
            return []
        if not breaker.fail(is_trial=task.is_trial):
            return []
        if breaker.was_trusted:
            wait_s = breaker.retry_at_s - self._clock()
            self._openings.append(
                f"store {self.name}: {lane.name}s are off for {wait_s:.1f} s, and for longer after "
                "each try that fails"
            )
        self._watch.notify_all()
        return self._withdraw_all(lane, Reason.REFUSED)

    def _withdraw_all(self, lane: Lane, reason: Reason) -> list["_Ended"]:
        ended = []
        for task in lane.waiting():
            if task.operation is not Operation.ALONE or reason is Reason.CLOSED:
                lane.withdraw(task)
                if task.is_trial:
                    self.breakers[lane.name].abort_trial()
                ended.append(self._end(task, TaskState.DONE, reason))
        return ended

    def _end(self, task: Task, state: TaskState, reason: Reason) -> "_Ended":
        task.state = state
        self._pending.discard(task)
        seconds = self._clock() - task.submitted_s
        if task.is_counted:
            self._stats.ended(task, reason, seconds)
        return _Ended(task, Outcome(list(task.values), reason, seconds, task.error))

    # Outside the lock.

    def _report(self, ended: list["_Ended"]) -> None:
        while self._openings:
            _LOG.warning(self._openings.pop())
        for one in ended:
            if one.task.callback is None:
                continue
            try:
                one.task.callback(one.outcome)
            except Exception:
                _LOG.exception("store %s: a callback raised", self.name)


@dataclass(frozen=True, slots=True)
class _Ended:
    task: Task
    outcome: Outcome[Any]
