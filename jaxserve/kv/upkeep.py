"""Upkeep of stores: reading every record, removing, listing. Blocking; for a thread of its own.

Reads go through the store's worker, a few records at a time, so that serving goes on beside them.
Works on the stores of a running engine and on a store that nobody serves from. Knows nothing of
pages, slots, engines or jax.
"""

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import NO_TENANT, Verdict, check, read_header, unseal
from jaxserve.kv.keys import KeyFolder
from jaxserve.kv.reports import DAMAGE, UNREADABLE, BlockEntry, StoreCheck, StoreErasure
from jaxserve.kv.stores.base import EraseCount, RecordInfo, Store
from jaxserve.kv.stores.tasks import Outcome, Reason, Task
from jaxserve.kv.stores.worker import StoreWorker

READ_RECORDS = 8
READ_TIMEOUT_S = 60.0
T = TypeVar("T")

Submit = Callable[[Callable[[Outcome[T]], None]], Task | None]


def wait_for(submit: Submit[T]) -> Outcome[T] | None:
    """Submit a call to a worker and wait for its outcome; None if it was refused."""
    ended = threading.Event()
    outcomes: list[Outcome[T]] = []

    def callback(outcome: Outcome[T]) -> None:
        outcomes.append(outcome)
        ended.set()

    if submit(callback) is None:
        return None
    ended.wait()
    return outcomes[0]


def verify_store(
    worker: StoreWorker,
    *,
    namespace: bytes | None = None,
    payload_bytes: int = 0,
    keys: KeyFolder | None = None,
    is_just_opened: bool = False,
    progress: Callable[[int], object] = lambda num_records: None,
) -> StoreCheck:
    """Read and check every record; delete what is damaged.

    Without the tenants' keys encrypted records are checked by their checksums alone.

    Args:
        namespace, payload_bytes: what records of this namespace must hold, if one is known.
        is_just_opened: what the store found damaged when it was opened is part of the report.
        progress: told how many records have been read so far.
    """
    start_s, verdicts = time.monotonic(), Counter[str]()
    own_before = _found_by_itself(worker.store)
    at_opening = own_before if is_just_opened else 0
    damaged: list[BlockHash] = []
    num_records = num_bytes = num_gone = 0
    error = ""
    reader = _Reader(worker, namespace, payload_bytes, keys)
    records = scan(worker)
    try:
        while batch := list(itertools.islice(records, READ_RECORDS)):
            found = reader.read(batch)
            for info, verdict in zip(batch, found, strict=True):
                if verdict is None:
                    num_gone += 1
                    continue
                num_records, num_bytes = num_records + 1, num_bytes + info.num_bytes
                verdicts[verdict] += 1
                if verdict in DAMAGE or verdict == UNREADABLE:
                    damaged.append(info.block_hash)
            progress(num_records)
    except StoreError as failure:
        error = str(failure)
    num_own = min(num_gone, _found_by_itself(worker.store) - own_before)
    if num_own:
        verdicts[Verdict.CORRUPT.value] += num_own
        num_gone -= num_own
    if at_opening:
        verdicts[Verdict.CORRUPT.value] += at_opening
    if is_just_opened and not error:
        error = _lost_files(worker.store)
    num_own += at_opening
    num_deleted = num_own
    if damaged:
        erasure = remove(worker, lambda store: store.delete(damaged))
        num_deleted, error = num_deleted + erasure.num_records, error or erasure.error
    return StoreCheck(
        worker.name,
        num_records,
        num_bytes,
        dict(verdicts),
        num_gone,
        len(damaged) + num_own,
        num_deleted,
        time.monotonic() - start_s,
        error,
    )


def _found_by_itself(store: Store) -> int:
    """Damaged records that the store noticed, and gave up, when it was asked for them."""
    stats = getattr(store, "stats", None)
    counts = None if stats is None else stats()
    return getattr(counts, "num_corrupt", 0) + getattr(counts, "num_io_errors", 0)


def _lost_files(store: Store) -> str:
    counts = getattr(store, "stats", lambda: None)()
    count = getattr(counts, "num_lost_files", 0)
    return f"files that were of no use any more, with all in them: {count}" if count else ""


class _Reader:
    """Reads batches of records; one at a time, so one output buffer is enough."""

    def __init__(
        self,
        worker: StoreWorker,
        namespace: bytes | None,
        payload_bytes: int,
        keys: KeyFolder | None,
    ):
        self._worker = worker
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._keys = keys
        self._out = bytearray()

    def read(self, infos: Sequence[RecordInfo]) -> list[str | None]:
        """For each record what its check says; None: it is not there any more.

        Raises:
            StoreError: the store does not answer.
        """
        verdicts: list[str | None] = [None] * len(infos)
        names = [info.block_hash for info in infos]

        def consume(index: int, record: memoryview) -> None:
            verdicts[index] = self._judge(record, infos[index]).value

        outcome = wait_for(
            lambda callback: self._worker.submit_read(
                names, [info.num_bytes for info in infos], consume, callback, READ_TIMEOUT_S
            )
        )
        _check(self._worker, outcome)
        missing = [index for index, verdict in enumerate(verdicts) if verdict is None]
        if missing:
            asked = [names[index] for index in missing]
            probed = wait_for(
                lambda callback: self._worker.submit_probe(asked, callback, READ_TIMEOUT_S)
            )
            for index, is_there in zip(missing, _check(self._worker, probed).values, strict=True):
                if is_there:
                    verdicts[index] = UNREADABLE
        return verdicts

    def _judge(self, record: memoryview, info: RecordInfo) -> Verdict:
        header, now_s = read_header(record), time.time()
        if header is None:
            return check(record, now_s)
        own = header.info
        if own.block_hash != info.block_hash:
            return Verdict.WRONG_BLOCK
        if own.namespace != info.namespace:
            return Verdict.WRONG_NAMESPACE
        if own.tenant != info.tenant:
            return Verdict.WRONG_TENANT
        is_ours = self._namespace is not None and own.namespace == self._namespace
        if is_ours and header.payload_bytes != self._payload_bytes:
            return Verdict.WRONG_SIZE
        verdict = check(record, now_s)
        if verdict is not Verdict.OK or self._keys is None:
            return verdict
        if not header.encrypted:
            return Verdict.NOT_ENCRYPTED if is_ours else Verdict.OK
        key = self._keys.find(own.tenant)
        if key is None:
            return Verdict.NO_KEY
        if len(self._out) < header.payload_bytes:
            self._out = bytearray(header.payload_bytes)
        out = memoryview(self._out)[: header.payload_bytes]
        return unseal(record, own.block_hash, own.namespace, own.tenant, out, now_s=now_s, key=key)


def read_payload(
    worker: StoreWorker,
    name: BlockHash,
    record_bytes: int,
    payload_bytes: int,
    namespace: bytes,
    tenant: bytes,
    keys: KeyFolder | None,
) -> bytearray | None:
    """The checked payload of one record; None if it cannot be had."""
    out, verdicts = bytearray(payload_bytes), list[Verdict]()
    key = keys.find(tenant) if keys is not None else None
    if keys is not None and key is None:
        return None

    def consume(index: int, record: memoryview) -> None:
        verdicts.append(
            unseal(record, name, namespace, tenant, memoryview(out), now_s=time.time(), key=key)
        )

    wait_for(lambda done: worker.submit_read([name], [record_bytes], consume, done, READ_TIMEOUT_S))
    return out if verdicts == [Verdict.OK] else None


def is_encrypted(worker: StoreWorker) -> bool:
    """Whether the first record that belongs to a tenant, and can be read, is encrypted.

    Raises:
        StoreError: the store cannot be listed, or does not answer.
    """
    found: list[bool] = []

    def consume(index: int, record: memoryview) -> None:
        header = read_header(record)
        found.extend([header.encrypted] if header is not None else [])

    for info in scan(worker):
        if info.tenant == NO_TENANT:
            continue
        names, lengths = [info.block_hash], [info.num_bytes]
        _check(
            worker,
            wait_for(
                lambda done, names=names, lengths=lengths: worker.submit_read(
                    names, lengths, consume, done, READ_TIMEOUT_S
                )
            ),
        )
        if found:
            return found[0]
    return False


def probe(worker: StoreWorker, names: Sequence[BlockHash]) -> set[BlockHash] | None:
    """Which of these blocks a store has; None if it does not say."""
    if not names:
        return set()
    outcome = wait_for(lambda done: worker.submit_probe(names, done))
    if outcome is None or outcome.reason is not Reason.OK:
        return None
    return {name for name, is_there in zip(names, outcome.values, strict=True) if is_there}


def remove(worker: StoreWorker, operation: Callable[[Store], EraseCount]) -> StoreErasure:
    """Run a deletion, after all writes that the worker was given before."""
    return erasure_of(worker, wait_for(lambda done: worker.submit_alone(operation, done)))


def erasure_of(worker: StoreWorker, outcome: Outcome[EraseCount] | None) -> StoreErasure:
    """What a deletion's outcome means."""
    if outcome is None:
        return StoreErasure(worker.name, 0, 0, "the store is closing")
    if not outcome.values:
        why = outcome.error or outcome.reason
        return StoreErasure(worker.name, 0, 0, f"the store did not confirm: {why}")
    (count,) = outcome.values
    return StoreErasure(worker.name, count.num_records, count.num_bytes)


def scan(worker: StoreWorker) -> Iterator[RecordInfo]:
    """Every record of a store.

    Raises:
        StoreError: it cannot be listed, whatever the reason.
    """
    if worker.estimate_probe_s(1) == math.inf:  # else this thread might wait for it for ever
        raise StoreError(f"The store {worker.name} takes no reads now; try again later.")
    try:
        yield from worker.store.scan()
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"The store {worker.name} cannot be listed: {error}") from error


def entry_of(info: RecordInfo, tiers: Sequence[str], namespace: bytes | None) -> BlockEntry:
    """A record as an entry of a list."""
    return BlockEntry(
        info.block_hash.hex(),
        tuple(tiers),
        info.num_bytes,
        info.created_s,
        info.expires_s,
        "" if info.tenant == NO_TENANT else info.tenant.hex(),
        namespace is None or info.namespace == namespace,
        info.is_pinned,
    )


def _check(worker: StoreWorker, outcome: Outcome[T] | None) -> Outcome[T]:
    if outcome is None:
        raise StoreError(f"The store {worker.name} takes no reads now; try again later.")
    if outcome.reason is not Reason.OK:
        why = outcome.error.rstrip(".") or outcome.reason
        raise StoreError(f"The store {worker.name} did not answer: {why}.")
    return outcome
