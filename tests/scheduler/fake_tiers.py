"""Lower tiers for the fake device: late, lossy and out of order, but never wrong.

What a save has gathered reaches its slot, and what a piece staged reaches the device, after a
random number of steps; some of both fails. Records of the fake stores are digests like the pages'.
"""

import random

import numpy as np

from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.messages import Fetched, LookedUp, Offered, Saved, Staged
from jaxserve.kv.policy.factory import make_policy
from jaxserve.kv.tiers import Tiers
from jaxserve.kv.transfer_plan import TransferPlan

STORE = "store"


class FakeTiers:
    """Mover, stores and the memory of the host tier; `tiers` is what the scheduler gets.

    Args:
        failure_rate: share of saves, pieces and fetched blocks that fail.
        lateness: chance that a message waits for another step.
        hangs: stores never answer.
        wrong_rate: share of blocks that stores say to have without having them.
        store_s: estimate for fetching a block.
        records: what the stores have from the start.
    """

    def __init__(
        self,
        num_slots: int,
        num_groups: int,
        page_size: int,
        *,
        saves_early: bool = False,
        has_store: bool = False,
        failure_rate: float = 0.0,
        lateness: float = 0.5,
        hangs: bool = False,
        wrong_rate: float = 0.0,
        store_s: float = 0.0,
        records: dict[bytes, np.ndarray] | None = None,
        policy: str = "lru",
        piece_blocks: int = 16,
        seed: int = 0,
    ):
        self.memory = np.full((num_slots, num_groups, page_size), -1, np.int64)
        self.records: dict[bytes, np.ndarray] = dict(records or {})
        self._known: set[bytes] = set()
        self.tiers = Tiers(
            HostIndex(num_slots, num_groups, make_policy(policy, num_slots)),
            num_groups,
            page_size * 8 * num_groups,
            self,
            saves_early=saves_early,
            cascade=self if has_store else None,
        )
        self._random, self._room_random = random.Random(seed), random.Random(~seed)
        self._failure_rate, self._lateness, self._hangs = failure_rate, lateness, hangs
        self._piece_blocks = piece_blocks
        self._wrong_rate, self._store_s = wrong_rate, store_s
        self._pending: list[tuple] = []
        self._staged: dict[int, np.ndarray] = {}

    # Mover

    @property
    def has_room(self) -> bool:
        return self._room_random.random() < 0.9

    def stage(self, piece_id: int, slots) -> None:
        self._pending.append(("stage", piece_id, list(slots)))

    def drop(self, piece_id: int) -> None:
        del self._staged[piece_id]

    def execute(self, transfers: TransferPlan, pools: list[np.ndarray]) -> None:
        """What the device does before a step: loads, then saves."""
        for load in transfers.loads:
            rows = self._staged.pop(load.piece_id)
            for group, pages in enumerate(load.pages):
                for row, page in zip(rows, pages.tolist(), strict=True):
                    if page >= 0:
                        pools[group][page] = row[group]
        for save in transfers.saves:
            self._pending.append(("save", save, pools[save.group][save.page].copy()))

    # Cascade: like the real one, it knows only what it was told

    def refresh(self) -> None:
        pass

    def label(self, names, tenant: bytes) -> None:
        pass

    def where(self, name: bytes) -> str | None:
        return STORE if name in self._known else None

    def piece_blocks(self, source: str) -> int:
        return self._piece_blocks

    def look_up(self, ticket: int, names) -> bool:
        names = tuple(name for name in names if name not in self._known)
        if names:
            self._pending.append(("look", ticket, names))
        return bool(names)

    def note_found(self, names, found) -> None:
        self._known.update(name for name, bits in zip(names, found, strict=True) if bits)

    def note_stored(self, name: bytes, stored: int) -> None:
        if stored:
            self._known.add(name)

    def forget(self, names, source: str) -> None:
        self._known.difference_update(names)

    def estimate_look_up_s(self, num_names: int) -> float:
        return 0.05

    def estimate_found_s(self, num_names: int) -> float:
        return self._store_s * num_names

    is_reliable = True

    def fetch(self, piece_id: int, names, slots) -> None:
        self._pending.append(("fetch", piece_id, list(zip(names, slots, strict=True))))

    def withdraw(self, piece_id: int) -> None:
        for entry in self._pending:
            if entry[:2] == ("fetch", piece_id) and self._random.random() < 0.5:
                self._pending.remove(entry)
                not_read = (False,) * len(entry[2])
                self.tiers.inbox.append(Fetched(piece_id, not_read, was_asked=False))
                return

    def offer(self, name: bytes, slot: int) -> bool:
        if name in self._known:
            return False
        self._pending.append(("offer", name, slot))
        return True

    def estimate_s(self, names) -> float:
        return self._store_s * len(names)

    # time

    def tick(self, *, everything: bool = False) -> None:
        """Some of what is pending happens."""
        pending, self._pending = self._pending, []
        self._random.shuffle(pending)
        for entry in pending:
            kind = entry[0]
            if self._hangs and kind in ("fetch", "offer", "look"):
                self._pending.append(entry)
            elif not everything and self._random.random() < self._lateness:
                self._pending.append(entry)
            else:
                getattr(self, "_" + kind)(*entry[1:])

    def _fails(self) -> bool:
        return self._random.random() < self._failure_rate

    def _save(self, save, content) -> None:
        is_ok = not self._fails()
        self.memory[save.slot, save.group] = content if is_ok else -2
        self.tiers.inbox.append(Saved(save, is_ok))

    def _stage(self, piece_id, slots) -> None:
        is_ok = not self._fails()
        if is_ok:
            self._staged[piece_id] = self.memory[slots].copy()
        self.tiers.inbox.append(Staged(piece_id, is_ok, 8, 1e-3))

    def _fetch(self, piece_id, wanted) -> None:
        found = []
        for name, slot in wanted:
            found.append(name in self.records and not self._fails())
            self.memory[slot] = self.records[name] if found[-1] else -3
        self.tiers.inbox.append(Fetched(piece_id, tuple(found)))

    def _offer(self, name, slot) -> None:
        if not self._fails():
            self.records[name] = self.memory[slot].copy()
        self.tiers.inbox.append(Offered(name, slot, int(name in self.records)))

    def _look(self, ticket, names) -> None:
        found = tuple(
            int(self._random.random() < self._wrong_rate)
            or int(name in self.records and not self._fails())
            for name in names
        )
        self.tiers.inbox.append(LookedUp(ticket, names, found))

    def check_idle(self) -> None:
        """Once everything has happened, nothing is held any more."""
        self._hangs = False
        while self._pending or self.tiers.inbox:
            self.tick(everything=True)
            self.tiers.poll()
        self.tiers.check_integrity()
        host = self.tiers.host
        assert not self.tiers.is_busy and not self.tiers.is_writing, "a save or a piece never ended"
        assert not self._staged, "a staged piece is held for nobody"
        assert not any(host._references), "a slot is held for nobody"
        assert not host._claims, "a block is claimed by nobody"
        assert not self.tiers._private, "a private name outlived its sequence"
