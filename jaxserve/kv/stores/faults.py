"""A store that misbehaves on purpose, for tests and benchmarks.

Every fault can be changed while it runs (`plan`), and is drawn from a seeded generator. Knows
nothing of what records hold: it spoils bytes blindly.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.stores.base import (
    EraseCount,
    PutStatus,
    RecordInfo,
    SealedRecord,
    Store,
    StoreUsage,
)

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What goes wrong; the default is nothing.

    Attributes:
        latency_s: added to each call.
        bytes_per_s: no more than this is read or written by one call; 0 is no limit.
        error_rate: share of calls that raise StoreError.
        hang: calls do not return before `release`, or another plan.
        flap_s: works this long, then fails this long, and so on; 0: does not flap.
        corrupt_rate: share of records read in which one byte is wrong.
        seed: of everything drawn.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    error_rate: float = 0.0
    hang: bool = False
    flap_s: float = 0.0
    corrupt_rate: float = 0.0
    seed: int = 0


class FaultyStore:
    """Another store behind faults.

    Args:
        inner: the store; closed with this one.
        plan: what goes wrong at first.
        clock, sleep: in seconds; tests put their own.
    """

    def __init__(
        self,
        inner: Store,
        plan: FaultPlan | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.name = inner.name
        self.num_calls = 0
        self._inner = inner
        self._plan = plan or FaultPlan()
        self._clock = clock
        self._sleep = sleep
        self._began_s = clock()
        self._random = random.Random(self._plan.seed)
        self._lock = threading.Lock()
        self._may_go = threading.Event()

    @property
    def plan(self) -> FaultPlan:
        """What goes wrong now; a new plan frees the calls that hang."""
        return self._plan

    @plan.setter
    def plan(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._random.seed(plan.seed)
        self._began_s = self._clock()
        self.release()

    def release(self) -> None:
        """Let the calls that hang now go on."""
        may_go, self._may_go = self._may_go, threading.Event()
        may_go.set()

    def probe(self, keys: Sequence[BlockHash]) -> list[bool]:
        self._suffer(0)
        return self._inner.probe(keys)

    def get(self, keys: Sequence[BlockHash], buffers: Sequence[memoryview]) -> list[int]:
        self._suffer(0)
        lengths = self._inner.get(keys, buffers)
        for buffer, num_bytes in zip(buffers, lengths, strict=True):
            if num_bytes and self._happens(self._plan.corrupt_rate):
                with self._lock:
                    buffer[self._random.randrange(num_bytes)] ^= 1 << self._random.randrange(8)
        self._transfer(sum(lengths))
        return lengths

    def put(self, records: Sequence[SealedRecord]) -> list[PutStatus]:
        self._suffer(sum(record.info.num_bytes for record in records))
        return self._inner.put(records)

    def delete(self, keys: Sequence[BlockHash]) -> EraseCount:
        self._suffer(0)
        return self._inner.delete(keys)

    def delete_tenant(self, tenant: bytes) -> EraseCount:
        self._suffer(0)
        return self._inner.delete_tenant(tenant)

    def delete_namespaces(self, keep: bytes | None = None) -> EraseCount:
        self._suffer(0)
        return self._inner.delete_namespaces(keep)

    def pin(self, keys: Sequence[BlockHash], pinned: bool) -> int:
        self._suffer(0)
        return self._inner.pin(keys, pinned)

    def sweep(self) -> EraseCount:
        self._suffer(0)
        return self._inner.sweep()

    def scan(self) -> Iterator[RecordInfo]:
        self._suffer(0)
        return self._inner.scan()

    def sample(self, count: int) -> list[RecordInfo]:
        sample = getattr(self._inner, "sample", None)  # see OwnBooks
        return sample(count) if sample is not None else []

    def usage(self) -> StoreUsage:
        return self._inner.usage()

    def flush(self) -> None:
        self._suffer(0)
        self._inner.flush()

    def close(self) -> None:
        self.release()
        self._inner.close()

    def _suffer(self, num_bytes: int) -> None:
        may_go = self._may_go  # before the plan: a new plan frees whoever has seen the old one
        plan = self._plan
        self.num_calls += 1
        if plan.hang:
            may_go.wait()
        if plan.latency_s:
            self._sleep(plan.latency_s)
        self._transfer(num_bytes)
        is_down = plan.flap_s and int((self._clock() - self._began_s) / plan.flap_s) % 2 == 1
        if is_down or self._happens(plan.error_rate):
            raise StoreError(f"store {self.name} fails as planned")

    def _transfer(self, num_bytes: int) -> None:
        if self._plan.bytes_per_s and num_bytes:
            self._sleep(num_bytes / self._plan.bytes_per_s)

    def _happens(self, rate: float) -> bool:
        with self._lock:
            return rate > 0 and self._random.random() < rate
