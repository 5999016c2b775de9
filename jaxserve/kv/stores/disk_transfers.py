"""Records on their way between memory and the slots of a disk store.

Neighbours on disk are read and written in one call. Nothing here takes a lock or decides where a
record goes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.stores.base import SealedRecord
from jaxserve.kv.stores.disk_segment import (
    Entry,
    Segment,
    record_checksum,
    runs_of,
    split_bytes,
    split_parts,
)

_MIN_PIECE_BYTES = 256 << 10
_MAX_PIECE_BYTES = 2 << 20


@dataclass(slots=True)
class Write:
    """A record on its way to a reserved slot."""

    index: int
    record: SealedRecord
    segment: Segment
    slot: int
    entry: Entry | None = None
    error: OSError | None = None
    is_cancelled: bool = False


@dataclass(slots=True)
class Read:
    """A record that is being read into a view."""

    index: int
    key: BlockHash
    segment: Segment
    slot: int
    sequence: int
    view: memoryview
    entry: Entry | None = None
    error: OSError | None = None


T = TypeVar("T", Write, Read)


def align(writes: list[Write]) -> None:
    """Deal the reserved slots out anew, so that neighbours in the batch are neighbours on disk."""
    by_size: dict[int, list[Write]] = {}
    for write in writes:
        by_size.setdefault(write.segment.slot_bytes, []).append(write)
    for group in by_size.values():
        slots = sorted(((w.segment, w.slot) for w in group), key=lambda s: (s[0].id, s[1]))
        for write, (segment, slot) in zip(group, slots, strict=True):
            write.segment, write.slot = segment, slot


def runs(items: Sequence[T], num_threads: int) -> Iterator[list[T]]:
    """Group by consecutive slots of one segment, in the order of the slots.

    Runs are cut so that every thread gets some of them, but not into pieces so small that the
    call costs more than what it moves, nor so large that checksums wait for the disk.
    """
    by_segment: dict[int, list[T]] = {}
    num_bytes = 0
    for item in items:
        by_segment.setdefault(item.segment.id, []).append(item)
        num_bytes += item.segment.slot_bytes
    piece_bytes = min(max(num_bytes // num_threads, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
    for group in by_segment.values():
        group.sort(key=lambda item: item.slot)
        most = max(1, piece_bytes // group[0].segment.slot_bytes)
        start = 0
        for _, count in runs_of([item.slot for item in group]):
            for first in range(start, start + count, most):
                yield group[first : min(first + most, start + count)]
            start += count


def read_task(run: list[Read]) -> Callable[[], None]:
    def read() -> None:
        try:
            entries = run[0].segment.read(run[0].slot, [one.view for one in run])
        except OSError as error:
            for one in run:
                one.error = error
            return
        for one, entry in zip(run, entries, strict=True):
            if entry is not None and entry.sequence == one.sequence:
                one.entry = entry

    return read


def write_task(run: list[Write]) -> Callable[[], None]:
    def write() -> None:
        entries, bodies = [], []
        for one in run:
            info = one.record.info
            assert sum(part.nbytes for part in one.record.parts) == info.num_bytes
            head, body = split_parts(one.record, split_bytes(info.num_bytes)[0])
            entries.append(Entry(info, 1, False, record_checksum(one.record.parts), head))
            bodies.append(body)
        try:
            run[0].segment.write_bodies(run[0].slot, bodies)
        except OSError as error:
            for one in run:
                one.error = error
            return
        for one, entry in zip(run, entries, strict=True):
            one.entry = entry

    return write
