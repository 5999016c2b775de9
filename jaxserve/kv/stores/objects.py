"""A store of one object per record in S3, GCS, memory or a plain folder, through tensorstore.

    <prefix>/<tenant>/<namespace>/<block hash>.<bytes>.<created ms>.<expires ms>
    <prefix>/pins/<block hash>

All that is known of a record is in its name, so the books (`Ledger`) are made by one listing when
the store is opened, and again every `refresh_s`, which finds what other processes wrote or
deleted. What they wrote since is a miss until then; what they deleted is a miss at the read. The
bound holds for what the books know.

If the listing at open fails, the store begins without books: every call tries again, and raises
`StoreError` while it fails. Knows nothing of what a record holds.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.copying import copy_into
from jaxserve.kv.envelope import has_expired
from jaxserve.kv.stores.base import EraseCount, PutStatus, RecordInfo, SealedRecord, StoreUsage
from jaxserve.kv.stores.ledger import Grant, Ledger

_LOG = logging.getLogger(__name__)
_NAME = re.compile(rb"([0-9a-f]{32})/([0-9a-f]{32})/([0-9a-f]{64})\.(\d+)\.(\d+)\.(\d+)")
_PINS = "pins/"


class KeyValues(Protocol):
    """What is used of a tensorstore `KvStore`, and what a test may put in its place."""

    def read(self, key: str) -> Any: ...
    def write(self, key: str, value: bytes | None) -> Any: ...
    def list(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class ObjectOptions:
    """How an object store behaves, whatever its driver.

    Attributes:
        max_bytes: bound of its records; 0 leaves the bound to the bucket.
        policy: replacement policy, as in `make_policy`.
        ttl_s: a record expires this long after it was made, or earlier if it says so; 0: never.
        timeout_s: of one call, all its requests together.
        refresh_s: how often the books are compared with a listing; 0: only at open.
    """

    max_bytes: int = 0
    policy: str = "lru"
    ttl_s: float = 0.0
    timeout_s: float = 10.0
    refresh_s: float = 300.0


class ObjectStore:
    """One bucket, folder or piece of memory. See the module and `Store`.

    Args:
        name: for metrics.
        open_kv: opens the key-value store; called again while it fails.
        options: bounds and times.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        name: str,
        open_kv: Callable[[], KeyValues],
        options: ObjectOptions | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.name = name
        self._options = options or ObjectOptions()
        self._open_kv = open_kv
        self._clock = clock
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._kv: KeyValues | None = None
        self._ledger = Ledger(self._options.max_bytes, self._options.policy, clock)
        self._listing: Any = None  # a listing under way
        self._listing_known: set[BlockHash] = set()
        self._listed_at_s = 0.0
        self._deletes: list[Any] = []  # under way, waited for by nobody: see `_adopt`
        try:
            self._opened()
        except StoreError as error:
            _LOG.warning("store %s is not there yet: %s", name, error)

    def probe(self, keys: Sequence[BlockHash]) -> list[bool]:
        self._opened()
        self._refresh()
        with self._lock:
            return [self._ledger.find(key) is not None for key in keys]

    def get(self, keys: Sequence[BlockHash], buffers: Sequence[memoryview]) -> list[int]:
        kv = self._opened()
        until_s = self._until()
        with self._lock:
            infos = [self._ledger.find(key) for key in keys]
        reads = [
            kv.read(_name(info)) if info is not None and info.num_bytes <= len(buffer) else None
            for info, buffer in zip(infos, buffers, strict=True)
        ]
        lengths = [0] * len(keys)
        error, num_answered = None, 0
        for index in reversed(range(len(keys))):  # the policy hears of a sequence suffix first
            info, read = infos[index], reads[index]
            if info is None or read is None:
                continue
            try:
                value = self._wait(read, until_s).value
            except StoreError as raised:
                error = raised
                continue
            num_answered += 1
            if len(value) == info.num_bytes:
                copy_into(buffers[index][: len(value)], memoryview(value))
                lengths[index] = len(value)
            with self._lock:
                if lengths[index]:
                    self._ledger.touch(keys[index])
                else:  # somebody else deleted or damaged it
                    self._ledger.remove(keys[index])
        if error is not None and not num_answered:
            raise error
        return lengths

    def put(self, records: Sequence[SealedRecord]) -> list[PutStatus]:
        kv = self._opened()
        until_s = self._until()
        statuses = []
        writes: list[tuple[int, Grant, Any]] = []
        with self._lock:
            expired = self._ledger.expired()
        self._remove(kv, expired, until_s)
        for record in records:
            info = self._with_ttl(record.info)
            with self._lock:
                grant = self._ledger.admit(info)
            if isinstance(grant, PutStatus):
                statuses.append(grant)
                continue
            statuses.append(PutStatus.FAILED)
            if self._remove(kv, grant.victims, until_s):
                write = kv.write(_name(info), b"".join(record.parts))
                writes.append((len(statuses) - 1, grant, write))
            else:
                with self._lock:
                    self._ledger.cancel(grant)
        error = None
        for index, grant, write in reversed(writes):
            try:
                self._wait(write, until_s)
            except StoreError as raised:
                error = raised
                with self._lock:
                    if isinstance(raised.__cause__, TimeoutError):
                        # It may arrive yet: on the books, for the bound, until it is missed.
                        self._ledger.commit(grant)
                    else:
                        self._ledger.cancel(grant)
                continue
            with self._lock:
                self._ledger.commit(grant)
            statuses[index] = PutStatus.STORED
        if error is not None and not any(status is PutStatus.STORED for status in statuses):
            raise error
        return statuses

    def delete(self, keys: Sequence[BlockHash]) -> EraseCount:
        kv = self._opened()
        wanted = set(keys)
        return self._delete_where(kv, lambda info: info.block_hash in wanted)

    def delete_tenant(self, tenant: bytes) -> EraseCount:
        kv = self._opened()
        return self._delete_where(kv, lambda info: info.tenant == tenant)

    def delete_namespaces(self, keep: bytes | None = None) -> EraseCount:
        kv = self._opened()
        return self._delete_where(kv, lambda info: info.namespace != keep)

    def pin(self, keys: Sequence[BlockHash], pinned: bool) -> int:
        kv = self._opened()
        with self._lock:
            there = [key for key in keys if self._ledger.pin(key, pinned)]
        value = b"1" if pinned else None
        writes = [kv.write(_PINS + key.hex(), value) for key in (there if pinned else keys)]
        until_s = self._until()
        for write in writes:
            self._wait(write, until_s)
        return len(there)

    def sweep(self) -> EraseCount:
        kv, until_s = self._opened(), self._until()
        num_records = num_bytes = 0
        while True:
            with self._lock:
                expired = self._ledger.expired()
            if not expired:
                return EraseCount(num_records, num_bytes)
            if not self._remove(kv, expired, until_s):
                raise StoreError(f"store {self.name} could not delete expired records")
            num_records += len(expired)
            num_bytes += sum(info.num_bytes for info in expired)

    def scan(self) -> Iterator[RecordInfo]:
        kv = self._opened()
        for info in self._list(kv):
            if not has_expired(info.created_s, info.expires_s, self._clock()):
                with self._lock:
                    is_pinned = self._ledger.is_pinned(info.block_hash)
                yield replace(info, is_pinned=is_pinned)

    def sample(self, count: int) -> list[RecordInfo]:
        with self._lock:
            return self._ledger.sample(count)

    def usage(self) -> StoreUsage:
        with self._lock:
            return self._ledger.usage()

    def flush(self) -> None:
        """Nothing to do: a write is reported when the server has it."""

    def close(self) -> None:
        self._kv = None

    def _opened(self) -> KeyValues:
        """The key-value store, with the books made; raises StoreError if that fails."""
        if self._kv is not None:
            return self._kv
        with self._opening:
            if self._kv is not None:
                return self._kv
            try:
                kv = self._open_kv()
            except Exception as error:
                raise _store_error(self.name, error) from error
            names = self._wait(kv.list(), self._until())
            with self._lock:
                self._ledger.clear()
                self._adopt(kv, _parsed(names))
                for name in names:
                    if name.startswith(_PINS.encode()):
                        key = bytes.fromhex(name.decode()[len(_PINS) :])
                        self._ledger.pin(key, True)
            self._listed_at_s = time.monotonic()
            self._kv = kv
            return kv

    def _adopt(self, kv: KeyValues, infos: list[RecordInfo]) -> None:
        """Take records onto the books, the oldest first, so that it leaves first.

        The futures of the deletes are kept until they are done: tensorstore gives an operation up
        whose future nobody holds.
        """
        self._deletes = [delete for delete in self._deletes if not delete.done()]
        for info in sorted(infos, key=lambda info: info.created_s):
            double = self._ledger.remove(info.block_hash)
            if double is not None and double != info:  # two processes wrote it: one is enough
                self._deletes.append(kv.write(_name(double), None))
            self._ledger.add(info)

    def _refresh(self) -> None:
        """Begin a listing if it is time; if one has ended, correct the books by it. Never waits."""
        kv, now_s = self._kv, time.monotonic()
        with self._lock:
            listing = self._listing
            if kv is None:
                return
            if listing is None:
                is_due = self._options.refresh_s and (
                    now_s >= self._listed_at_s + self._options.refresh_s
                )
                if is_due:
                    self._listing_known = {info.block_hash for info in self._ledger}
                    self._listing = kv.list()
                return
            if not listing.done():
                return
            self._listing, self._listed_at_s = None, now_s
            try:
                names = listing.result()
            except Exception as error:
                _LOG.warning("store %s: %s", self.name, _store_error(self.name, error))
                return
            listed = _parsed(names)
            for key in self._listing_known - {info.block_hash for info in listed}:
                self._ledger.remove(key)
            self._adopt(kv, [info for info in listed if info.block_hash not in self._ledger])

    def _remove(self, kv: KeyValues, infos: Sequence[RecordInfo], until_s: float) -> bool:
        """Delete objects that are off the books; what cannot be deleted comes back onto them."""
        is_done = True
        for info, delete in [(info, kv.write(_name(info), None)) for info in infos]:
            try:
                self._wait(delete, until_s)
            except StoreError as error:
                _LOG.warning("store %s could not delete a record: %s", self.name, error)
                is_done = False
                with self._lock:
                    self._ledger.add(info)
        return is_done

    def _delete_where(self, kv: KeyValues, matches: Callable[[RecordInfo], bool]) -> EraseCount:
        """Delete by a fresh listing, so that what other processes wrote goes as well."""
        found = [info for info in self._list(kv) if matches(info)]
        deletes = []
        for info in found:
            deletes.append(kv.write(_name(info), None))
            with self._lock:
                if self._ledger.remove(info.block_hash) is not None:
                    deletes.append(kv.write(_PINS + info.block_hash.hex(), None))
        until_s = self._until()
        for delete in deletes:
            self._wait(delete, until_s)
        return EraseCount(len(found), sum(info.num_bytes for info in found))

    def _list(self, kv: KeyValues) -> list[RecordInfo]:
        return _parsed(self._wait(kv.list(), self._until()))

    def _with_ttl(self, info: RecordInfo) -> RecordInfo:
        if not self._options.ttl_s:
            return info
        latest_s = info.created_s + self._options.ttl_s
        expires_s = min(info.expires_s or latest_s, latest_s)
        return replace(info, expires_s=expires_s)

    def _until(self) -> float:
        return time.monotonic() + self._options.timeout_s

    def _wait(self, future: Any, until_s: float) -> Any:
        try:
            return future.result(max(until_s - time.monotonic(), 0.001))
        except TimeoutError as error:
            future.cancel()
            text = f"store {self.name} did not answer within {self._options.timeout_s:g} s"
            raise StoreError(text) from error
        except Exception as error:
            raise _store_error(self.name, error) from error


def _store_error(name: str, error: Exception) -> StoreError:
    text = " ".join(str(error).split())
    return StoreError(f"store {name} cannot answer: {text[:300] or type(error).__name__}")


def _name(info: RecordInfo) -> str:
    created_ms, expires_ms = round(info.created_s * 1000), round(info.expires_s * 1000)
    folder = f"{info.tenant.hex()}/{info.namespace.hex()}"
    return f"{folder}/{info.block_hash.hex()}.{info.num_bytes}.{created_ms}.{expires_ms}"


def _parsed(names: Sequence[bytes]) -> list[RecordInfo]:
    """The records among the names of objects."""
    return [info for name in names if (info := _parse(name)) is not None]


def _parse(name: bytes) -> RecordInfo | None:
    """The record that an object's name tells of; None if it is no record's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    tenant, namespace, key = (bytes.fromhex(part.decode()) for part in match.groups()[:3])
    num_bytes, created_ms, expires_ms = (int(part) for part in match.groups()[3:])
    return RecordInfo(key, namespace, tenant, num_bytes, created_ms / 1000, expires_ms / 1000)
