"""The tiers below the device, as the scheduler sees them: what is where, what moves, what it costs.

Joins the device's index (by listening to it), the host tier's index, the stores and whoever moves
bytes (`Mover`). Everything here happens on the engine's thread; movers and stores report from
their own threads into `inbox`, which `poll` empties. A block that fails anywhere is a miss.

Invariants:
- A slot is read or written by others only between its reservation (or acquisition) and the message
  that ends it, and is not reused in between.
- A page's content is saved by the plan in which the page is reused, at the latest, before that
  plan's step overwrites it.
Knows nothing of arrays, jax, or requests.
"""

import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.labels import TenantLabels
from jaxserve.kv.loads import Piece, PieceState
from jaxserve.kv.messages import Fetched, LookedUp, Message, Offered, Saved, Staged
from jaxserve.kv.stores.costs import CostPrior, OperationCosts
from jaxserve.kv.tier_partners import Cascade, Mover
from jaxserve.kv.transfer_plan import PageSave

DEVICE, HOST = "device", "host"
MAX_SAVES = 64
"""Blocks that one step saves ahead of need; blocks that lose their page come on top."""

STAGE_PRIOR = CostPrior(latency_s=5e-4, units_per_s=4e9)
STAGE_STALE_S = 5.0
"""Staging that was slow once is tried again after about this time."""

PROMPT_ANSWER_S = 0.01
"""A store that has an index in memory answers a look-up by then, even if all cores are busy."""

HIT_WEIGHT = 0.1
"""Of the newest look-up in the share of those that found something."""

PIECE_BLOCKS = 64
"""Most blocks that move together from host slots to the device."""


@dataclass(slots=True)
class TierCounters:
    """Counts from the start, in blocks unless the name says otherwise."""

    saved: int = 0
    saves_dropped: int = 0
    save_failures: int = 0
    staged_bytes: int = 0
    stage_s: float = 0.0
    loaded: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)


class Tiers:
    """What is below the device.

    Args:
        host: slots of the host tier.
        num_groups: KV groups of the model.
        slot_bytes: size of a slot.
        mover: moves bytes.
        saves_early: save each block once it has a name, not only when it loses its page.
        cascade: the stores; None: none.
        inbox: where mover and stores report, if it was made before.
        clock: seconds, never going back.
        labels: whose blocks are whose, if the cascade reads them, too.
    """

    def __init__(
        self,
        host: HostIndex,
        num_groups: int,
        slot_bytes: int,
        mover: Mover,
        *,
        saves_early: bool,
        cascade: Cascade | None = None,
        inbox: deque[Message] | None = None,
        labels: TenantLabels | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.host = host
        self.labels = labels or TenantLabels()
        self.slot_bytes = slot_bytes
        self.counters = TierCounters()
        self.inbox: deque[Message] = deque() if inbox is None else inbox
        self._mover = mover
        self._cascade = cascade
        self._saves_early = saves_early
        self._stage_costs = OperationCosts(STAGE_PRIOR, clock, stale_s=STAGE_STALE_S)
        self._all_groups = (1 << num_groups) - 1
        self._piece_ids = itertools.count()
        self._pieces: dict[int, Piece] = {}
        self._names: dict[int, tuple[BlockHash, ...]] = {}  # by piece that is fetched or staged
        self._private: set[BlockHash] = set()
        self._look_ups: dict[int, float] = {}  # by ticket: when an answer is late
        self.look_up_hit_share = 1.0
        """Of the look-ups, how many found their first block; old ones count less and less."""
        self._clock = clock
        self._tickets = itertools.count()
        self._loading: set[BlockHash] = set()
        self._num_offered = 0
        self._saves: list[PageSave] = []
        self._saving: dict[PageSave, BlockHash] = {}
        self._saving_names = Counter[BlockHash]()
        self._passing: dict[int, int] = {}
        """Generations of slots whose blocks the policy did not want: they go on to the stores."""
        self._early: OrderedDict[tuple[int, BlockHash], int] = OrderedDict()

    # --- from the device ---

    def published(self, group: int, page: int, block_hash: BlockHash) -> None:
        """Listener: a block has a name now."""
        if self._saves_early and block_hash not in self._private:
            self._early[group, block_hash] = page

    def evicted(self, group: int, page: int, block_hash: BlockHash) -> None:
        """Listener: a page is about to be reused, so this is the last chance to save its block."""
        self._early.pop((group, block_hash), None)
        self._save(group, page, block_hash)

    def _save(self, group: int, page: int, name: BlockHash) -> None:
        bit = 1 << group
        if self.host.will_have(name, group):
            return
        slot = self.host.reserve(name, bit)
        if slot is None and self._cascade is not None and name not in self._private:
            slot = self.host.reserve(name, bit, is_needed=True)
            if slot is not None:
                self._passing[slot] = self.host.generation(slot)
        if slot is None:
            self.counters.saves_dropped += 1
            return
        generation, is_needed = self.host.generation(slot), self.host.is_claimed(name)
        save = PageSave(group, page, slot, generation, is_needed)
        self._saves.append(save)
        self._saving[save] = name
        self._saving_names[name] += 1

    def is_saving_block(self, name: BlockHash) -> bool:
        """A group's bytes of the block are on their way to the host."""
        return name in self._saving_names

    def collect_saves(
        self, content: Callable[[int, int], BlockHash | None]
    ) -> tuple[PageSave, ...]:
        """What the next plan must save.

        Args:
            content: the name of what a page of a group holds.
        """
        early: list[tuple[int, int, BlockHash]] = []
        while self._early and len(early) < MAX_SAVES and self._mover.has_room:
            (group, name), page = self._early.popitem(last=False)
            if content(group, page) == name:
                early.append((group, page, name))
        for group, page, name in reversed(early):  # a suffix enters, and so leaves, before its head
            self._save(group, page, name)
        saves, self._saves = tuple(self._saves), []
        return saves

    @property
    def has_saves(self) -> bool:
        """Something waits to be saved by a plan."""
        return bool(self._saves or self._early)

    # --- looking ahead ---

    @property
    def has_stores(self) -> bool:
        """Whether there is anything below the host."""
        return self._cascade is not None

    def label(self, names: Sequence[BlockHash], tenant: bytes) -> None:
        """These blocks belong to a tenant; stores keep tenants apart, and tenants can be erased."""
        self.labels.label(names, tenant)

    def look_up(self, names: Sequence[BlockHash]) -> int | None:
        """Ask the stores for blocks that the host has not; a ticket, if there is any to ask for."""
        if self._cascade is None:
            return None
        ticket = next(self._tickets)
        lacking = [name for name in names if not self.host.is_complete(name)]
        if not lacking or not self._cascade.look_up(ticket, lacking):
            return None
        is_prompt = self._cascade.estimate_look_up_s(len(lacking)) < PROMPT_ANSWER_S
        self._look_ups[ticket] = self._clock() + (PROMPT_ANSWER_S if is_prompt else 0.0)
        return ticket

    def is_looking(self, ticket: int) -> bool:
        """The stores have not answered yet."""
        return ticket in self._look_ups

    @property
    def expects_answers(self) -> bool:
        """A look-up in a prompt store has begun so lately that its answer may come any moment."""
        now_s = self._clock()
        return any(now_s < late_s for late_s in self._look_ups.values())

    def estimate_look_up_s(self, num_names: int) -> float:
        """Seconds that looking up so many blocks takes."""
        return self._cascade.estimate_look_up_s(num_names) if self._cascade is not None else 0.0

    def estimate_found_s(self, num_names: int) -> float:
        """Seconds until so many blocks are on the device, if a look-up finds them."""
        if self._cascade is None:
            return 0.0
        return self._cascade.estimate_found_s(num_names) + self.estimate_stage_s(num_names)

    @property
    def are_stores_reliable(self) -> bool:
        """The stores have kept to the estimates lately, and nothing is overdue."""
        return self._cascade is not None and self._cascade.is_reliable

    # --- preempted sequences ---

    def park(self, names: Sequence[BlockHash], private: Sequence[BlockHash]) -> None:
        """A preempted sequence will need these blocks; the private ones are only its own."""
        for name in names:
            self.host.claim(name)
        self._private.update(private)

    def unpark(self, names: Sequence[BlockHash], private: Sequence[BlockHash]) -> None:
        """Undo `park`: the sequence has its blocks, or needs them no more."""
        for name in names:
            self.host.unclaim(name)
        for name in private:
            self._private.discard(name)
            self.host.forget(name)

    def is_private(self, name: BlockHash) -> bool:
        """Whether a name is no hash, but a preempted sequence's own."""
        return name in self._private

    # --- to the device ---

    def has(self, name: BlockHash, group: int) -> bool:
        """Whether a block of a group can be had from the host or a store."""
        return self.host.has(name, group) or self._store_of(name) is not None

    def _store_of(self, name: BlockHash) -> str | None:
        return self._cascade.where(name) if self._cascade is not None else None

    def source(self, name: BlockHash, groups: Sequence[int]) -> str | None:
        """From where the blocks of these groups would come."""
        if all(self.host.has(name, group) for group in groups):
            return HOST
        return self._store_of(name)

    def piece_blocks(self, source: str) -> int:
        """Most blocks that come from there as one piece."""
        if source in (DEVICE, HOST) or self._cascade is None:
            return PIECE_BLOCKS
        return self._cascade.piece_blocks(source)

    def is_loading(self, name: BlockHash) -> bool:
        """The block is on its way to the device for some sequence."""
        return name in self._loading

    def start_piece(
        self, names: Sequence[BlockHash], start: int, end: int, source: str
    ) -> Piece | None:
        """Start to load the blocks [start, end) of a sequence's `names`.

        Returns:
            None if no slots are free for what a store would send.
        """
        if source == DEVICE:  # nothing to move, but the blocks count once those before are there
            return Piece(-1, start, end, PieceState.WRITTEN, source)
        wanted = tuple(names[start:end])
        piece = Piece(next(self._piece_ids), start, end, PieceState.STAGING, source)
        if source == HOST:
            piece.slots = [self.host.acquire(name) for name in wanted]
        elif not self._start_fetch(piece, wanted):
            return None
        self._pieces[piece.piece_id] = piece
        self._names[piece.piece_id] = wanted
        self._loading.update(wanted)
        for name in reversed(wanted):
            self.host.touch(name)
        if source == HOST:
            self._mover.stage(piece.piece_id, piece.slots)
        return piece

    def _start_fetch(self, piece: Piece, names: Sequence[BlockHash]) -> bool:
        assert self._cascade is not None
        for name in reversed(names):  # a suffix enters, and so leaves, before its head
            self.host.forget_partial(name)  # a record has all groups
            slot = self.host.reserve(name, self._all_groups, is_needed=True)
            if slot is None:
                break
            piece.slots.insert(0, slot)
        if len(piece.slots) < len(names):
            self._abort_slots(piece.slots)
            return False
        piece.state = PieceState.FETCHING
        self._cascade.fetch(piece.piece_id, names, piece.slots)
        return True

    def _abort_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.host.abort(slot, self.host.generation(slot), self._all_groups)

    def written(self, piece: Piece) -> None:
        """A ready piece is being written into pages."""
        self.counters.loaded[piece.source] = (
            self.counters.loaded.get(piece.source, 0) + piece.end - piece.start
        )
        del self._pieces[piece.piece_id]

    def taken(self, piece: Piece) -> None:
        """The device's index is about to name the blocks of a piece."""
        self._forget_piece(piece)

    def give_up(self, piece: Piece) -> None:
        """Nobody waits for a piece any more; what it holds is let go as soon as it is idle."""
        piece.wanted = False
        self._loading.difference_update(self._names.get(piece.piece_id, ()))
        if piece.state is PieceState.FETCHING and self._cascade is not None:
            self._cascade.withdraw(piece.piece_id)
        if piece.state is PieceState.WRITTEN:
            self._forget_piece(piece)
        if piece.state is PieceState.READY:
            piece.state = PieceState.LOST
            self._mover.drop(piece.piece_id)
            self._forget_piece(piece)

    def _forget_piece(self, piece: Piece) -> None:
        self._pieces.pop(piece.piece_id, None)
        self._loading.difference_update(self._names.pop(piece.piece_id, ()))

    # --- estimates ---

    def estimate_stage_s(self, num_blocks: int) -> float:
        """Seconds from host slots to the device, for so many blocks."""
        if num_blocks <= 0:
            return 0.0
        num_pieces = max(1.0, num_blocks / PIECE_BLOCKS)
        return num_pieces * self._stage_costs.seconds(num_blocks * self.slot_bytes / num_pieces)

    def estimate_fetch_s(self, names: Sequence[BlockHash]) -> float:
        """Seconds from the stores to host slots, for these blocks."""
        return self._cascade.estimate_s(names) if self._cascade is not None else 0.0

    # --- messages ---

    @property
    def is_saving(self) -> bool:
        """Blocks wait to be saved by a plan, or are on their way to the host."""
        return bool(self.has_saves or self._saving)

    @property
    def is_writing(self) -> bool:
        """Blocks are on their way to the host or to stores."""
        return bool(self.has_saves or self._saving or self._num_offered)

    @property
    def is_busy(self) -> bool:
        """Something is on its way that will send a message."""
        return bool(self._saving or self._pieces or self._look_ups)

    def poll(self) -> None:
        """Take in what movers and stores have reported."""
        if self._cascade is not None:
            self._cascade.refresh()
        while self.inbox:
            message = self.inbox.popleft()
            if isinstance(message, Saved):
                self._on_saved(*message)
            elif isinstance(message, Staged):
                self._on_staged(message)
            elif isinstance(message, Fetched):
                self._on_fetched(*message)
            elif isinstance(message, Offered):
                self._num_offered -= 1
                self.host.release(message.slot)
                self._passed(message.name, message.slot)
                assert self._cascade is not None
                self._cascade.note_stored(message.name, message.stored)
            else:
                self._on_looked_up(message)

    def _on_saved(self, save: PageSave, is_ok: bool) -> None:
        name = self._saving.pop(save)
        self._saving_names[name] -= 1
        if not self._saving_names[name]:
            del self._saving_names[name]
        if not is_ok:
            self.counters.save_failures += 1
            self.host.abort(save.slot, save.generation, 1 << save.group)
            return
        if not self.host.commit(save.slot, save.generation, 1 << save.group):
            return
        self.counters.saved += 1
        if self._cascade is None or name in self._private or not self.host.is_complete(name):
            return
        slot = self.host.acquire(name)
        if self._cascade.offer(name, slot):
            self._num_offered += 1
        else:
            self.host.release(slot)
            self._passed(name, slot)

    def _passed(self, name: BlockHash, slot: int) -> None:
        """The stores have read a slot, or will not."""
        if self._passing.pop(slot, None) == self.host.generation(slot):
            self.host.forget(name)

    def _on_looked_up(self, message: LookedUp) -> None:
        assert self._cascade is not None
        if message.ticket is not None:
            self._look_ups.pop(message.ticket, None)
            is_hit = 1.0 if message.found[0] else 0.0
            self.look_up_hit_share += HIT_WEIGHT * (is_hit - self.look_up_hit_share)
        self._cascade.note_found(message.names, message.found)

    def _on_fetched(self, piece_id: int, is_ok: tuple[bool, ...], was_asked: bool) -> None:
        piece, held = self._pieces[piece_id], []
        for name, slot, ok in zip(self._names[piece_id], piece.slots, is_ok, strict=True):
            generation = self.host.generation(slot)
            if not ok:
                self.host.abort(slot, generation, self._all_groups)
            elif self.host.commit(slot, generation, self._all_groups):
                held.append(self.host.acquire(name))
        if piece.wanted and len(held) == len(piece.slots):
            piece.state = PieceState.STAGING
            self._mover.stage(piece_id, piece.slots)
            return
        for slot in held:
            self.host.release(slot)
        if self._cascade is not None and was_asked:
            pairs = zip(self._names[piece_id], is_ok, strict=True)
            lost = [name for name, ok in pairs if not ok]
            if lost:
                self.counters.lost[piece.source] = self.counters.lost.get(piece.source, 0) + len(
                    lost
                )
                self._cascade.forget(lost, piece.source)
        piece.state = PieceState.LOST
        self._forget_piece(piece)

    def _on_staged(self, message: Staged) -> None:
        piece = self._pieces[message.piece_id]
        for slot in piece.slots:
            self.host.release(slot)
        self.counters.staged_bytes += message.num_bytes
        self.counters.stage_s += message.duration_s
        if message.is_ok:
            self._stage_costs.observe(message.num_bytes, message.duration_s)
        if message.is_ok:
            piece.state = PieceState.READY
            if not piece.wanted:
                self.give_up(piece)
            return
        piece.state = PieceState.LOST
        self._forget_piece(piece)

    def check_integrity(self) -> None:
        """AssertionError if slots, pieces and messages do not add up."""
        self.host.check_integrity()
        for piece in self._pieces.values():
            assert piece.is_coming, f"piece {piece.piece_id} is {piece.state}, but still known"
        assert self._saving_names == Counter(self._saving.values()), "saves are miscounted"
        names = {name for names in self._names.values() for name in names}
        assert self._loading <= names, "a block is marked as loading, but no piece has it"
