"""What is where in the folder of a disk store, what may be added, and what leaves for it.

The budget counts every byte of the folder: files have their full size from their creation, a file
that is removed counts until its last reader has closed it, and the folder itself has a reserve.
A file is only made if it fits, so the sum is never above `max_bytes`, not even for a moment.

All slots of a segment have one size. A record that leaves gives its slot to the next of that size;
where only records of another size could leave, the whole segment of the one that should leave
first is given up. Not thread-safe: the store holds its lock.
"""

import errno
import logging
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import CLOCK_SLACK_S
from jaxserve.kv.policy.base import Policy
from jaxserve.kv.policy.factory import make_policy
from jaxserve.kv.stores.base import RecordInfo
from jaxserve.kv.stores.disk_options import DiskOptions
from jaxserve.kv.stores.disk_segment import (
    ENTRY_BYTES,
    SUFFIX,
    TEMPORARY_SUFFIX,
    Entry,
    Segment,
    file_bytes,
    slots_within,
)

_LOG = logging.getLogger(__name__)
_FOLDER_BYTES = 16 << 10
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_GROW_AGAIN_S = 30.0
_SLOT_MASK = 0xFFFFFFFF


class Place(NamedTuple):
    """Where a record is; `sequence` tells it from a later one in the same slot."""

    segment: Segment
    slot: int
    sequence: int


class DiskIndex:
    """Records, slots, segments and the policy of one folder.

    Args:
        folder: exists.
        options: of the store.
        direct: whether to use direct I/O.
        writable: False leaves the folder as it is.

    Raises:
        ConfigError: the folder holds what is not a store's.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, options: DiskOptions, direct: bool, writable: bool):
        self.pinned: set[BlockHash] = set()
        self.num_evicted = 0
        self.num_lost_files = 0
        self.must_sync_folder = False
        self.may_expire = options.ttl_s > 0
        self._folder = folder
        self._options = options
        self._direct = direct
        self._segments: dict[int, Segment] = {}
        self._roomy: dict[int, Segment] = {}
        self._next_segment_id = 0
        self._where: dict[BlockHash, int] = {}
        self._next_sequence = 1
        self._names: dict[bytes, int] = {}
        self._name_of: list[bytes] = []
        self._used_bytes = _FOLDER_BYTES
        self._grow_at_s = 0.0
        self._is_full_told = False
        self._min_slot_bytes = 0
        self._policy: Policy = make_policy(options.policy, 1)
        self._load(writable)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def physical_bytes(self) -> int:
        """Of the whole folder on disk; an upper bound."""
        return self._used_bytes

    @property
    def record_bytes(self) -> int:
        """Sum of the lengths of all records."""
        return sum(int(segment.num_bytes.sum()) for segment in self._segments.values())

    @property
    def segments(self) -> list[Segment]:
        """All of them."""
        return list(self._segments.values())

    def find(self, key: BlockHash) -> Place | None:
        """Where a record is."""
        location = self._where.get(key)
        if location is None:
            return None
        segment, slot = self._segments[location >> 32], location & _SLOT_MASK
        return Place(segment, slot, int(segment.sequence[slot]))

    def touch(self, key: BlockHash) -> None:
        """A record was used."""
        self._policy.touch(key)

    def miss(self, key: BlockHash) -> None:
        """A record was looked for in vain."""
        self._policy.miss(key)

    def admits(self, key: BlockHash, slot_bytes: int) -> bool:
        """Whether the policy wants a record that is not there, in a slot of this size."""
        self._fit_policy(slot_bytes)
        return self._policy.admits(key)

    def info(self, place: Place) -> RecordInfo:
        """What is known of a record."""
        segment, slot, _ = place
        key = segment.keys[slot].tobytes()
        return RecordInfo(
            key,
            self._name_of[segment.namespace[slot]],
            self._name_of[segment.tenant[slot]],
            int(segment.num_bytes[slot]),
            float(segment.created[slot]),
            float(segment.expires[slot]),
            key in self.pinned,
        )

    def keys(self) -> list[BlockHash]:
        """All of them, now."""
        return list(self._where)

    def sample(self, count: int) -> list[BlockHash]:
        """At most so many keys, what was written since it was opened first."""
        return list(islice(reversed(self._where), count))

    def select(
        self,
        *,
        tenant: bytes | None = None,
        other_than: bytes | None = None,
        expired_at_s: float | None = None,
    ) -> list[BlockHash]:
        """Keys by tenant, by namespace (all but one) or by time, as `has_expired` has it."""
        found = []
        for segment in self._segments.values():
            wanted = segment.sequence > 0
            if tenant is not None:
                wanted &= segment.tenant == self._names.get(tenant, len(self._name_of))
            if other_than is not None:
                wanted &= segment.namespace != self._names.get(other_than, len(self._name_of))
            if expired_at_s is not None:
                is_over = segment.expires <= expired_at_s
                is_of_the_future = segment.created - CLOCK_SLACK_S > expired_at_s
                wanted &= (segment.expires != 0) & (is_over | is_of_the_future)
            found += [segment.keys[slot].tobytes() for slot in np.nonzero(wanted)[0]]
        return found

    def take_slot(self, slot_bytes: int) -> tuple[Segment, int] | None:
        """A slot to write to, reserved; others leave for it if they must. None if nothing may.

        Raises:
            OSError: the disk failed, other than being full.
        """
        room = _chargeable_bytes(self._options.max_bytes - _FOLDER_BYTES)
        if file_bytes(slot_bytes, 1) > room:
            return None  # nobody has to leave for what can never fit
        while True:
            segment = self._roomy.get(slot_bytes)
            if segment is None or segment.is_dropped or not segment.free:
                of_size = (s for s in self._segments.values() if s.slot_bytes == slot_bytes)
                segment = next((s for s in of_size if s.free), None)
            if segment is not None:
                self._roomy[slot_bytes] = segment
                segment.num_reserved += 1
                return segment, segment.free.popleft()
            if not self._add_segment(slot_bytes) and not self._evict_one(slot_bytes):
                return None

    def publish(self, entry: Entry, segment: Segment, slot: int) -> None:
        """The record in a reserved slot is there from now on."""
        self._set_row(segment, slot, entry)
        segment.num_reserved -= 1
        self._policy.insert(entry.info.block_hash)

    def new_sequence(self) -> int:
        """Numbers for records, in the order in which they are stored."""
        self._next_sequence += 1
        return self._next_sequence - 1

    def give_back(self, segment: Segment, slots: Iterable[int], *, usable: bool = True) -> None:
        """Reserved slots are free again; or never to be used, where the disk has failed."""
        for slot in slots:
            segment.num_reserved -= 1
            if usable:
                segment.free.append(slot)

    def remove(self, key: BlockHash, *, evicted: bool) -> Place:
        """A record is not there from now on, and its slot is reserved."""
        place = self.find(key)
        assert place is not None
        segment, slot, _ = place
        del self._where[key]
        segment.sequence[slot] = segment.num_bytes[slot] = 0
        segment.num_live -= 1
        segment.num_reserved += 1
        if key in self.pinned:
            self.pinned.discard(key)
            segment.num_pinned -= 1
        self._policy.remove(key, evicted=evicted)
        return place

    def set_pinned(self, key: BlockHash, pinned: bool) -> None:
        """Of a record that is there. Raises OSError."""
        place = self.find(key)
        assert place is not None
        if pinned == (key in self.pinned):
            return
        place.segment.set_pinned(place.slot, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)
        place.segment.num_pinned += 1 if pinned else -1

    def drop_segment(self, segment: Segment) -> None:
        """Remove a file with everything in it; nobody may be writing there. Raises OSError."""
        assert not segment.num_reserved
        segment.path.unlink()
        self.must_sync_folder = True
        for slot in np.nonzero(segment.sequence)[0]:
            self.remove(segment.keys[slot].tobytes(), evicted=False)
        del self._segments[segment.id]
        segment.is_dropped = True
        if not segment.num_users:
            self._close_dropped(segment)

    def leave(self, segment: Segment) -> None:
        """A thread has ended its use of a segment's file."""
        segment.num_users -= 1
        if segment.is_dropped and not segment.num_users:
            self._close_dropped(segment)

    def check_integrity(self) -> None:
        """Recount everything; for tests."""
        num_live = 0
        for segment in self._segments.values():
            live = np.nonzero(segment.sequence)[0].tolist()
            assert segment.num_live == len(live)
            assert len(live) + len(segment.free) + segment.num_reserved <= segment.num_slots
            assert not set(live) & set(segment.free) and len(set(segment.free)) == len(segment.free)
            assert not segment.half_erased & {*live, *segment.free}
            for slot in live:
                assert self._where[segment.keys[slot].tobytes()] == segment.id << 32 | slot
            keys = {segment.keys[slot].tobytes() for slot in live}
            assert segment.num_pinned == len(keys & self.pinned)
            num_live += len(live)
        assert num_live == len(self._where) and self.pinned <= self._where.keys()
        self._policy.check_integrity(self._where.keys())
        assert self._used_bytes <= self._options.max_bytes

    def _close_dropped(self, segment: Segment) -> None:
        segment.close()
        self._used_bytes -= _charged_bytes(segment.num_bytes_of_file)

    def _set_row(self, segment: Segment, slot: int, entry: Entry) -> None:
        info = entry.info
        segment.keys[slot] = np.frombuffer(info.block_hash, np.uint8)
        segment.sequence[slot] = entry.sequence
        segment.created[slot] = info.created_s
        segment.expires[slot] = info.expires_s
        segment.num_bytes[slot] = info.num_bytes
        segment.tenant[slot] = self._number_of(info.tenant)
        segment.namespace[slot] = self._number_of(info.namespace)
        segment.num_live += 1
        self._where[info.block_hash] = segment.id << 32 | slot
        if entry.pinned:
            self.pinned.add(info.block_hash)
            segment.num_pinned += 1
        self.may_expire |= info.expires_s > 0

    def _number_of(self, name: bytes) -> int:
        number = self._names.setdefault(name, len(self._name_of))
        if number == len(self._name_of):
            self._name_of.append(name)
        return number

    def _add_segment(self, slot_bytes: int) -> bool:
        for segment in self.segments:
            is_of_use = segment.slot_bytes == slot_bytes or segment.num_live
            if not is_of_use and not segment.num_reserved:
                self.drop_segment(segment)
        max_bytes = self._options.max_bytes
        target = max(max_bytes >> 7, min(max_bytes >> 2, 64 << 20))
        room = _chargeable_bytes(max_bytes - self._used_bytes)
        num_slots = slots_within(slot_bytes, min(target, room)) or min(
            slots_within(slot_bytes, room), 1
        )
        if time.monotonic() < self._grow_at_s:
            return False
        while num_slots:
            # Counted before it is made.
            num_bytes = _charged_bytes(file_bytes(slot_bytes, num_slots))
            self._used_bytes += num_bytes
            try:
                segment = Segment.create(
                    self._folder, self._next_segment_id, slot_bytes, num_slots, self._direct
                )
            except OSError as error:
                self._used_bytes -= num_bytes
                if error.errno not in _NO_SPACE:
                    raise
                num_slots //= 4
                continue
            self._segments[segment.id] = segment
            self._next_segment_id += 1
            self._is_full_told = False
            return True
        if slots_within(slot_bytes, room):
            if not self._is_full_told:
                _LOG.warning(
                    "the disk of the KV store %s is full; expected room for max_bytes=%d, of which "
                    "%d are used. Older blocks leave for new ones.",
                    self._folder,
                    max_bytes,
                    self._used_bytes,
                )
            self._is_full_told = True
            self._grow_at_s = time.monotonic() + _GROW_AGAIN_S
        return False

    def _evict_one(self, slot_bytes: int) -> bool:
        key = self._policy.victim(lambda key: key not in self.pinned)
        if key is None:
            return False
        place = self.find(key)
        assert place is not None
        segment = place.segment
        can_go = not segment.num_reserved and not segment.num_pinned
        if segment.slot_bytes != slot_bytes and can_go:
            num_live = segment.num_live
            self.drop_segment(segment)
            self.num_evicted += num_live
        else:
            self.discard(key, evicted=True)
            self.num_evicted += 1
        return True

    def discard(self, key: BlockHash, *, evicted: bool = False) -> None:
        """A record gives its slot to others.

        Raises:
            OSError: its entry cannot be taken away. Where nothing can be written the record stays;
                otherwise it is gone, and its slot is not used again.
        """
        place = self.find(key)
        assert place is not None
        try:
            place.segment.clear_entries(place.slot, 1)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                self.remove(key, evicted=evicted)
                self.give_back(place.segment, [place.slot], usable=False)
            raise
        self.remove(key, evicted=evicted)
        self.give_back(place.segment, [place.slot])

    def _fit_policy(self, slot_bytes: int) -> None:
        """A policy for as many records as fit if all are as small as the smallest."""
        if self._min_slot_bytes and slot_bytes >= self._min_slot_bytes:
            return
        self._min_slot_bytes = slot_bytes
        capacity = max(1, self._options.max_bytes // (slot_bytes + ENTRY_BYTES))
        self._policy = make_policy(self._options.policy, capacity)
        sequences = {s.id: s.sequence.tolist() for s in self._segments.values()}
        in_order = sorted(
            self._where.items(), key=lambda item: sequences[item[1] >> 32][item[1] & _SLOT_MASK]
        )
        for key, _ in in_order:
            self._policy.insert(key)

    def _load(self, writable: bool) -> None:
        strangers = []
        for path in sorted(self._folder.iterdir()):
            if path.name.endswith(TEMPORARY_SUFFIX):
                if writable:
                    path.unlink()
            elif path.name.endswith(SUFFIX):
                self._load_segment(path, writable)
            elif path.name != "lost+found":
                strangers.append(path.name)
        if strangers:
            raise ConfigError(
                f"The folder {self._folder} holds {strangers[0]!r}, which is no KV store's; "
                f"expected an empty folder or one that a KV store made."
            )
        self._next_segment_id = 1 + max(self._segments, default=-1)
        if writable:
            self._shrink()
        if self._segments:
            self._fit_policy(min(segment.slot_bytes for segment in self._segments.values()))

    def _load_segment(self, path: Path, writable: bool) -> None:
        try:
            segment, pinned = Segment.load(path, self._direct, writable, self._number_of)
        except ValueError as error:
            _LOG.warning("the KV store's file %s is of no use: %s", path, error)
            self.num_lost_files += 1
            if writable:
                path.unlink()
            return
        if segment.num_damaged:
            _LOG.warning(
                "the KV store's file %s has %d damaged entries: their records are lost",
                path,
                segment.num_damaged,
            )
        self._segments[segment.id] = segment
        self._used_bytes += _charged_bytes(segment.num_bytes_of_file)
        slots = np.nonzero(segment.sequence)[0]
        keys, sequences = segment.keys[slots].tobytes(), segment.sequence[slots].tolist()
        for index, slot in enumerate(slots.tolist()):
            key = keys[32 * index : 32 * index + 32]
            if (other := self.find(key)) is not None:
                mine = Place(segment, slot, sequences[index])
                older = min(mine, other, key=lambda place: place.sequence)
                self._forget_row(older)
                if older is mine:
                    continue
            self._where[key] = segment.id << 32 | slot
        for slot in pinned:
            if segment.sequence[slot]:
                self.pinned.add(segment.keys[slot].tobytes())
                segment.num_pinned += 1
        self.may_expire |= bool(segment.expires[slots].any())
        self._next_sequence = max(self._next_sequence, 1 + max(sequences, default=0))

    def _forget_row(self, place: Place) -> None:
        """While loading, before the policy knows any key."""
        segment, slot, _ = place
        key = segment.keys[slot].tobytes()
        segment.sequence[slot] = segment.num_bytes[slot] = 0
        segment.num_live -= 1
        if key in self.pinned:
            self.pinned.discard(key)
            segment.num_pinned -= 1
        segment.free.append(slot)
        if self._where.get(key) == segment.id << 32 | slot:
            del self._where[key]

    def _shrink(self) -> None:
        """Fit into a budget that has become smaller since: oldest first, pinned last."""
        by_age = sorted(
            self._segments.values(), key=lambda s: (s.num_pinned > 0, int(s.sequence.max()))
        )
        for segment in by_age:
            if self._used_bytes <= self._options.max_bytes:
                return
            for slot in np.nonzero(segment.sequence)[0]:
                self._forget_row(Place(segment, int(slot), 0))
            self.drop_segment(segment)


def _charged_bytes(num_bytes_of_file: int) -> int:
    """What a file may take on disk, with its name in the folder and the file system's own notes
    of where its parts are, which some count as the file's."""
    return num_bytes_of_file + 4096 + (num_bytes_of_file >> 12)


def _chargeable_bytes(num_bytes: int) -> int:
    """The largest file that is charged with no more than that."""
    return max(0, num_bytes - 4096) * 4096 // 4097
