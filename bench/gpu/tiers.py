"""Part `tiers`: pages between the device and the host, against the link, and beside a running step.

Drives the engine's own mover (`jaxserve.transfers`) on the pool of an 8B shape: saves go through a
gather and pinned memory into slots, loads from slots through one array and a scatter. Then decode
steps run with and without such transfers under way.
"""

import threading
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from bench.gpu.engines import EngineSize, add_random, random_engine, replay, serve_batch
from bench.gpu.report import Context
from bench.gpu.timing import time_call
from bench.model_shapes import SHAPES, TINY
from jaxserve.engine import Engine
from jaxserve.kv.host_pool import HostPool
from jaxserve.kv.messages import Message
from jaxserve.kv.transfer_plan import PageSave, PieceLoad, TransferPlan
from jaxserve.pallas_kernels.paged_attention.api import get_backend, this_machine
from jaxserve.plan import StepPlan
from jaxserve.transfers import SIZES, STAGING_KIND, Transfers, with_memory_kind

HOST_BYTES = 4 << 30
BATCH = 16
STEPS = 60


class Mover:
    """`Transfers` with an inbox of its own."""

    def __init__(self, pool: "list[jax.Array]", host_bytes: int):
        self.arrived: deque[Message] = deque()
        self.wake = threading.Event()
        array = pool[0]
        self.host = HostPool(host_bytes, [array.shape[1:]], np.dtype(array.dtype))
        backend = get_backend("auto", this_machine())
        self.transfers = Transfers(self.host, pool, self.arrived, self.wake.set, backend, True)
        self.block_bytes = array.nbytes // array.shape[0]
        self.num_pages = array.shape[0]

    def save_plan(self, count: int) -> TransferPlan:
        slots = min(self.host.num_slots, self.num_pages)
        saves = (PageSave(0, i % slots, i % slots, 0) for i in range(count))
        return TransferPlan(saves=tuple(saves))

    def load_plan(self, piece_id: int, count: int) -> TransferPlan:
        pages = np.arange(count, dtype=np.int32) % self.num_pages
        return TransferPlan(loads=(PieceLoad(piece_id, (pages,)),))

    def wait(self, count: int) -> None:
        """Until so many messages have arrived."""
        while len(self.arrived) < count:
            self.wake.wait(0.2)
            self.wake.clear()
        self.arrived.clear()


def run(context: Context) -> None:
    shape = TINY if context.is_tiny else SHAPES["Llama-3.1-8B"]
    batch = 2 if context.is_tiny else BATCH
    size = EngineSize(
        batch=batch,
        max_len=64 if context.is_tiny else 2048,
        chunk=32 if context.is_tiny else 2048,
    )
    host_bytes = 4 << 20 if context.is_tiny else HOST_BYTES
    with random_engine(shape, size) as engine:
        mover = Mover(engine._runner.pool, host_bytes)
        try:
            blocks = min(SIZES[-1], mover.host.num_slots, mover.num_pages)
            with context.attempt({"figure": "moves"}):
                _time_moves(context, engine, mover, blocks)
            with context.attempt({"figure": "whole"}):
                _time_saves_and_loads(context, engine, mover, blocks)
            with context.attempt({"figure": "overlap"}):
                _time_overlap(context, engine, mover, blocks, batch)
        finally:
            mover.transfers.close()


def _time_moves(context: Context, engine: Engine, mover: Mover, blocks: int) -> None:
    """Each hop by itself: gather, to pinned memory, into slots; slots to the device, scatter."""
    pool = engine._runner.pool[0]
    pinned = with_memory_kind(pool.sharding, STAGING_KIND)
    rows = jax.jit(lambda pool: pool[:blocks])(pool)
    there = jax.block_until_ready(jax.device_put(rows, pinned))
    slots = np.stack([mover.host.block(i, 0) for i in range(blocks)])
    limits = context.limits
    measures: dict[str, tuple[Any, float]] = {
        "pages to pinned": (lambda: jax.device_put(rows, pinned), limits.to_host_bytes_per_s),
        "pinned to pages": (lambda: jax.device_put(there, pool.sharding), _to_device(context)),
        "slots to pages": (lambda: jax.device_put(slots, pool.sharding), _to_device(context)),
        "pinned into slots": (lambda: [_copy_into_slots(mover, there)], 0.0),
    }
    for name, (move, rate) in measures.items():
        seconds = time_call(move, repeats=2 if context.is_tiny else 10)
        _line(context, name, blocks * mover.block_bytes, seconds, rate)


def _copy_into_slots(mover: Mover, there: jax.Array) -> jax.Array:
    for slot, block in enumerate(np.asarray(there)):
        np.copyto(mover.host.block(slot, 0), block)
    return there


def _time_saves_and_loads(context: Context, engine: Engine, mover: Mover, blocks: int) -> None:
    """Many pieces one after the other, through all hops, as the engine moves them."""
    runner, transfers = engine._runner, mover.transfers
    rounds = 2 if context.is_tiny else 16
    runner._device[: runner._num_pool] = transfers.execute(mover.save_plan(blocks), runner.pool)
    mover.wait(blocks)
    start_s = time.perf_counter()
    for _ in range(rounds):
        transfers.execute(mover.save_plan(blocks), runner.pool)
    mover.wait(rounds * blocks)
    seconds = (time.perf_counter() - start_s) / rounds
    rate = context.limits.to_host_bytes_per_s
    _line(context, "save, all hops", blocks * mover.block_bytes, seconds, rate)
    for timed in (False, True):
        start_s = time.perf_counter()
        for piece in range(rounds if timed else 1):
            transfers.stage(piece, range(blocks))
            mover.wait(1)
            plan = mover.load_plan(piece, blocks)
            runner._device[: runner._num_pool] = transfers.execute(plan, runner.pool)
        jax.block_until_ready(runner.pool)
        seconds = (time.perf_counter() - start_s) / rounds
    rate = _to_device(context)
    _line(context, "load, all hops", blocks * mover.block_bytes, seconds, rate)


def _time_overlap(context: Context, engine: Engine, mover: Mover, blocks: int, batch: int) -> None:
    """Decode steps alone, and with saves and loads under way all the time; twice each, in turn."""
    prompt_len = 8 if context.is_tiny else 1024
    add_random(engine, batch, prompt_len, 64, seed=5)
    plan = serve_batch(engine, batch, 3).plan
    if plan is None:
        raise RuntimeError("no step in which all sequences decoded")
    steps = 3 if context.is_tiny else STEPS
    alone, moved = [], {"save": [], "load": []}
    num_bytes = {"save": 0, "load": 0}
    for _ in range(1 if context.is_tiny else 2):
        alone.append(replay(engine, plan, steps))
        for kind in moved:
            seconds, count = _steps_with(engine, mover, plan, steps, kind, blocks)
            moved[kind].append(seconds)
            num_bytes[kind] = count
    for kind, times_s in moved.items():
        context.line(
            figure=f"step with {kind}s under way",
            step_us=round(min(times_s) * 1e6, 1),
            alone_us=round(min(alone) * 1e6, 1),
            cost=round(min(times_s) / min(alone) - 1, 4),
            gb_s=round(num_bytes[kind] / (min(times_s) * steps) / 1e9, 2),
        )


def _steps_with(
    engine: Engine, mover: Mover, plan: StepPlan, count: int, kind: str, blocks: int
) -> "tuple[float, int]":
    """Seconds of a step, and bytes moved meanwhile; one transfer is always under way."""
    runner, transfers, under_way, num_bytes = engine._runner, mover.transfers, 0, 0
    mover.arrived.clear()
    handle = runner.dispatch(plan)
    jax.block_until_ready(handle.outputs)
    previous, start_s = None, time.perf_counter()
    for index in range(count):
        if kind == "save" and len(mover.arrived) >= under_way:
            mover.arrived.clear()
            runner._device[: runner._num_pool] = transfers.execute(
                mover.save_plan(blocks), runner.pool
            )
            under_way, num_bytes = blocks, num_bytes + blocks * mover.block_bytes
        elif kind == "load":
            if under_way and mover.arrived:
                mover.arrived.clear()
                loaded = mover.load_plan(under_way, blocks)
                runner._device[: runner._num_pool] = transfers.execute(loaded, runner.pool)
                under_way, num_bytes = 0, num_bytes + blocks * mover.block_bytes
            if not under_way:
                under_way = 1000 + index
                transfers.stage(under_way, range(blocks))
        handle = runner.dispatch(plan)
        if previous is not None:  # one step ahead, as the engine is
            jax.block_until_ready(previous.outputs)
        previous = handle
    jax.block_until_ready(handle.outputs)
    seconds = (time.perf_counter() - start_s) / count
    if kind == "load" and under_way:
        mover.wait(1)
        transfers.drop(under_way)
    elif kind == "save":
        mover.wait(under_way)
    return seconds, num_bytes


def _to_device(context: Context) -> float:
    return context.limits.to_device_bytes_per_s


def _line(context: Context, name: str, num_bytes: int, seconds: float, rate: float) -> None:
    context.line(
        figure=name,
        bytes=num_bytes,
        us=round(seconds * 1e6, 1),
        gb_s=round(num_bytes / seconds / 1e9, 2),
        fraction=round(num_bytes / seconds / rate, 4) if rate else None,
    )
