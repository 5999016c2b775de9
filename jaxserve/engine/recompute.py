"""Computes blocks again and reads them off the device, to compare them with what tiers keep.

A prompt is computed as a request of its own: under a salt that nobody has, so that nothing is
reused, and with no-store, so that nothing is kept. Once its first token is there, its pages hold
its blocks. All methods are for the engine's thread. Knows nothing of stores.
"""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxserve.engine.tiers import LowerTiers
from jaxserve.errors import RequestError
from jaxserve.kv.blocks import BlockHash
from jaxserve.runner import Runner
from jaxserve.scheduler import Scheduler
from jaxserve.types import Request, SamplingParams, TokenEvent

SAMPLING = SamplingParams(temperature=0.0, max_tokens=2, seed=0, ignore_eos=True)
"""Two tokens: the request still holds its pages when the first one is there."""


@dataclass(slots=True, eq=False)
class Recomputation:
    """One prompt on its way.

    Attributes:
        blocks: indices of the blocks that are wanted.
        names: of all blocks of the prompt, as tiers know them.
        done: set when nothing more will come.
        computed: by block, the block of each KV group; None: it slid out of the group's window.
        on_host: by block, a copy of what the host had at the same time.
    """

    blocks: tuple[int, ...]
    names: Sequence[BlockHash]
    done: threading.Event = field(default_factory=threading.Event)
    computed: dict[int, list[np.ndarray | None]] = field(default_factory=dict)
    on_host: dict[int, list[np.ndarray]] = field(default_factory=dict)


class Recomputer:
    """Recomputations of one engine.

    Args:
        scheduler, runner, lower: the engine's.
        max_model_len: most tokens of a sequence.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, lower: LowerTiers, max_model_len: int):
        self._scheduler = scheduler
        self._runner = runner
        self._lower = lower
        self._max_model_len = max_model_len
        self._live: dict[str, Recomputation] = {}

    @property
    def is_active(self) -> bool:
        """Whether some events are meant for `take`."""
        return bool(self._live)

    def start(
        self, token_ids: Sequence[int], names: Sequence[BlockHash], blocks: Sequence[int]
    ) -> Recomputation | None:
        """Compute a prompt; `done` of the result is set later. None: it cannot be served."""
        task = Recomputation(tuple(blocks), names)
        request_id = f"recompute-{secrets.token_hex(8)}"
        request = Request(
            request_id,
            tuple(token_ids[: self._max_model_len - SAMPLING.max_tokens]),  # pyright: ignore
            SAMPLING,
            arrival_s=time.monotonic(),
            cache_salt=secrets.token_hex(16),
            no_store=True,
        )
        try:
            self._scheduler.add(request)
        except RequestError:
            return None
        self._live[request_id] = task
        return task

    def take(self, events: list[TokenEvent]) -> list[TokenEvent]:
        """Pick out what belongs to recomputations; the rest is for others."""
        others = []
        for event in events:
            task = self._live.pop(event.request_id, None)
            if task is None:
                others.append(event)
                continue
            if event.finish_reason is None:
                self._read(event.request_id, task)
                self._scheduler.abort(event.request_id)
            task.done.set()
        return others

    def fail(self) -> None:
        """Nothing more will come."""
        for task in self._live.values():
            task.done.set()
        self._live.clear()

    def _read(self, request_id: str, task: Recomputation) -> None:
        pages = self._scheduler.held_pages(request_id)
        if pages is None:  # preempted in the step that follows
            return
        computed: dict[int, list[np.ndarray | None]] = {block: [] for block in task.blocks}
        for group, held in enumerate(pages):
            blocks = [block for block in task.blocks if block in held]
            arrays = dict.fromkeys(task.blocks)
            if blocks:
                wanted = [held[block] for block in blocks]
                read = self._lower.transfers.read(self._runner.pool, group, wanted)
                arrays |= dict(zip(blocks, read, strict=True))
            for block in task.blocks:
                computed[block].append(arrays[block])
        task.computed = computed
        host = self._lower.tiers.host
        for block in task.blocks:
            name = task.names[block]
            if host.is_complete(name):
                slot = host.acquire(name)
                copy = bytearray(self._lower.pool.slot(slot))
                host.release(slot)
                task.on_host[block] = self._lower.pool.blocks_of(memoryview(copy))


class Difference(NamedTuple):
    """How two copies of a block differ; the error is relative to the first one's norm."""

    is_equal: bool
    max_abs: float
    relative_error: float


def compare(
    kept: Sequence[np.ndarray], computed: Sequence[np.ndarray | None], dtype: np.dtype
) -> Difference | None:
    """Compare what a tier keeps with what was computed, as far as both are there.

    Args:
        dtype: what the bytes mean; the arrays may be raw bits of the same width.

    Returns:
        None if no group's block can be compared.
    """
    pairs = [(a, b) for a, b in zip(kept, computed, strict=True) if b is not None]
    if not pairs:
        return None
    is_equal = all(a.tobytes() == b.tobytes() for a, b in pairs)
    if is_equal:
        return Difference(True, 0.0, 0.0)
    max_abs = square_error = square_norm = 0.0
    for a, b in pairs:
        stored = np.ascontiguousarray(a).view(dtype).astype(np.float64)
        fresh = np.ascontiguousarray(b).view(dtype).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(stored - fresh)
        if not np.isfinite(error).all():
            return Difference(False, float("inf"), float("inf"))
        max_abs = max(max_abs, float(error.max()))
        square_error += float((error * error).sum())
        square_norm += float((fresh * fresh).sum())
    relative = (square_error / square_norm) ** 0.5 if square_norm else float("inf")
    return Difference(False, max_abs, relative)
