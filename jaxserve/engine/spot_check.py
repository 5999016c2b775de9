"""Spot checks of kept blocks: computes random ones again and compares them with every copy.

A block's name does not tell its tokens, so only blocks of known prompts can be chosen. Copies are
equal to the last bit where they were computed in steps of the same shape; else they differ by
rounding. For a thread that may wait; see `KVAdmin`.
"""

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from jaxserve.engine.core import Engine
from jaxserve.engine.recent_prompts import KnownPrompt
from jaxserve.engine.recompute import Difference, Recomputation, compare
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import sealed_bytes
from jaxserve.kv.reports import MAX_RELATIVE_ERROR, RecomputeCheck
from jaxserve.kv.upkeep import probe, read_payload, remove

T = TypeVar("T")


class Run(Protocol):
    """Runs a function on the engine's thread, between steps, and returns what it returned."""

    def __call__(self, function: Callable[[], T]) -> T: ...


class _Candidate(NamedTuple):
    prompt_index: int
    block: int


class SpotCheck:
    """Compares what is kept with what is computed.

    Args:
        engine, run, wait: as for `KVAdmin`.
    """

    def __init__(self, engine: Engine, run: Run, wait: Callable[[threading.Event], object]):
        self._engine = engine
        self._control = engine.tier_control
        self._run = run
        self._wait = wait

    def run(
        self,
        count: int,
        prompts: Sequence[KnownPrompt] | None,
        seed: int | None,
        progress: Callable[[int], object],
    ) -> RecomputeCheck:
        """Choose blocks at random, compute them again and compare; delete what is wrong.

        Args:
            prompts: whose blocks to choose from; None: the engine's recent ones.
            progress: told how many blocks are done.
        """
        is_given = prompts is not None
        if prompts is None:
            prompts = self._run(self._control.prompts.all)
        names = [self._run(lambda p=p: self._control.names_of(p)) for p in prompts]
        candidates = self._candidates(names)
        random.Random(seed).shuffle(candidates)
        chosen = sorted(candidates[:count])
        note = ""
        if len(chosen) < count:
            source = "given" if is_given else "recent"
            note = (
                f"only {len(chosen)} blocks of {len(prompts)} {source} prompts are in lower tiers"
            )
        differences: list[tuple[BlockHash, Difference]] = []
        num_skipped = num_done = 0
        for prompt_index, group in itertools.groupby(chosen, key=lambda one: one.prompt_index):
            blocks = [one.block for one in group]
            task = self._compute(prompts[prompt_index], names[prompt_index], blocks)
            for block in blocks:
                found = [] if task is None else self._compare(task, block)
                num_skipped += not found
                differences += [(names[prompt_index][block], one) for one in found]
                num_done += 1
                progress(num_done)
        wrong = {name for name, one in differences if one.relative_error > MAX_RELATIVE_ERROR}
        if wrong:
            self._delete(list(wrong))
        return RecomputeCheck(
            num_wanted=count,
            num_compared=len(differences),
            num_equal=sum(one.is_equal for _, one in differences),
            num_skipped=num_skipped,
            max_abs_difference=max((one.max_abs for _, one in differences), default=0.0),
            max_relative_error=max((one.relative_error for _, one in differences), default=0.0),
            num_wrong=len(wrong),
            note=note,
        )

    def _candidates(self, names: Sequence[Sequence[BlockHash]]) -> list[_Candidate]:
        """Blocks of the prompts that the host or a store has; each name once."""
        flat = list({name: None for chain in names for name in chain})
        there = self._run(lambda: self._control.on_host(flat))
        for worker in self._control.workers:
            there |= probe(worker, flat) or set()
        candidates = []
        for prompt_index, chain in enumerate(names):
            for block, name in enumerate(chain):
                if name in there:
                    there.discard(name)
                    candidates.append(_Candidate(prompt_index, block))
        return candidates

    def _compute(
        self, prompt: KnownPrompt, names: Sequence[BlockHash], blocks: Sequence[int]
    ) -> Recomputation | None:
        recomputer = self._engine.recomputer
        if recomputer is None:
            return None
        task = self._run(lambda: recomputer.start(prompt.token_ids, names, blocks))
        if task is not None:
            self._wait(task.done)
        return task

    def _compare(self, task: Recomputation, block: int) -> list[Difference]:
        """One difference for each copy of a block that could be read."""
        lower, name = self._engine.lower, task.names[block]
        computed = task.computed.get(block)
        if computed is None or lower is None:
            return []
        copies = [task.on_host[block]] if block in task.on_host else []
        tenant = lower.tiers.labels.of(name)
        for worker in self._control.workers:
            record_bytes = sealed_bytes(lower.pool.slot_bytes, lower.keys is not None)
            payload = read_payload(
                worker,
                name,
                record_bytes,
                lower.pool.slot_bytes,
                lower.namespace,
                tenant,
                lower.keys,
            )
            if payload is not None:
                copies.append(lower.pool.blocks_of(memoryview(payload)))
        dtype = np.dtype(self._engine.kv_dtype)
        found = (compare(copy, computed, dtype) for copy in copies)
        return [one for one in found if one is not None]

    def _delete(self, names: list[BlockHash]) -> None:
        self._run(lambda: self._control.forget(names))
        for worker in self._control.workers:
            remove(worker, lambda store: store.delete(names))
        self._run(lambda: self._control.forget_stores(names))
