"""What a `StoreWorker` has in hand: calls, the lanes they wait in, and how they ended.

A task's life, all changes under the worker's lock:

    QUEUED --> RUNNING <--> HANDOVER --> DONE       HANDOVER: the caller's memory is in use
       |          |
       |          +--> ABANDONED                    too late or cancelled; the thread is still away
       +--> DONE                                    cancelled, too late, or refused after all

A lane's fields change under its worker's lock. Knows nothing of stores, time or what a task does.
"""

import enum
import mmap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PAGE_BYTES = 4096
"""Records end at multiples of this in a scratch: what follows a record's short header is aligned,
so a store may use direct I/O from it."""


class Reason(enum.StrEnum):
    """How a call ended. The outcome's values hold in any case; what is unknown is a miss."""

    OK = "ok"
    FAILED = "failed"  # the store raised
    TIMEOUT = "timeout"
    REFUSED = "refused"  # the breaker opened while it waited
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a callback receives.

    Attributes:
        values: one for each key or record, in order: bool of a probe, bytes read of a get,
            PutStatus of a put; the operation's own result for `submit_alone`.
        reason: how the call ended.
        seconds: from submission to now.
        error: what the store said, if it raised.
    """

    values: list[T]
    reason: Reason
    seconds: float
    error: str = ""


class TaskState(enum.Enum):
    """See the module's drawing."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    HANDOVER = enum.auto()
    ABANDONED = enum.auto()
    DONE = enum.auto()


class Operation(enum.StrEnum):
    """What is asked of the store."""

    PROBE = "probe"
    GET = "get"
    PUT = "put"
    ALONE = "alone"


@dataclass(slots=True, eq=False)
class Task:
    """One call.

    `run` does it on a worker's thread and says whether it came to the end in time; `values` begin
    as all misses and are filled in as it goes on; a trial only asks whether the store is back. One
    that is not counted serves no request, so it is not in the statistics.
    """

    operation: Operation
    run: Callable[["Task", "Scratch"], bool]
    callback: Callable[[Outcome[Any]], None] | None
    values: list[Any]
    num_bytes: int
    submitted_s: float
    deadline_s: float
    moved_bytes: int = 0
    is_trial: bool = False
    is_counted: bool = True
    error: str = ""
    on_late: Callable[[float], None] | None = None
    """Told the seconds when the call is given up as too late while it runs."""
    state: TaskState = TaskState.QUEUED

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in (TaskState.ABANDONED, TaskState.DONE)


class Lane:
    """The tasks of one kind of thread: a queue, and who is out.

    Args:
        name: for threads and messages.
        num_threads: how many serve it.
        lock: the worker's.
    """

    def __init__(self, name: str, num_threads: int, lock: threading.Lock):
        self.name = name
        self.num_threads = num_threads
        self.ready = threading.Condition(lock)
        self.queues: tuple[deque[Task], deque[Task]] = (deque(), deque())  # probes, all others
        self.queued_bytes = 0
        self.num_queued = 0
        self.running: set[Task] = set()  # abandoned ones included: their threads are away
        self.is_alone = False
        """Whether a task that tolerates no other in its lane is running."""

    @property
    def running_bytes(self) -> int:
        """Bytes of the calls that threads are busy with and somebody waits for."""
        return sum(task.num_bytes for task in self.running if not task.is_over)

    @property
    def num_running(self) -> int:
        """Calls that threads are busy with and somebody waits for."""
        return sum(not task.is_over for task in self.running)

    @property
    def num_stuck(self) -> int:
        """Threads that are in a call nobody waits for any more."""
        return sum(task.state is TaskState.ABANDONED for task in self.running)

    @property
    def is_stuck(self) -> bool:
        """Whether no thread is left to serve anybody."""
        return self.num_stuck >= self.num_threads

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self.num_queued and not self.running

    def push(self, task: Task) -> None:
        """Queue a task and wake a thread."""
        self.queues[task.operation is not Operation.PROBE].append(task)
        self.queued_bytes += task.num_bytes
        self.num_queued += 1
        self.ready.notify()

    def pop(self) -> Task | None:
        """The next task that may start now, now RUNNING."""
        if self.is_alone:
            return None
        for queue in self.queues:
            if not queue:
                continue
            if queue[0].operation is Operation.ALONE and self.running:
                return None
            task = queue.popleft()
            self._account_left(task)
            task.state = TaskState.RUNNING
            self.running.add(task)
            self.is_alone = task.operation is Operation.ALONE
            return task
        return None

    def withdraw(self, task: Task) -> None:
        """A queued task is not to be started; whoever calls this reports it."""
        assert task.state is TaskState.QUEUED
        self.queues[task.operation is not Operation.PROBE].remove(task)
        task.state = TaskState.DONE
        self._account_left(task)

    def returned(self, task: Task) -> None:
        """The task's thread is back."""
        self.running.discard(task)
        self.is_alone = False
        if self.queues[1] and not self.running:
            self.ready.notify_all()  # one that waited to be alone may start, or all behind it

    def waiting(self) -> list[Task]:
        """Every queued task, in order."""
        return [task for queue in self.queues for task in queue]

    def _account_left(self, task: Task) -> None:
        self.queued_bytes -= task.num_bytes
        self.num_queued -= 1


@dataclass(slots=True)
class Scratch:
    """Page-aligned memory of one worker thread; a store sees no other."""

    num_bytes: int
    memory: mmap.mmap | None = field(default=None, repr=False)

    def views(self, lengths: Sequence[int]) -> list[memoryview]:
        """Writable views of these lengths; valid until the next call. Grows if it must."""
        stride = [-(-length // PAGE_BYTES) * PAGE_BYTES for length in lengths]
        total = max(sum(stride), PAGE_BYTES)
        if self.memory is None or len(self.memory) < total:
            self.memory = mmap.mmap(-1, max(total, self.num_bytes))
        whole = memoryview(self.memory)
        views, start = [], 0
        for length, step in zip(lengths, stride, strict=True):
            start += step
            views.append(whole[start - length : start])
        return views


def batches(lengths: Sequence[int], max_bytes: int) -> list[range]:
    """Cut a sequence into runs that fit into a scratch; a longer item makes a run of its own."""
    runs, start, total = [], 0, 0
    for index, length in enumerate(lengths):
        step = -(-length // PAGE_BYTES) * PAGE_BYTES
        if index > start and total + step > max_bytes:
            runs.append(range(start, index))
            start, total = index, 0
        total += step
    if start < len(lengths):
        runs.append(range(start, len(lengths)))
    return runs
