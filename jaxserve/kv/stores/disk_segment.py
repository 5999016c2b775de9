"""One file of the disk store: a header, a table of entries, and slots of one size.

    | header (4096) | entries, 272 bytes each, padded to 4096 | slot 0 | slot 1 | ... |

A record is split so that most of it is page-aligned in its slot: the few bytes that it has beyond
a multiple of 4096 (its envelope's header, usually) lie in its entry. An entry is valid if its
checksum, which also covers its place, fits; and it holds the checksum of the whole record, so it
vouches for what the slot holds. Whatever a crash leaves half written fails one of the two.
An entry of zeros is a free slot.

An erasure marks the entry first: a valid one that names nothing. Then it overwrites the slot, and
last it frees the entry. A process that ends in between leaves marks, so the next one that opens the
file knows which slots may still hold what was to be erased.

The file has its full size from its creation and never grows. Keeps no copy of the table in memory
beyond what finding and expiring records needs. Not thread-safe except where it says so.
"""

import contextlib
import itertools
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from jaxserve.kv.stores.base import RecordInfo, SealedRecord
from jaxserve.kv.stores.disk_io import (
    ALIGNMENT,
    open_direct,
    read_run,
    round_up,
    write_run,
    write_zeros,
)

VERSION = 1
HEADER_BYTES = 4096
ENTRY_BYTES = 272
SUFFIX = ".segment"
TEMPORARY_SUFFIX = ".segment.tmp"

_MAGIC = b"JXKVSEG\0"
_HEADER = struct.Struct("<8sIIQQ")
_ENTRY = struct.Struct("<QQQIHH32s16s16sdd160s")
_HEAD_BYTES = 160
_PINNED = 1
_ERASING = 2
_TABLE = np.dtype(
    [
        ("checksum", "<u8"),
        ("record_checksum", "<u8"),
        ("sequence", "<u8"),
        ("num_bytes", "<u4"),
        ("flags", "<u2"),
        ("head_bytes", "<u2"),
        ("keys", "u1", 32),
        ("namespace", "V16"),
        ("tenant", "V16"),
        ("created", "<f8"),
        ("expires", "<f8"),
        ("head", "V160"),
    ]
)
assert _ENTRY.size == _TABLE.itemsize == ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of a slot in use."""

    info: RecordInfo
    sequence: int
    pinned: bool
    record_checksum: int
    head: bytes

    def pack(self, segment_id: int, slot: int) -> bytes:
        """As it lies in the table of a segment."""
        info = self.info
        packed = _ENTRY.pack(
            0,
            self.record_checksum,
            self.sequence,
            info.num_bytes,
            _PINNED if self.pinned else 0,
            len(self.head),
            info.block_hash,
            info.namespace,
            info.tenant,
            info.created_s,
            info.expires_s,
            self.head,
        )
        return _entry_checksum(packed, segment_id, slot).to_bytes(8, "little") + packed[8:]

    @classmethod
    def unpack(cls, packed: bytes, segment_id: int, slot: int) -> "Entry | None":
        """None if the slot is free or the entry is damaged."""
        (checksum, record_checksum, sequence, num_bytes, flags, head_bytes, *names, head) = (
            _ENTRY.unpack(packed)
        )
        if not checksum or checksum != _entry_checksum(packed, segment_id, slot):
            return None
        block_hash, namespace, tenant, created_s, expires_s = names
        info = RecordInfo(block_hash, namespace, tenant, num_bytes, created_s, expires_s)
        return cls(info, sequence, bool(flags & _PINNED), record_checksum, head[:head_bytes])


def _erasing_mark(segment_id: int, slot: int) -> bytes:
    """The entry of a slot whose bytes are being overwritten; it tells nothing of what they were."""
    names = bytes(32), bytes(16), bytes(16)
    packed = _ENTRY.pack(0, 0, 0, 0, _ERASING, 0, *names, 0.0, 0.0, bytes(_HEAD_BYTES))
    return _entry_checksum(packed, segment_id, slot).to_bytes(8, "little") + packed[8:]


def _was_cut_short(packed: memoryview, slot: int) -> bool:
    """Whether an invalid entry is one that a killed process had written, or freed, up to a page."""
    start = HEADER_BYTES + slot * ENTRY_BYTES
    at = -start % ALIGNMENT
    is_cut = 0 < at < ENTRY_BYTES
    return is_cut and not (any(packed[:at]) and any(packed[at:]))


def split_bytes(num_bytes: int) -> tuple[int, int]:
    """Of a record: the bytes in its entry and the size of its slot."""
    head_bytes = num_bytes % ALIGNMENT
    if head_bytes > _HEAD_BYTES or num_bytes < ALIGNMENT:
        head_bytes = 0
    return head_bytes, round_up(num_bytes - head_bytes)


def record_checksum(parts: Iterable[memoryview]) -> int:
    """Of the parts of a record, one after the other."""
    hasher = xxh3_64()
    for part in parts:
        hasher.update(part)
    return hasher.intdigest()


def split_parts(record: SealedRecord, head_bytes: int) -> tuple[bytes, memoryview]:
    """Head and body of a record; the body is copied only if it lies in several parts."""
    parts = [part.cast("B") for part in record.parts if part.nbytes]
    head = b""
    while len(head) < head_bytes:
        taken = parts[0][: head_bytes - len(head)]
        head += taken
        parts[0] = parts[0][taken.nbytes :]
        if not parts[0].nbytes:
            del parts[0]
    return head, parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def file_bytes(slot_bytes: int, num_slots: int) -> int:
    """Size of a segment's file."""
    return HEADER_BYTES + round_up(num_slots * ENTRY_BYTES) + num_slots * slot_bytes


def slots_within(slot_bytes: int, num_bytes: int) -> int:
    """How many slots a file of at most `num_bytes` can have."""
    count = max(0, num_bytes - HEADER_BYTES) // (slot_bytes + ENTRY_BYTES)
    while count and file_bytes(slot_bytes, count) > num_bytes:
        count -= 1
    return count


def runs_of(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive numbers in an ascending sequence."""
    numbered = enumerate(slots)
    for _, group in itertools.groupby(numbered, lambda pair: pair[1] - pair[0]):
        run = [slot for _, slot in group]
        yield run[0], len(run)


class Segment:
    """An open file. Use `create` or `load`.

    Attributes:
        free: slots that hold nothing and may be written.
        num_users: threads that use the file's descriptors now.
        is_new: the folder's entry for the file may not be on disk yet.
        is_dropped: the file is removed, and closed when its last user leaves.
        num_reserved: slots that are being written or wiped.
        half_erased: slots that hold no record, but maybe bytes of one that was to be erased; they
            are neither free nor reserved.
        num_damaged: entries that were not as they had been written when the file was opened.
        keys, sequence, created, expires, num_bytes, tenant, namespace: columns, one row a slot; a
            sequence of 0 means that the slot holds no record. Tenants and namespaces are numbers
            that the store gives out.
    """

    def __init__(self, path: Path, segment_id: int, slot_bytes: int, num_slots: int):
        self.path = path
        self.id = segment_id
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.num_bytes_of_file = file_bytes(slot_bytes, num_slots)
        self.free: deque[int] = deque()
        self.num_users = 0
        self.num_reserved = 0
        self.half_erased: set[int] = set()
        self.num_damaged = 0
        self.num_live = 0
        self.num_pinned = 0
        self.is_dirty = False
        self.is_new = False
        self.is_dropped = False
        self.keys = np.zeros((num_slots, 32), np.uint8)
        self.sequence = np.zeros(num_slots, np.uint64)
        self.created = np.zeros(num_slots)
        self.expires = np.zeros(num_slots)
        self.num_bytes = np.zeros(num_slots, np.uint32)
        self.tenant = np.zeros(num_slots, np.uint32)
        self.namespace = np.zeros(num_slots, np.uint32)
        self._slots_at = self.num_bytes_of_file - num_slots * slot_bytes
        self._table = -1
        self._data = -1

    @classmethod
    def create(
        cls, folder: Path, segment_id: int, slot_bytes: int, num_slots: int, direct: bool
    ) -> "Segment":
        """A new file with every slot free; whole or not there, unless the power is cut before
        it is synced, which `load` finds.

        Raises:
            OSError: e.g. no space left.
        """
        self = cls(folder / f"{segment_id:08x}{SUFFIX}", segment_id, slot_bytes, num_slots)
        temporary = folder / f"{segment_id:08x}{TEMPORARY_SUFFIX}"
        # One that is there was left by a try that could not even remove it.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(descriptor, 0, self.num_bytes_of_file)
                os.pwrite(descriptor, _pack_header(segment_id, slot_bytes, num_slots), 0)
            finally:
                os.close(descriptor)
            os.rename(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._open(direct, writable=True)
        self.is_new = True
        self.free.extend(range(num_slots))
        return self

    @classmethod
    def load(
        cls, path: Path, direct: bool, writable: bool, number_of: Callable[[bytes], int]
    ) -> "tuple[Segment, list[int]]":
        """Open a file with everything that is in it.

        Args:
            path: of the file.
            direct: whether to use direct I/O.
            writable: whether to open it for writing.
            number_of: numbers for the names of tenants and namespaces.

        Returns:
            The segment, and which of its slots hold pinned records.

        Raises:
            ValueError: the file is not a whole segment of this version.
            OSError: it cannot be read.
        """
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            segment_id, slot_bytes, num_slots = _unpack_header(os.pread(descriptor, 4096, 0))
            num_bytes, actual = file_bytes(slot_bytes, num_slots), os.fstat(descriptor).st_size
            if f"{segment_id:08x}{SUFFIX}" != path.name or actual != num_bytes:
                raise ValueError(f"it has {actual} bytes; its header says {num_bytes}")
            data = _read_all(descriptor, num_slots * ENTRY_BYTES, HEADER_BYTES)
        finally:
            os.close(descriptor)
        self = cls(path, segment_id, slot_bytes, num_slots)
        table, view = np.frombuffer(data, _TABLE), memoryview(data)
        is_valid = np.zeros(num_slots, bool)
        used = np.nonzero(table["checksum"] | table["sequence"])[0].tolist()
        checksums, sequences = table["checksum"].tolist(), table["sequence"].tolist()
        for slot in used:
            packed = view[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES]
            is_whole = checksums[slot] == _entry_checksum(packed, segment_id, slot)
            is_valid[slot] = is_whole and sequences[slot]
            if not is_whole:
                self.num_damaged += not _was_cut_short(packed, slot)
        for num_bytes in np.unique(table["num_bytes"][is_valid]).tolist():
            if split_bytes(num_bytes)[1] != slot_bytes:
                is_valid &= table["num_bytes"] != num_bytes
        self.half_erased.update(slot for slot in used if not is_valid[slot])
        for column in ("keys", "sequence", "created", "expires", "num_bytes"):
            getattr(self, column)[is_valid] = table[column][is_valid]
        for column in ("tenant", "namespace"):
            names, index = np.unique(table[column][is_valid], return_inverse=True)
            numbers = np.array([number_of(name.tobytes()) for name in names], np.uint32)
            getattr(self, column)[is_valid] = numbers[index] if len(names) else 0
        self.num_live = int(is_valid.sum())
        free = np.nonzero(~is_valid)[0].tolist()
        self.free.extend(slot for slot in free if slot not in self.half_erased)
        self._open(direct, writable)
        return self, np.nonzero(is_valid & (table["flags"] & _PINNED != 0))[0].tolist()

    def read(self, first: int, views: Sequence[memoryview]) -> list[Entry | None]:
        """Read consecutive slots; any thread.

        Args:
            first: slot of the first record.
            views: one for each, writable, of exactly the record's length.

        Returns:
            The entry of each record that came whole and unchanged, else None.

        Raises:
            OSError: the disk cannot read it.
        """
        count = len(views)
        table = os.pread(self._table, count * ENTRY_BYTES, HEADER_BYTES + first * ENTRY_BYTES)
        bodies = [view[split_bytes(view.nbytes)[0] :] for view in views]
        offset = self._slots_at + first * self.slot_bytes
        filled = read_run(self._data, offset, self.slot_bytes, bodies)
        entries: list[Entry | None] = [None] * count
        for index in range(min(filled, len(table) // ENTRY_BYTES)):
            start, view = index * ENTRY_BYTES, views[index]
            entry = Entry.unpack(table[start : start + ENTRY_BYTES], self.id, first + index)
            if entry is None or entry.info.num_bytes != view.nbytes:
                continue
            view[: len(entry.head)] = entry.head
            if xxh3_64_intdigest(view) == entry.record_checksum:
                entries[index] = entry
        return entries

    def write_bodies(self, first: int, bodies: Sequence[memoryview]) -> None:
        """Write the slots' part of consecutive records; any thread. Raises OSError."""
        self.is_dirty = True
        offset = self._slots_at + first * self.slot_bytes
        write_run(self._data, offset, self.slot_bytes, bodies)

    def write_entries(self, first: int, entries: Sequence[Entry]) -> None:
        """Write entries of consecutive slots, whose bodies are written. Raises OSError."""
        self.is_dirty = True
        packed = b"".join(entry.pack(self.id, first + index) for index, entry in enumerate(entries))
        self._write_table(first, packed)

    def clear_entries(self, first: int, count: int) -> None:
        """Make consecutive slots free. Raises OSError."""
        self.is_dirty = True
        self._write_table(first, bytes(count * ENTRY_BYTES))

    def set_pinned(self, slot: int, pinned: bool) -> None:
        """Change one entry. Raises OSError."""
        at = HEADER_BYTES + slot * ENTRY_BYTES
        entry = Entry.unpack(os.pread(self._table, ENTRY_BYTES, at), self.id, slot)
        if entry is not None:
            changed = Entry(entry.info, entry.sequence, pinned, entry.record_checksum, entry.head)
            self.write_entries(slot, [changed])

    def mark_erased(self, slots: Sequence[int]) -> None:
        """Let ascending slots hold no record from now on, and note it in the file. Raises OSError.

        `wipe` is to follow, or else the next `load` finds them in `half_erased`.
        """
        self.is_dirty = True
        for first, count in runs_of(slots):
            marks = [_erasing_mark(self.id, first + index) for index in range(count)]
            self._write_table(first, b"".join(marks))

    def wipe(self, slots: Sequence[int]) -> None:
        """Overwrite ascending slots that hold no record with zeros, durably, and free their
        entries; any thread. Raises OSError."""
        self.is_dirty = True
        for first, count in runs_of(slots):
            at = self._slots_at + first * self.slot_bytes
            write_zeros(self._data, at, count * self.slot_bytes)
        self.sync()
        for first, count in runs_of(slots):  # need not be durable: marks tell nothing
            self.clear_entries(first, count)

    def sync(self) -> None:
        """Return when all that was written before would survive a power cut; any thread."""
        self.is_dirty = False
        try:
            os.fdatasync(self._table)
        except OSError:
            self.is_dirty = True
            raise

    def close(self) -> None:
        """Release the file."""
        for descriptor in {self._table, self._data} - {-1}:
            os.close(descriptor)
        self._table = self._data = -1

    def _open(self, direct: bool, writable: bool) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._table = os.open(self.path, flags)
        opened = open_direct(self.path, flags) if direct else None
        self._data = self._table if opened is None else opened

    def _write_table(self, first: int, packed: bytes) -> None:
        at = HEADER_BYTES + first * ENTRY_BYTES
        while packed:
            written = os.pwrite(self._table, packed, at)
            packed, at = packed[written:], at + written


def _entry_checksum(packed: bytes | memoryview, segment_id: int, slot: int) -> int:
    return xxh3_64_intdigest(packed[8:], seed=segment_id << 32 | slot) or 1


def _pack_header(segment_id: int, slot_bytes: int, num_slots: int) -> bytes:
    header = _HEADER.pack(_MAGIC, VERSION, segment_id, slot_bytes, num_slots)
    return header + xxh3_64_intdigest(header).to_bytes(8, "little")


def _unpack_header(data: bytes) -> tuple[int, int, int]:
    if len(data) < _HEADER.size + 8 or not data.startswith(_MAGIC):
        raise ValueError("it does not begin like a segment")
    checksum = int.from_bytes(data[_HEADER.size : _HEADER.size + 8], "little")
    if xxh3_64_intdigest(data[: _HEADER.size]) != checksum:
        raise ValueError("its header is damaged")
    _, version, segment_id, slot_bytes, num_slots = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"it is of version {version}; this program knows {VERSION}")
    return segment_id, slot_bytes, num_slots


def _read_all(descriptor: int, num_bytes: int, offset: int) -> bytes:
    pieces = []
    while num_bytes:
        piece = os.pread(descriptor, min(num_bytes, 1 << 26), offset)
        if not piece:
            raise ValueError("it ends within its table")
        pieces.append(piece)
        num_bytes, offset = num_bytes - len(piece), offset + len(piece)
    return b"".join(pieces)
