"""Moves blocks between the device's pages and the slots of the host tier, off the hot path.

Device to host: a compiled gather copies pages out of the pool, in program order, so the step that
follows may overwrite them; the copy goes to pinned host memory, and a thread waits for it and
writes it into slots. Host to device: a thread collects slots into one array and brings it to the
device; a compiled scatter, which donates the pool, writes it into pages just before a step.
Gathers and scatters are compiled ahead, one for each of a few sizes.

The pool is never read or written by the threads. What they finish, they report to the inbox of
`Tiers`. The bytes in a slot are those of the unsharded block, whatever the mesh. Knows nothing of
names, policies or requests.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxserve.errors import ConfigError
from jaxserve.kv.host_pool import HostPool
from jaxserve.kv.messages import Message, Saved, Staged
from jaxserve.kv.transfer_plan import PageSave, PieceLoad, TransferPlan
from jaxserve.pallas_kernels.paged_attention.api import UNSTABLE_CUSTOM_CALLS, Backend
from jaxserve.programs import ProgramSpec

logger = logging.getLogger(__name__)

SIZES = (4, 16, 64)
"""Blocks that one gather or scatter moves; less is padded."""

MAX_SAVES_IN_FLIGHT = 8
"""Gathers whose bytes wait to be written into slots. The next one waits for the first of them if
somebody needs it; else it is given up: no step waits for what may never be asked for."""

MAX_STAGED_BYTES = 512 << 20
"""Of the device's memory, for pieces that the next step will write into pages; but two pieces at
least, so that one is brought while another is written."""

STAGING_KIND = "pinned_host"


class Transfers:
    """The mover of `Tiers`.

    Args:
        host: memory of the host tier.
        pool: one array per KV group, [N, L, 2, K, P, H]; only shapes and shardings are kept.
        inbox: where finished transfers are reported.
        wake: called after each report.
        backend: gathers and scatters pages.
        stages_saves: saves go through pinned memory; by default unless the device's memory is the
            host's, where that would be one more copy.

    Raises:
        ConfigError: the platform has no pinned host memory, or damages what is moved through it.
    """

    def __init__(
        self,
        host: HostPool,
        pool: "Sequence[jax.Array]",
        inbox: deque[Message],
        wake: Callable[[], None],
        backend: Backend,
        stages_saves: bool | None = None,
    ):
        self._host = host
        self._inbox = inbox
        self._wake = wake
        self._num_pages = [array.shape[0] for array in pool]
        self._shapes = [array.shape[1:] for array in pool]
        self._dtype = np.dtype(pool[0].dtype)
        self._block_bytes = sum(array.nbytes // array.shape[0] for array in pool)
        self._shardings = [array.sharding for array in pool]
        self._staging = [with_memory_kind(sharding, STAGING_KIND) for sharding in self._shardings]
        if stages_saves is None:
            stages_saves = any(d.platform != "cpu" for d in pool[0].devices())
        self._stages_saves = stages_saves
        self._specs = {
            spec.name: spec
            for group, array in enumerate(pool)
            for size in SIZES
            for spec in (
                _gather(backend, group, size, array),
                _scatter(backend, group, size, array),
            )
        }
        self._programs: dict[str, Any] = {}
        self.saved_bytes = 0
        """Of blocks that were written into slots; changed by one thread of its own."""
        self._staged: dict[int, list[jax.Array]] = {}
        self._num_staged_bytes = 0
        self._is_closing = False
        self._staged_change = threading.Condition()
        """Guards the three above."""
        self._saves: queue.SimpleQueue[tuple[int, list[PageSave], jax.Array] | None] = (
            queue.SimpleQueue()
        )
        self._stages: queue.SimpleQueue[tuple[int, tuple[int, ...]] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(MAX_SAVES_IN_FLIGHT)
        check_memory_kinds(self._shardings, self._staging, self._shapes, self._dtype)
        self._threads = [
            threading.Thread(target=self._save_loop, name="kv-save", daemon=True),
            threading.Thread(target=self._stage_loop, name="kv-stage", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def specs(self) -> list[ProgramSpec]:
        """The programs to compile ahead."""
        return list(self._specs.values())

    def use(self, programs: "dict[str, jax.stages.Compiled]") -> None:
        """Take over the compiled programs."""
        self._programs = {name: programs[name] for name in self._specs if name in programs}

    def _program(self, name: str) -> Any:
        if name not in self._programs:  # warm-up was turned off
            spec = self._specs[name]
            jitted = jax.jit(
                spec.function, donate_argnums=spec.donate, out_shardings=spec.out_shardings
            )
            self._programs[name] = jitted.lower(*spec.args).compile()
        return self._programs[name]

    # --- on the engine's thread ---

    def execute(self, plan: TransferPlan, pool: "list[jax.Array]") -> "list[jax.Array]":
        """Enqueue what a plan moves: loads first, then saves. Returns the pool that follows."""
        for load in plan.loads:
            pool = self._load(load, pool)
        if plan.saves:
            for group in range(len(pool)):
                saves = [save for save in plan.saves if save.group == group]
                for start in range(0, len(saves), SIZES[-1]):
                    self._start_save(group, saves[start : start + SIZES[-1]], pool[group])
        return pool

    def _load(self, load: PieceLoad, pool: "list[jax.Array]") -> "list[jax.Array]":
        staged = self._unstage(load.piece_id)
        pool = list(pool)
        for group, pages in enumerate(load.pages):
            if (pages < 0).all():
                continue
            rows = staged[group]
            ids = np.full(rows.shape[0], self._num_pages[group], np.int32)  # out of range: dropped
            ids[: len(pages)] = np.where(pages < 0, self._num_pages[group], pages)
            (pool[group],) = self._program(_name("load", group, len(ids)))(pool[group], ids, rows)
        return pool

    def _start_save(self, group: int, saves: list[PageSave], array: jax.Array) -> None:
        ids = np.zeros(_size_for(len(saves)), np.int32)
        ids[: len(saves)] = [save.page for save in saves]
        if not self._room.acquire(blocking=any(save.is_needed for save in saves)):
            self._report(*(Saved(save, False) for save in saves))
            return
        try:
            (rows,) = self._program(_name("save", group, len(ids)))(array, ids)
            staged = jax.device_put(rows, self._staging[group]) if self._stages_saves else rows
        except Exception:  # no memory left, for instance: these blocks are lost, nothing else
            logger.exception("%d blocks could not be taken off the device", len(saves))
            self._room.release()
            self._report(*(Saved(save, False) for save in saves))
            return
        self._saves.put((group, saves, staged))

    def read(self, pool: "list[jax.Array]", group: int, pages: Sequence[int]) -> np.ndarray:
        """Copy pages of a group, as all steps dispatched so far leave them; waits for these."""
        parts = []
        for start in range(0, len(pages), SIZES[-1]):
            part = pages[start : start + SIZES[-1]]
            ids = np.zeros(_size_for(len(part)), np.int32)
            ids[: len(part)] = part
            (rows,) = self._program(_name("save", group, len(ids)))(pool[group], ids)
            parts.append(np.asarray(rows)[: len(part)])
        return np.concatenate(parts)

    def stage(self, piece_id: int, slots: Sequence[int]) -> None:
        """Start to bring slots to the device as one piece."""
        self._stages.put((piece_id, tuple(slots)))

    def drop(self, piece_id: int) -> None:
        """Let go of a staged piece."""
        self._unstage(piece_id)

    def _unstage(self, piece_id: int) -> "list[jax.Array]":
        with self._staged_change:
            arrays = self._staged.pop(piece_id)
            self._num_staged_bytes -= _num_bytes(arrays)
            self._staged_change.notify()
        return arrays

    @property
    def has_room(self) -> bool:
        """A save can start without a wait for those before it."""
        return self._saves.qsize() < MAX_SAVES_IN_FLIGHT - 1  # one is in the thread's hands

    def close(self) -> None:
        """End the threads, once what was enqueued is done."""
        with self._staged_change:
            self._is_closing = True
            self._staged_change.notify()
        self._saves.put(None)
        self._stages.put(None)
        for thread in self._threads:
            thread.join()
        self._staged.clear()

    # --- on threads of its own ---

    def _report(self, *messages: Message) -> None:
        self._inbox.extend(messages)
        self._wake()

    def _save_loop(self) -> None:
        while (entry := self._saves.get()) is not None:
            group, saves, rows = entry
            is_ok = True
            try:
                for save, block in zip(saves, np.asarray(rows), strict=False):
                    np.copyto(self._host.block(save.slot, group), block)
                    self.saved_bytes += block.nbytes
            except Exception:
                logger.exception("%d blocks could not be saved to the host tier", len(saves))
                is_ok = False
            del entry, rows
            self._room.release()
            self._report(*(Saved(save, is_ok) for save in saves))

    def _stage_loop(self) -> None:
        while (entry := self._stages.get()) is not None:
            piece_id, slots = entry
            self._wait_for_room(_size_for(len(slots)))
            start = time.perf_counter()
            is_ok, num_bytes = True, 0
            try:
                arrays = [self._collect(group, slots) for group in range(len(self._shapes))]
                jax.block_until_ready(arrays)
                num_bytes = _num_bytes(arrays)
                with self._staged_change:
                    self._staged[piece_id] = arrays
                    self._num_staged_bytes += num_bytes
            except Exception:
                logger.exception("%d blocks could not be brought to the device", len(slots))
                is_ok = False
            self._report(Staged(piece_id, is_ok, num_bytes, time.perf_counter() - start))

    def _wait_for_room(self, num_blocks: int) -> None:
        """Until the steps have written enough of what is staged already."""
        num_bytes = num_blocks * self._block_bytes
        most = max(MAX_STAGED_BYTES, 2 * SIZES[-1] * self._block_bytes)
        with self._staged_change:
            self._staged_change.wait_for(
                lambda: self._is_closing or self._num_staged_bytes + num_bytes <= most
            )

    def _collect(self, group: int, slots: tuple[int, ...]) -> jax.Array:
        """One group's blocks of slots, on the device. The array may alias `rows`, so it is new."""
        rows = np.empty((_size_for(len(slots)), *self._shapes[group]), self._dtype)
        for row, slot in zip(rows, slots, strict=False):
            np.copyto(row, self._host.block(slot, group))
        rows[len(slots) :] = 0
        return jax.device_put(rows, self._shardings[group])


def with_memory_kind(sharding: Sharding, kind: str) -> Sharding:
    """The same devices, another memory; whole on the host if the device has it in parts."""
    try:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=kind)
        (device,) = sharding.device_set
        return SingleDeviceSharding(device, memory_kind=kind)
    except ValueError as error:
        raise ConfigError(
            f"this platform has no {kind} memory, which the host tier needs: set kv_host_bytes to "
            f"0 ({error})"
        ) from error


def check_memory_kinds(
    shardings: Sequence[Sharding],
    staging: Sequence[Sharding],
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype,
) -> None:
    """Send a pattern through every memory kind and dtype in use, there and back.

    Raises:
        ConfigError: it did not come back as it was, or was silently kept elsewhere.
    """
    for device, host, shape in zip(shardings, staging, shapes, strict=True):
        pattern = np.random.default_rng(7).integers(0, 256, (2, *shape, dtype.itemsize), np.uint8)
        pattern = pattern.view(dtype).reshape(2, *shape)
        there = jax.device_put(jax.device_put(pattern, device), host)
        kind = there.sharding.memory_kind
        if kind != host.memory_kind:
            raise ConfigError(
                f"{dtype} was put into {kind} memory instead of {host.memory_kind}, silently: the "
                "host tier cannot be used on this platform; set kv_host_bytes to 0"
            )
        for place, array in (("host", there), ("device", jax.device_put(there, device))):
            if np.asarray(array).tobytes() != pattern.tobytes():
                raise ConfigError(
                    f"{dtype} comes back damaged from {host.memory_kind} memory (read on the "
                    f"{place}): the host tier cannot be used; set kv_host_bytes to 0"
                )


def _num_bytes(arrays: "Sequence[jax.Array]") -> int:
    return sum(array.nbytes for array in arrays)


def _size_for(count: int) -> int:
    return next(size for size in SIZES if size >= count)


def _name(kind: str, group: int, size: int) -> str:
    return f"{kind} {size} blocks of group {group}"


def _gather(backend: Backend, group: int, size: int, pool: jax.Array) -> ProgramSpec:
    gather = _on_each_device(backend.gather_pages, pool.sharding, takes_rows=False)
    return ProgramSpec(
        name=_name("save", group, size),
        function=lambda pages, ids: [gather(pages, ids)],
        args=(pool, np.zeros(size, np.int32)),
        donate=(),
        custom_calls=UNSTABLE_CUSTOM_CALLS,
    )


def _scatter(backend: Backend, group: int, size: int, pool: jax.Array) -> ProgramSpec:
    scatter = _on_each_device(backend.scatter_pages, pool.sharding, takes_rows=True)
    rows = jax.ShapeDtypeStruct((size, *pool.shape[1:]), pool.dtype, sharding=pool.sharding)
    return ProgramSpec(
        name=_name("load", group, size),
        function=lambda pages, ids, rows: [scatter(pages, ids, rows)],
        args=(pool, np.zeros(size, np.int32), rows),
        donate=(0,),
        out_shardings=None if len(pool.sharding.device_set) == 1 else [pool.sharding],
        custom_calls=UNSTABLE_CUSTOM_CALLS,
    )


def _on_each_device(
    move: Callable[..., jax.Array], sharding: Sharding, *, takes_rows: bool
) -> Callable[..., jax.Array]:
    """The operation on each device's part of every page: XLA cannot split a kernel."""
    if not isinstance(sharding, NamedSharding):
        return move
    in_specs = (sharding.spec, PartitionSpec(), *([sharding.spec] if takes_rows else []))
    return jax.shard_map(
        move, mesh=sharding.mesh, in_specs=in_specs, out_specs=sharding.spec, check_vma=False
    )
