"""Bytes that are to go: slots of erased records, until they are overwritten and free.

What could not be overwritten stays noted (`Segment.half_erased`), in the file, too, and belongs to
every later erasure: none says that it is done while there are any. Knows nothing of whose records
they were.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxserve.kv.stores.disk_index import DiskIndex
from jaxserve.kv.stores.disk_segment import Segment


class Erasure(NamedTuple):
    """Reserved slots of one segment, ascending."""

    segment: Segment
    slots: list[int]


def take_slots(index: DiskIndex, places: Mapping[int, list[int]]) -> list[Erasure]:
    """What has to be overwritten; files that hold nothing else are removed. Locked.

    Args:
        index: of the store; what is taken is reserved.
        places: reserved slots whose records left it, by segment.
    """
    erasures = []
    for segment in index.segments:
        slots = sorted(segment.half_erased.union(places.get(segment.id, ())))
        segment.num_reserved += len(segment.half_erased)
        segment.half_erased.clear()
        if slots and not _was_dropped(index, segment, len(slots)):
            erasures.append(Erasure(segment, slots))
    return erasures


def overwrite(erasures: list[Erasure]) -> dict[int, OSError]:
    """Overwrite slots durably; not locked. Returns errors by segment."""
    failures = {}
    for segment, slots in erasures:
        try:
            segment.mark_erased(slots)
            segment.wipe(slots)
        except OSError as error:
            failures[segment.id] = error
    return failures


def give_back(index: DiskIndex, erasures: list[Erasure], failures: Mapping[int, OSError]) -> None:
    """Slots are free, or wait for the next erasure. Locked."""
    for segment, slots in erasures:
        is_done = segment.id not in failures
        index.give_back(segment, slots, usable=is_done)
        if not is_done:
            segment.half_erased.update(slots)


def _was_dropped(index: DiskIndex, segment: Segment, num_slots: int) -> bool:
    if segment.num_live or segment.num_reserved != num_slots:
        return False
    segment.num_reserved = 0
    try:
        index.drop_segment(segment)
    except OSError:  # its slots are overwritten instead
        segment.num_reserved = num_slots
        return False
    return True
