"""The store on a local disk: records in slots of a few large files, within a hard budget.

A put reserves slots (`DiskIndex` decides which, and what leaves for them), writes the records
there, and then their entries: only then are they found. Reads and writes go on side by side and
outside the lock; what was read is checked against its entry, so a slot that changed meanwhile is
a miss. A process may be killed at any point; what it left is either whole or not there.

One process at a time may use a folder. If the folder cannot be written, the store reads only: for
good if it is so at the start, otherwise until it can be written again (`WriteGate`).
Keys of a sequence are given head first; the policy sees them suffix first.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import has_expired
from jaxserve.kv.stores.base import (
    EraseCount,
    PutStatus,
    RecordInfo,
    SealedRecord,
    StoreUsage,
)
from jaxserve.kv.stores.disk_erasure import give_back, overwrite, take_slots
from jaxserve.kv.stores.disk_folder import WriteGate, lock_folder, unlock_folder
from jaxserve.kv.stores.disk_index import NOT_WRITABLE, DiskIndex, Place
from jaxserve.kv.stores.disk_io import IOThreads
from jaxserve.kv.stores.disk_options import DiskOptions, DiskStats, parse_disk_url
from jaxserve.kv.stores.disk_segment import Segment, split_bytes
from jaxserve.kv.stores.disk_transfers import Read, Write, align, read_task, runs, write_task

_LOG = logging.getLogger(__name__)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_MAX_RECORD_BYTES = 2**32 - 1
_SWEEP_S = 60.0
_WARN_S = 60.0
_SCANNED_AT_ONCE = 256


class DiskStore:
    """One folder. All methods may be called by several threads.

    Args:
        folder: made with mode 0700 if it is not there.
        options: see there.
        clock: seconds since the epoch.

    Raises:
        ConfigError: the folder is another process's, or others' than its owner's, or holds what
            is not a store's.
        StoreError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: str | Path,
        options: DiskOptions | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.options = options = options or DiskOptions()
        self.name = options.name
        self._clock = clock
        self._lock = threading.Lock()
        self._writing: dict[BlockHash, Write] = {}
        self._num_io_errors = 0
        self._warn_at_s = time.monotonic()
        self._folder = Path(folder)
        self._gate = WriteGate(self._folder)
        self._folder_descriptor = lock_folder(self._folder)
        try:
            self._index, self.is_read_only = self._open_index()
            self._num_corrupt = sum(segment.num_damaged for segment in self._index.segments)
        except BaseException:
            unlock_folder(self._folder_descriptor)
            raise
        self._threads = IOThreads(options.threads)
        self._is_closed = False
        self._sweep_at_s = time.monotonic()
        self._sweep_if_due()

    @classmethod
    def from_url(
        cls, url: str, name: str = "disk", clock: Callable[[], float] = time.time
    ) -> "DiskStore":
        """Open `file:///folder?option=value`; see `DiskOptions`. Raises ConfigError, StoreError."""
        parsed = parse_disk_url(url)
        return cls(parsed.folder, replace(parsed.options, name=name), clock)

    def probe(self, keys: Sequence[BlockHash]) -> list[bool]:
        with self._lock:
            return self._probe(keys)

    def probe_at_once(self, keys: Sequence[BlockHash]) -> list[bool] | None:
        if not self._lock.acquire(blocking=False):  # whoever has it may be waiting for the disk
            return None
        try:
            return self._probe(keys)
        finally:
            self._lock.release()

    def _probe(self, keys: Sequence[BlockHash]) -> list[bool]:
        self._check_open()
        now_s = self._clock()
        found = [self._find_unexpired(key, now_s) is not None for key in keys]
        for key, is_there in zip(keys, found, strict=True):
            if not is_there:
                self._index.miss(key)
        return found

    def get(self, keys: Sequence[BlockHash], buffers: Sequence[memoryview]) -> list[int]:
        reads: list[Read] = []
        with self._lock:
            self._check_open()
            now_s = self._clock()
            for index in reversed(range(len(keys))):
                key, place = keys[index], self._find_unexpired(keys[index], now_s)
                if place is None:
                    self._index.miss(key)
                    continue
                self._index.touch(key)
                num_bytes = int(place.segment.num_bytes[place.slot])
                if num_bytes <= buffers[index].nbytes:
                    place.segment.num_users += 1
                    view = buffers[index].cast("B")[:num_bytes]
                    reads.append(Read(index, key, *place, view))
        self._threads.run([read_task(run) for run in runs(reads, self.options.threads)])
        lengths = [0] * len(keys)
        with self._lock:
            for read in reads:
                if read.entry is not None:
                    lengths[read.index] = read.view.nbytes
                elif self._index.find(read.key) == (read.segment, read.slot, read.sequence):
                    self._give_up(read)
                self._index.leave(read.segment)
        return lengths

    def put(self, records: Sequence[SealedRecord]) -> list[PutStatus]:
        if self.is_read_only or not self._gate.is_open():
            return [PutStatus.FAILED] * len(records)
        self._sweep_if_due()
        statuses = [PutStatus.FAILED] * len(records)
        with self._lock:
            self._check_open()
            writes = self._reserve(records, statuses)
        try:
            self._threads.run([write_task(run) for run in runs(writes, self.options.threads)])
        finally:
            with self._lock:
                self._publish(writes, statuses)
        if self.options.fsync == "put":
            self._sync_writes(writes, statuses)
        return statuses

    def delete(self, keys: Sequence[BlockHash]) -> EraseCount:
        wanted = set(keys)
        return self._erase(
            lambda: [key for key in wanted if self._index.find(key)],
            lambda info: info.block_hash in wanted,
        )

    def delete_tenant(self, tenant: bytes) -> EraseCount:
        return self._erase(
            lambda: self._index.select(tenant=tenant), lambda info: info.tenant == tenant
        )

    def delete_namespaces(self, keep: bytes | None = None) -> EraseCount:
        return self._erase(
            lambda: self._index.select(other_than=keep) if keep else self._index.keys(),
            lambda info: info.namespace != keep,
        )

    def sweep(self) -> EraseCount:
        """Remove what has expired. Puts do it once a minute; an idle store needs to be told."""
        if self.is_read_only or not self._gate.is_open():
            return EraseCount(0, 0)
        now_s = self._clock()
        return self._erase(lambda: self._index.select(expired_at_s=now_s), lambda info: False)

    def pin(self, keys: Sequence[BlockHash], pinned: bool) -> int:
        self._check_writable()
        with self._lock:
            self._check_open()
            now_s = self._clock()
            there = [key for key in keys if self._find_unexpired(key, now_s) is not None]
            try:
                for key in there:
                    self._index.set_pinned(key, pinned)
            except OSError as error:
                raise self._store_error("keep a pin", error) from error
            return len(there)

    def scan(self) -> Iterator[RecordInfo]:
        with self._lock:
            self._check_open()
            keys = self._index.keys()
        for start in range(0, len(keys), _SCANNED_AT_ONCE):
            with self._lock:
                self._check_open()
                now_s = self._clock()
                places = [
                    self._find_unexpired(key, now_s)
                    for key in keys[start : start + _SCANNED_AT_ONCE]
                ]
                infos = [self._index.info(place) for place in places if place is not None]
            yield from infos

    def sample(self, count: int) -> list[RecordInfo]:
        with self._lock:
            self._check_open()
            places = [self._index.find(key) for key in self._index.sample(count)]
            return [self._index.info(place) for place in places if place is not None]

    def usage(self) -> StoreUsage:
        with self._lock:
            self._check_open()
            index, max_bytes = self._index, self.options.max_bytes
            counts = index.num_evicted, len(index.pinned), self._num_corrupt
            return StoreUsage(len(index), index.record_bytes, max_bytes, *counts)

    def stats(self) -> DiskStats:
        """Counters and size, now."""
        with self._lock:
            return DiskStats(
                self._index.num_evicted,
                self._num_corrupt,
                self._num_io_errors,
                self._index.physical_bytes,
                self._index.num_lost_files,
            )

    def flush(self) -> None:
        """Return when everything that `put` reported as stored would survive a power cut.

        With `fsync=never` it would survive the end of the process only, and this does nothing.
        """
        if self.options.fsync == "never" or self.is_read_only:
            return
        with self._lock:
            self._check_open()
            segments = [segment for segment in self._index.segments if segment.is_dirty]
        self._sync(segments)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
        try:
            self.flush()
        finally:
            with self._lock:
                self._is_closed = True
                for segment in self._index.segments:
                    segment.close()
                unlock_folder(self._folder_descriptor)
            self._threads.close()

    def check_integrity(self) -> None:
        """Recount everything; for tests, while nothing else is going on."""
        with self._lock:
            assert not self._writing
            self._index.check_integrity()

    def _open_index(self) -> tuple[DiskIndex, bool]:
        direct = self.options.io == "direct"
        try:
            if os.access(self._folder, os.W_OK):
                try:
                    return DiskIndex(self._folder, self.options, direct, writable=True), False
                except OSError as error:
                    if error.errno not in NOT_WRITABLE:
                        raise
            _LOG.warning("the KV store's folder %s cannot be written: reading only", self._folder)
            return DiskIndex(self._folder, self.options, direct, writable=False), True
        except OSError as error:
            raise self._store_error("read the folder", error) from error

    def _find_unexpired(self, key: BlockHash, now_s: float) -> Place | None:
        place = self._index.find(key)
        if place is not None and self._index.may_expire:
            created_s, expires_s = place.segment.created, place.segment.expires
            if has_expired(created_s[place.slot], expires_s[place.slot], now_s):
                return None
        return place

    def _give_up(self, read: Read) -> None:
        """A record that cannot be read, or is not what was written, is not there any more."""
        segment, slot = read.segment, read.slot
        is_corrupt = read.error is None
        self._num_corrupt += is_corrupt
        self._num_io_errors += not is_corrupt
        self._warn("a record is lost", read.error or "it is not as it was written")
        self._index.remove(read.key, evicted=False)
        is_usable = is_corrupt and not self.is_read_only
        try:
            if not self.is_read_only:
                segment.clear_entries(slot, 1)
        except OSError as error:
            is_usable &= error.errno in NOT_WRITABLE
        self._index.give_back(segment, [slot], usable=is_usable)

    def _reserve(self, records: Sequence[SealedRecord], statuses: list[PutStatus]) -> list[Write]:
        """Find a slot for each record that is to be stored; say of the others why not."""
        now_s = self._clock()
        writes: list[Write] = []
        for index, record in enumerate(records):
            info = self._limited(record.info)
            key = info.block_hash
            _, slot_bytes = split_bytes(info.num_bytes)
            if key in self._writing:
                statuses[index] = PutStatus.PRESENT
            elif self._find_unexpired(key, now_s) is not None:
                self._index.touch(key)
                statuses[index] = PutStatus.PRESENT
            elif has_expired(info.created_s, info.expires_s, now_s):
                statuses[index] = PutStatus.DECLINED
            elif not 0 < info.num_bytes <= _MAX_RECORD_BYTES:
                statuses[index] = PutStatus.FULL
            elif not self._index.admits(key, slot_bytes):
                statuses[index] = PutStatus.DECLINED
            else:
                try:
                    if self._index.find(key) is not None:
                        self._index.discard(key)
                    taken = self._index.take_slot(slot_bytes)
                except OSError as error:
                    self._note_error("make room", error)
                    if error.errno in NOT_WRITABLE:
                        break  # the others fare no better
                    continue
                statuses[index] = PutStatus.FULL
                if taken is not None:
                    write = Write(index, replace(record, info=info), *taken)
                    self._writing[key] = write
                    writes.append(write)
        align(writes)
        return writes

    def _limited(self, info: RecordInfo) -> RecordInfo:
        """The record's own time to live, or the store's if that is shorter."""
        if not self.options.ttl_s:
            return info
        expires_s = info.created_s + self.options.ttl_s
        return replace(info, expires_s=min(expires_s, info.expires_s or expires_s))

    def _publish(self, writes: list[Write], statuses: list[PutStatus]) -> None:
        """Write the entries of what is written, and let it be found."""
        for write in reversed(writes):
            if write.entry is not None:
                write.entry = replace(write.entry, sequence=self._index.new_sequence())
        kept = [write for write in writes if write.entry is not None and not write.is_cancelled]
        for run in runs(kept, 1):
            try:
                entries = [write.entry for write in run if write.entry is not None]
                run[0].segment.write_entries(run[0].slot, entries)
            except OSError as error:
                for write in run:
                    write.error = error
        for write in reversed(writes):
            del self._writing[write.record.info.block_hash]
            if write.error is None and write.entry is not None and not write.is_cancelled:
                self._index.publish(write.entry, write.segment, write.slot)
                self._gate.confirm()
                statuses[write.index] = PutStatus.STORED
                continue
            statuses[write.index] = PutStatus.FAILED
            is_usable = True
            if write.is_cancelled and write.error is None:
                try:
                    write.segment.wipe([write.slot])
                except OSError as error:
                    write.error = error
            if write.error is not None:
                self._note_error("write a record", write.error)
                is_full = write.error.errno in _NO_SPACE
                statuses[write.index] = PutStatus.FULL if is_full else PutStatus.FAILED
                is_usable = is_full or write.error.errno in NOT_WRITABLE
            self._index.give_back(write.segment, [write.slot], usable=is_usable)

    def _sync_writes(self, writes: list[Write], statuses: list[PutStatus]) -> None:
        try:
            self._sync(list({write.segment.id: write.segment for write in writes}.values()))
        except StoreError as error:
            _LOG.warning("%s", error)
            for write in writes:
                statuses[write.index] = PutStatus.FAILED

    def _sync(self, segments: Sequence[Segment]) -> None:
        with self._lock:
            segments = [segment for segment in segments if not segment.is_dropped]
            for segment in segments:
                segment.num_users += 1
        try:
            for segment in segments:
                segment.sync()
            if new := [segment for segment in segments if segment.is_new]:
                os.fsync(self._folder_descriptor)
                for segment in new:
                    segment.is_new = False
        except OSError as error:
            raise self._store_error("flush", error) from error
        finally:
            with self._lock:
                for segment in segments:
                    self._index.leave(segment)

    def _sweep_if_due(self) -> None:
        if self.is_read_only or time.monotonic() < self._sweep_at_s:
            return
        self._sweep_at_s = time.monotonic() + _SWEEP_S
        if self._index.may_expire or any(one.half_erased for one in self._index.segments):
            try:
                self.sweep()  # with what earlier erasures left
            except StoreError as error:
                _LOG.warning("%s", error)

    def _erase(
        self,
        select: Callable[[], list[BlockHash]],
        matches: Callable[[RecordInfo], bool],
    ) -> EraseCount:
        """Remove records so that neither their entries nor their bytes remain, durably.

        Args:
            select: keys of records that are there; called with the lock held.
            matches: which of those that are being written are not to appear, either.

        Raises:
            StoreError: something may remain.
        """
        self._check_writable()
        places: dict[int, list[int]] = {}
        num_records = num_bytes = 0
        with self._lock:
            self._check_open()
            for write in self._writing.values():
                write.is_cancelled |= matches(write.record.info)
            for key in select():
                place = self._index.find(key)
                assert place is not None
                num_records += 1
                num_bytes += int(place.segment.num_bytes[place.slot])
                self._index.remove(key, evicted=False)
                places.setdefault(place.segment.id, []).append(place.slot)
        self._overwrite(places)
        return EraseCount(num_records, num_bytes)

    def _overwrite(self, places: Mapping[int, list[int]]) -> None:
        """Overwrite reserved slots, and what earlier erasures left. Raises StoreError."""
        with self._lock:
            erasures = take_slots(self._index, places)
        failures = overwrite(erasures)
        failure = next(iter(failures.values()), None)
        if self._index.must_sync_folder:
            self._index.must_sync_folder = False
            try:
                os.fsync(self._folder_descriptor)
            except OSError as error:
                failure, self._index.must_sync_folder = error, True
        with self._lock:
            give_back(self._index, erasures, failures)
        if failure is not None:
            raise self._store_error("erase records", failure) from failure

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"The KV store {self._folder} is closed.")

    def _check_writable(self) -> None:
        if self.is_read_only:
            raise StoreError(
                f"The KV store's folder {self._folder} cannot be written, so nothing in it can be "
                f"pinned or deleted. Check its owner, its mode (0700) and how it is mounted."
            )

    def _note_error(self, what: str, error: OSError) -> None:
        self._num_io_errors += 1
        if error.errno in NOT_WRITABLE:
            self._gate.shut(error)
            return
        self._warn(f"could not {what}", error)

    def _warn(self, what: str, why: object) -> None:
        """Once a minute: a bad disk has much to say, and the counters say how much."""
        if time.monotonic() >= self._warn_at_s:
            self._warn_at_s = time.monotonic() + _WARN_S
            _LOG.warning("the KV store %s: %s: %s", self._folder, what, why)

    def _store_error(self, what: str, error: OSError) -> StoreError:
        return StoreError(f"The KV store {self._folder} could not {what}: {error.strerror}.")
