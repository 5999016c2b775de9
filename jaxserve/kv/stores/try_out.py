"""Asks a store a little before requests do: what loads cost is known then from the first one on.

After a restart the first prompt finds its blocks in the stores. Without measurements it would wait
for them only as long as for a store of which nothing is known, and on busy cores that is too short.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxserve.errors import StoreError
from jaxserve.kv.stores.base import RecordInfo
from jaxserve.kv.stores.tasks import Outcome
from jaxserve.kv.stores.worker import LEAST_ON_TIME, StoreWorker

_LOG = logging.getLogger(__name__)
_ANY_KEY = bytes(32)


def try_out(worker: StoreWorker, most: int, timeout_s: float) -> None:
    """Ask the store whether it has something, and read some of what it has and drop it.

    Records are read one by one, and then by so many at a time as a sequence would ask for: at most
    `most`. Each in as many calls at once as must come in time for the store to count as reliable.
    Returns once all have been answered, or after the time; later answers are learnt from, too.
    """
    until_s = time.monotonic() + timeout_s
    probe = _Round(until_s)
    probe.begin(lambda callback: worker.submit_probe([_ANY_KEY], callback, is_counted=False))
    if not probe.is_over_in_time():
        return
    sample: Callable[[int], list[RecordInfo]] | None = getattr(worker.store, "sample", None)
    try:
        newest = sample(LEAST_ON_TIME * most) if sample is not None else []  # see OwnBooks
    except StoreError as error:
        _LOG.warning("store %s cannot be tried out: %s", worker.name, error)
        return
    for is_single in (True, False) if newest else ():
        num_each = 1 if is_single else worker.piece_records(newest[0].num_bytes, most)
        reads = _Round(until_s)
        for start in range(LEAST_ON_TIME):
            part = (newest[start::LEAST_ON_TIME] or newest)[:num_each]
            keys = [info.block_hash for info in part]
            lengths = [info.num_bytes for info in part]
            reads.begin(
                lambda end, k=keys, n=lengths: worker.submit_read(
                    k, n, _drop, end, is_counted=False
                )
            )
        if not reads.is_over_in_time():
            return


def _drop(index: int, record: memoryview) -> None:
    pass


class _Round:
    """Calls at the same time, of which none may be waited for longer than until `until_s`."""

    def __init__(self, until_s: float):
        self._until_s = until_s
        self._num_begun = 0
        self._answered = threading.Semaphore(0)

    def begin(self, submit: Callable[[Callable[[Outcome[Any]], None]], object]) -> None:
        if submit(lambda outcome: self._answered.release()) is not None:
            self._num_begun += 1

    def is_over_in_time(self) -> bool:
        return all(
            self._answered.acquire(timeout=max(self._until_s - time.monotonic(), 0.0))
            for _ in range(self._num_begun)
        )
