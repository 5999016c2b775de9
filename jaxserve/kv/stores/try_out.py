"""Asks a store a little before requests do: what loads cost is known then from the first one on.

After a restart the first prompt finds its blocks in the stores. Without measurements it would wait
for them only as long as for a store of which nothing is known, and on busy cores that is too short.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxserve.kv.stores.base import RecordInfo
from jaxserve.kv.stores.tasks import Outcome, Reason
from jaxserve.kv.stores.worker import LEAST_ON_TIME, StoreWorker

_LOG = logging.getLogger(__name__)
_ANY_KEY = bytes(32)
_NUM_SEEN = 1024


def try_out(
    worker: StoreWorker, is_own: Callable[[RecordInfo], bool], most: int, timeout_s: float
) -> None:
    """Ask the store whether it has something, and read some of what it has and drop it.

    Records are read one by one, and then by so many at a time as a sequence would ask for: at most
    `most`. Each in as many calls at once as must come in time for the store to count as reliable.
    Returns once all have been answered, one has failed, or the time is over; answers that come
    later are learnt from, too.

    Args:
        is_own: whether the engine could load a record: it is of its namespace and no longer.
    """
    until_s = time.monotonic() + timeout_s
    probe = _Round(until_s)
    probe.begin(lambda end: worker.submit_probe([_ANY_KEY], end, is_counted=False))
    if not probe.has_gone_well():
        return
    records = [info for info in _sample(worker) if is_own(info)][: LEAST_ON_TIME * most]
    for is_single in (True, False) if records else ():
        num_each = 1 if is_single else worker.piece_records(records[0].num_bytes, most)
        reads = _Round(until_s)
        for start in range(LEAST_ON_TIME):
            part = (records[start::LEAST_ON_TIME] or records)[:num_each]
            keys = [info.block_hash for info in part]
            lengths = [info.num_bytes for info in part]
            reads.begin(
                lambda end, k=keys, n=lengths: worker.submit_read(
                    k, n, _drop, end, is_counted=False
                )
            )
        if not reads.has_gone_well():
            return


def _sample(worker: StoreWorker) -> list[RecordInfo]:
    sample: Callable[[int], list[RecordInfo]] | None = getattr(worker.store, "sample", None)
    if sample is None:  # see OwnBooks
        return []
    try:
        return sample(_NUM_SEEN)
    except Exception as error:
        _LOG.warning("store %s cannot be tried out: %s", worker.name, error)
        return []


def _drop(index: int, record: memoryview) -> None:
    pass


class _Round:
    """Calls at the same time, of which none may be waited for longer than until `until_s`."""

    def __init__(self, until_s: float):
        self._until_s = until_s
        self._is_refused = False
        self._num_begun = 0
        self._outcomes: list[Outcome[Any]] = []
        self._has_come = threading.Condition()

    def begin(self, submit: Callable[[Callable[[Outcome[Any]], None]], object]) -> None:
        if submit(self._end) is None:
            self._is_refused = True
        else:
            self._num_begun += 1

    def _end(self, outcome: Outcome[Any]) -> None:
        with self._has_come:
            self._outcomes.append(outcome)
            self._has_come.notify_all()

    def has_gone_well(self) -> bool:
        """Waits until all calls are over; whether that was in time, and none has failed."""
        if self._is_refused:
            return False
        with self._has_come:
            is_over = self._has_come.wait_for(
                lambda: len(self._outcomes) == self._num_begun,
                max(self._until_s - time.monotonic(), 0.0),
            )
            return is_over and all(outcome.reason is Reason.OK for outcome in self._outcomes)
