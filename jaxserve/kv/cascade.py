"""The stores behind the host tier, in their order: what they are known to have, reads and writes.

Every block that is offered goes to every store, sealed; reads go to the first store that is known
to have the block. A record that fails its checks is deleted from its store and counts as missing.
Public methods are for the engine's thread; sealing has a thread of its own, and stores have theirs
(`StoreWorker`). What they find is reported to the inbox and noted by `note_*` on the engine's
thread, so what is known of the stores has one owner.

Knows nothing of pages, arrays or jax.
"""

import logging
import math
import queue
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import Verdict, check, seal, sealed_bytes, unseal
from jaxserve.kv.keys import KeyFolder
from jaxserve.kv.labels import TenantLabels
from jaxserve.kv.loads import STORE_PIECE_BLOCKS
from jaxserve.kv.messages import Fetched, LookedUp, Message, Offered
from jaxserve.kv.stores.base import PutStatus, RecordInfo, SealedRecord
from jaxserve.kv.stores.tasks import Outcome, Task, TaskState
from jaxserve.kv.stores.try_out import try_out
from jaxserve.kv.stores.worker import StoreWorker

logger = logging.getLogger(__name__)

MIN_KNOWN, MAX_KNOWN = 1 << 12, 1 << 17
"""Blocks whose whereabouts are remembered: as many as the stores can hold, within these bounds.
Beyond it the oldest are forgotten, and asked for again."""

PUT_RECORDS, PUT_BYTES = 16, 2 << 20
"""So many records, or more if they are small, are written together when many wait. The threads'
scratch memory grows to the largest of them, and stays."""

GATHER_S = 0.002
"""After the first offer those that come with it are waited for: a step brings many, and each time
a thread wakes up it takes a core from the step."""

DAMAGED = (Verdict.CORRUPT, Verdict.TRUNCATED)
"""By its checksums alone: a record that is merely sealed with another's key stays."""

SlotBytes = Callable[[int], memoryview]


@dataclass(slots=True)
class _Offer:
    """A slot that is being written to stores; released when the last of them is done."""

    name: BlockHash
    slot: int
    num_waiting: int
    stored: int = 0


@dataclass(slots=True)
class _LookUp:
    ticket: int
    names: tuple[BlockHash, ...]
    num_waiting: int
    found: list[int]
    answered: int = 0  # bit i: the i-th store has
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class _Read:
    """A read that waited for its turn when it was submitted."""

    worker: StoreWorker
    task: Task
    num_blocks: int


class StoreCascade:
    """The stores of one engine.

    Args:
        workers: the stores, nearest first.
        namespace: `envelope.namespace_digest` of what the engine runs.
        slot: the bytes of a host slot.
        slot_bytes: their number, the payload of every record.
        inbox, wake: where and how to report.
        keys: the tenants' keys; None: records are not encrypted.
        ttl_s: how long records may live; 0: for ever.
        labels: whose blocks are whose.
    """

    def __init__(
        self,
        workers: Sequence[StoreWorker],
        namespace: bytes,
        slot: SlotBytes,
        slot_bytes: int,
        inbox: deque[Message],
        wake: Callable[[], None],
        *,
        keys: KeyFolder | None = None,
        ttl_s: float = 0.0,
        labels: TenantLabels | None = None,
    ):
        self.workers = tuple(workers)
        self.verdicts: Counter[str] = Counter()
        """Reads by what the envelope said."""
        self._namespace = namespace
        self._slot = slot
        self._slot_bytes = slot_bytes
        self._record_bytes = sealed_bytes(slot_bytes, keys is not None)
        self._inbox = inbox
        self._wake = wake
        self._keys = keys
        self._ttl_s = ttl_s
        self._known: OrderedDict[BlockHash, int] = OrderedDict()  # bit i: the i-th store has it
        self._max_known = _max_known(self.workers, self._record_bytes)
        self._labels = labels or TenantLabels()
        self._usable = (1 << len(self.workers)) - 1
        self._reads: dict[int, _Read] = {}  # by piece
        self._lock = threading.Lock()  # of _Offer and _LookUp objects, and verdicts
        self._offers: queue.SimpleQueue[_Offer | Callable[[], object] | None] = queue.SimpleQueue()
        self._sealer = threading.Thread(target=self._seal_loop, name="kv-seal", daemon=True)
        self._sealer.start()

    # --- what is known ---

    def refresh(self) -> None:
        """Leave out stores that take no loads now."""
        usable = 0
        for index, worker in enumerate(self.workers):
            if worker.estimate_probe_s(1) < math.inf:
                usable |= 1 << index
        self._usable = usable

    def _first(self, name: BlockHash) -> int:
        """Index of the first usable store that is known to have a block; -1: none."""
        bits = self._known.get(name, 0) & self._usable
        return (bits & -bits).bit_length() - 1

    def where(self, name: BlockHash) -> str | None:
        """Name of the first store that is known to have a block."""
        index = self._first(name)
        return self.workers[index].name if index >= 0 else None

    def _note(self, name: BlockHash, bits: int) -> None:
        if not bits:
            return
        self._known[name] = self._known.get(name, 0) | bits
        self._known.move_to_end(name)
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def forget(self, names: Sequence[BlockHash], source: str) -> None:
        """A store may no longer have these blocks."""
        bit = sum(1 << i for i, worker in enumerate(self.workers) if worker.name == source)
        for name in names:
            self._known[name] = self._known.get(name, 0) & ~bit
            if not self._known[name]:
                del self._known[name]

    def forget_all(self) -> None:
        """The stores may no longer have anything."""
        self._known.clear()

    def estimate_s(self, names: Sequence[BlockHash]) -> float:
        """Seconds that fetching these blocks would take now, one deviation on the safe side."""
        counts = Counter(self._first(name) for name in names)
        return max(
            (
                self.workers[index].estimate_load_s(
                    count * self._record_bytes,
                    count,
                    1.0,
                    -(-count // self._piece_blocks(self.workers[index])),
                )
                for index, count in counts.items()
                if index >= 0
            ),
            default=0.0,
        )

    def piece_blocks(self, source: str) -> int:
        """Blocks to ask a store for at a time."""
        return next(self._piece_blocks(worker) for worker in self.workers if worker.name == source)

    def _piece_blocks(self, worker: StoreWorker) -> int:
        return worker.piece_records(self._record_bytes, STORE_PIECE_BLOCKS)

    def estimate_look_up_s(self, num_names: int) -> float:
        """Seconds until the slowest usable store has answered a probe."""
        estimates = [worker.estimate_probe_s(num_names) for worker in self.workers]
        return max((s for s in estimates if s < math.inf), default=0.0)

    def estimate_found_s(self, num_names: int) -> float:
        """Seconds to fetch so many blocks from the first store that takes loads now."""
        for index, worker in enumerate(self.workers):
            if self._usable >> index & 1:
                num_calls = -(-num_names // self._piece_blocks(worker))
                num_bytes = num_names * self._record_bytes
                return worker.estimate_load_s(num_bytes, num_names, 1.0, num_calls)
        return 0.0

    @property
    def is_reliable(self) -> bool:
        """All stores that take loads have kept to the estimates lately; nothing is overdue."""
        usable = [worker for i, worker in enumerate(self.workers) if self._usable >> i & 1]
        return bool(usable) and all(worker.is_reliable for worker in usable)

    # --- looking up ---

    def look_up(self, ticket: int, names: Sequence[BlockHash]) -> bool:
        """Ask the stores for blocks of which nothing is known; True: answers `LookedUp`.

        Stores that know at once have answered when this returns.
        """
        wanted = tuple(name for name in names if name not in self._known)
        if not wanted:
            return False
        look_up = _LookUp(ticket, wanted, 1, [0] * len(wanted))
        at_once = [worker.probe_at_once(wanted) for worker in self.workers]
        for index, found in enumerate(at_once):
            if found is not None:
                look_up.answered |= 1 << index
                for i, is_there in enumerate(found):
                    look_up.found[i] |= is_there << index
        self.note_found(wanted, look_up.found)
        if None not in at_once:
            return False
        for index, worker in enumerate(self.workers):
            if at_once[index] is not None:
                continue
            with self._lock:
                look_up.num_waiting += 1

            def answered(outcome: Outcome[bool], bit: int = 1 << index) -> None:
                with self._lock:
                    for i, is_there in enumerate(outcome.values):
                        look_up.found[i] |= bit if is_there else 0
                self._look_up_part_done(look_up, bit)

            if worker.submit_probe(wanted, answered) is None:
                self._look_up_part_done(look_up, 1 << index)
        self._look_up_part_done(look_up, 0)
        return True

    def _look_up_part_done(self, look_up: _LookUp, bit: int) -> None:
        """A store has answered. It is over once the stores up to some one have everything."""
        with self._lock:
            look_up.num_waiting -= 1
            look_up.answered |= bit
            nearest = look_up.answered & ~(
                look_up.answered + 1
            )  # all before the first that has not
            is_over = not look_up.num_waiting or all(bits & nearest for bits in look_up.found)
            ticket = look_up.ticket if is_over and not look_up.is_over else None
            look_up.is_over |= is_over
            found = tuple(look_up.found)
        self._inbox.append(LookedUp(ticket, look_up.names, found))
        self._wake()

    def note_found(self, names: Sequence[BlockHash], found: Sequence[int]) -> None:
        """Take in what a look-up has found."""
        for name, bits in zip(names, found, strict=True):
            self._note(name, bits)

    # --- reading ---

    def fetch(self, piece_id: int, names: Sequence[BlockHash], slots: Sequence[int]) -> None:
        """Read blocks into reserved slots, checked; answers `Fetched`."""
        worker = self.workers[max(0, self._first(names[0]))]
        tenants = [self._labels.of(name) for name in names]
        is_ok = [False] * len(names)
        damaged: list[BlockHash] = []

        def consume(index: int, record: memoryview) -> None:
            key = self._keys.find(tenants[index]) if self._keys is not None else None
            verdict = Verdict.NO_KEY
            if self._keys is None or key is not None:
                verdict = unseal(
                    record,
                    names[index],
                    self._namespace,
                    tenants[index],
                    self._slot(slots[index]),
                    now_s=time.time(),
                    key=key,
                )
            is_ok[index] = verdict is Verdict.OK
            with self._lock:
                self.verdicts[verdict.value] += 1
            if verdict is not Verdict.OK:
                logger.warning(
                    "%s: block %s is not used: %s", worker.name, names[index].hex()[:16], verdict
                )
                if verdict is Verdict.WRONG_BLOCK or check(record, time.time()) in DAMAGED:
                    damaged.append(names[index])

        def done(outcome: Outcome[int]) -> None:
            if damaged:
                worker.submit_alone(lambda store: store.delete(damaged), lambda outcome: None)
            self._reads.pop(piece_id, None)
            self._inbox.append(Fetched(piece_id, tuple(is_ok)))
            self._wake()

        lengths = [self._record_bytes] * len(names)
        task = worker.submit_read(names, lengths, consume, done)
        if task is None:
            self._inbox.append(Fetched(piece_id, tuple(is_ok)))
            self._wake()
        elif task.state is TaskState.QUEUED:
            self._reads[piece_id] = _Read(worker, task, len(names))

    def withdraw(self, piece_id: int) -> None:
        """Do not read blocks that no store has begun to read; answers `Fetched` if so."""
        read = self._reads.pop(piece_id, None)
        if read is None or read.task.state is not TaskState.QUEUED:
            return
        if read.worker.cancel(read.task):
            not_read = (False,) * read.num_blocks
            self._inbox.append(Fetched(piece_id, not_read, was_asked=False))

    # --- writing ---

    def offer(self, name: BlockHash, slot: int) -> bool:
        """Write a slot to every store that is not known to have it; True: answers `Offered`."""
        everywhere = (1 << len(self.workers)) - 1
        if self._known.get(name, 0) == everywhere:
            return False
        self._offers.put(_Offer(name, slot, 1))
        return True

    def note_stored(self, name: BlockHash, stored: int) -> None:
        """Take in which stores have a block now."""
        self._note(name, stored)

    def _seal_loop(self) -> None:
        is_open, most = True, max(PUT_RECORDS, PUT_BYTES // self._record_bytes)
        while is_open:
            batch = [self._offers.get()]
            if batch[0] is not None and self._offers.qsize() < most:
                time.sleep(GATHER_S)
            while len(batch) < most and not self._offers.empty():
                batch.append(self._offers.get())
            offers: list[_Offer] = []
            for entry in batch:
                if isinstance(entry, _Offer):
                    offers.append(entry)
                    continue
                self._write(offers)
                offers = []
                if entry is None:
                    is_open = False
                else:
                    _attempt(entry)
            self._write(offers)

    def _write(self, offers: Sequence[_Offer]) -> None:
        """Seal offers and hand them to the stores."""
        try:
            self._put([(offer, self._sealed(offer)) for offer in offers])
        except StoreError as error:
            logger.warning("%d blocks are not stored: %s", len(offers), error)
        except Exception:
            logger.exception("%d blocks are not stored", len(offers))
        for offer in offers:
            self._offer_part_done(offer)

    def after_writes(self, action: Callable[[], object]) -> None:
        """Run something short on the sealing thread once all that was offered is queued in the
        stores' workers: what it submits to be done alone comes after those writes."""
        self._offers.put(action)

    def _sealed(self, offer: _Offer) -> SealedRecord:
        tenant = self._labels.of(offer.name)
        return seal(
            offer.name,
            self._namespace,
            tenant,
            self._slot(offer.slot),
            created_s=time.time(),
            ttl_s=self._ttl_s,
            key=self._keys.find_or_make(tenant) if self._keys is not None else None,
        )

    def _put(self, sealed: Sequence[tuple[_Offer, SealedRecord]]) -> None:
        offers = [offer for offer, _ in sealed]
        records = [record for _, record in sealed]
        for index, worker in enumerate(self.workers):
            with self._lock:
                for offer in offers:
                    offer.num_waiting += 1

            def done(outcome: Outcome[PutStatus], bit: int = 1 << index) -> None:
                for offer, status in zip(offers, outcome.values, strict=True):
                    if status in (PutStatus.STORED, PutStatus.PRESENT):
                        offer.stored |= bit
                    self._offer_part_done(offer)

            if worker.submit_put(records, done) is None:
                for offer in offers:
                    self._offer_part_done(offer)

    def _offer_part_done(self, offer: _Offer) -> None:
        with self._lock:
            offer.num_waiting -= 1
            is_done = not offer.num_waiting
        if is_done:
            self._inbox.append(Offered(offer.name, offer.slot, offer.stored))
            self._wake()

    def try_out(self, timeout_s: float) -> None:
        """Learn what loads of each store cost, before any is needed; see `try_out`."""
        for worker in self.workers:
            try_out(worker, self._is_own, STORE_PIECE_BLOCKS, timeout_s / len(self.workers))

    def _is_own(self, info: RecordInfo) -> bool:
        return info.namespace == self._namespace and info.num_bytes <= self._record_bytes

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what was offered, as far as the time allows, and end all threads."""
        until_s = time.monotonic() + timeout_s
        self._offers.put(None)
        self._sealer.join(timeout_s)
        for worker in self.workers:
            worker.close(max(0.1, until_s - time.monotonic()))


def _max_known(workers: Sequence[StoreWorker], record_bytes: int) -> int:
    bounds = [worker.store.usage().max_bytes for worker in workers]
    if not all(bounds):
        return MAX_KNOWN
    return min(max(sum(bounds) // record_bytes, MIN_KNOWN), MAX_KNOWN)


def _attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception:
        logger.exception("an operation on all stores failed")
