"""Owns the parameters, the KV pool, the slot state and the compiled steps.

One compiled program per bucket, made ahead of time, so that serving can never compile. `dispatch`
returns at once with device futures; `fetch` waits for them. The pool and the state are donated to
each program and replaced by its outputs. Knows nothing of requests or policies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxserve.attend import build_attend, close_cache, open_cache
from jaxserve.batch import (
    FLOAT_PARAMS,
    INT_PARAMS,
    Batch,
    SlotState,
    StateShape,
    load_slot,
    pack,
    pack_load,
    packed_size,
    unpack,
)
from jaxserve.kv.pool import KVPool
from jaxserve.models import decoder
from jaxserve.models.config import DecoderConfig
from jaxserve.pallas_kernels.paged_attention.api import Backend
from jaxserve.plan import Bucket, StepPlan, StepResult
from jaxserve.sampling import Logprobs, SamplingBatch, sample, token_logprobs
from jaxserve.types import MAX_LOGPROBS, KVGroup, Progress, no_progress

PROMPT_LOGPROB_TILE = 64


@dataclass(frozen=True, slots=True)
class StepHandle:
    """Futures of a dispatched step."""

    plan: StepPlan
    outputs: "dict[str, jax.Array]"


@dataclass(frozen=True, slots=True)
class StepProgram:
    """Everything static about a step, so that it can be traced for any bucket."""

    model: DecoderConfig
    kv_groups: tuple[KVGroup, ...]
    shape: StateShape
    backend: Backend
    mesh: Mesh | None

    def __call__(
        self,
        params: Any,
        pool: KVPool,
        state: SlotState,
        packed: jax.Array,
        *,
        bucket: Bucket,
    ) -> tuple[KVPool, SlotState, "dict[str, jax.Array]"]:
        """One step; donates pool and state."""
        batch = unpack(packed, bucket, self.shape)
        state = _update_tables(state, batch)
        tokens_t = state.token_ids[batch.row_slot[batch.token_row], batch.position]
        attend = build_attend(
            batch=batch,
            state=state,
            kv_groups=self.kv_groups,
            page_size=self.shape.page_size,
            has_prefills=not bucket.is_decode,
            model=self.model,
            backend=self.backend,
            mesh=self.mesh,
        )
        hidden_td, cache = decoder.forward(
            params, self.model, tokens_t, batch.position, attend, open_cache(pool)
        )
        pool = close_cache(cache, pool)
        hidden_rd = hidden_td
        if not bucket.is_decode:
            hidden_rd = hidden_td[jnp.maximum(batch.row_start + batch.row_len - 1, 0)]
        with jax.named_scope("logits"):
            logits_rv = decoder.compute_logits(params, self.model, hidden_rd)
        with jax.named_scope("sample"):
            token_r = sample(logits_rv, _sampling_batch(state, batch))
        outputs = {"token_ids": token_r, **_logprobs(logits_rv, token_r, batch.wants_logprobs)}
        if not bucket.is_decode:
            outputs |= self._prompt_logprobs(params, state, batch, hidden_td)
        slot_r = jnp.where(batch.row_samples > 0, batch.row_slot, self.shape.num_slots)
        token_ids = state.token_ids.at[slot_r, batch.row_kv_len].set(token_r)
        return pool, _replace(state, token_ids=token_ids), outputs

    def _prompt_logprobs(
        self, params: Any, state: SlotState, batch: Batch, hidden_td: jax.Array
    ) -> "dict[str, jax.Array]":
        """Log-probability of the token after each position, tile by tile, only if wanted."""
        num_tokens = hidden_td.shape[0]
        tile = min(PROMPT_LOGPROB_TILE, num_tokens)
        slot_t = batch.row_slot[batch.token_row]
        target_t = state.token_ids.at[slot_t, batch.position + 1].get(mode="clip")

        def one_tile(index, carry):
            start = jnp.minimum(index * tile, num_tokens - tile)
            hidden = lax.dynamic_slice_in_dim(hidden_td, start, tile)
            target = lax.dynamic_slice_in_dim(target_t, start, tile)
            logits = decoder.compute_logits(params, self.model, hidden)
            update = token_logprobs(logits, target, MAX_LOGPROBS)
            return jax.tree.map(
                lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, axis=0),
                carry,
                update,
            )

        num_tiles = jnp.where(
            batch.wants_prompt_logprobs > 0, (batch.row_len.sum() + tile - 1) // tile, 0
        )
        start = _no_logprobs(num_tokens, self.model.vocab_size)
        found = lax.fori_loop(0, num_tiles, one_tile, start)
        return {
            "prompt_logprobs": found.logprob_r,
            "prompt_top_ids": found.top_ids_rn,
            "prompt_top_logprobs": found.top_logprobs_rn,
        }


def _update_tables(state: SlotState, batch: Batch) -> SlotState:
    group = jnp.arange(batch.update_slot.shape[0], dtype=jnp.int32)[:, None]
    tables = state.page_tables.at[group, batch.update_slot, batch.update_index].set(
        batch.update_page, mode="drop"
    )
    return _replace(state, page_tables=tables)


def _replace(state: SlotState, **changes: jax.Array) -> SlotState:
    names = SlotState.__dataclass_fields__
    return SlotState(**{name: changes.get(name, getattr(state, name)) for name in names})


def _no_logprobs(rows: int, vocab_size: int) -> Logprobs:
    num_top = min(MAX_LOGPROBS, vocab_size)
    return Logprobs(
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, num_top), jnp.int32),
        jnp.zeros((rows, num_top), jnp.float32),
    )


def _logprobs(
    logits_rv: jax.Array, token_r: jax.Array, wanted: jax.Array
) -> "dict[str, jax.Array]":
    found = lax.cond(
        wanted > 0,
        lambda: token_logprobs(logits_rv, token_r, MAX_LOGPROBS),
        lambda: _no_logprobs(*logits_rv.shape),
    )
    return {
        "logprobs": found.logprob_r,
        "top_ids": found.top_ids_rn,
        "top_logprobs": found.top_logprobs_rn,
    }


def _sampling_batch(state: SlotState, batch: Batch) -> SamplingBatch:
    floats = state.float_params[batch.row_slot]
    ints = state.int_params[batch.row_slot]
    params = {name: floats[:, i] for i, name in enumerate(FLOAT_PARAMS)}
    params |= {name: ints[:, i] for i, name in enumerate(INT_PARAMS)}
    return SamplingBatch(
        slot=batch.row_slot,
        active=batch.row_samples > 0,
        position=batch.row_kv_len,
        length=batch.row_kv_len,
        token_ids=state.token_ids,
        stop_ids=state.stop_ids,
        bias_ids=state.bias_ids,
        bias_values=state.bias_values,
        allow_bits=state.allow_bits,
        **params,
    )


class Runner:
    """Executes plans, in the order they are dispatched."""

    def __init__(
        self,
        program: StepProgram,
        params: Any,
        pool: KVPool,
        state: SlotState,
        buckets: tuple[Bucket, ...],
    ):
        self._program = program
        self._params = params
        self._pool = pool
        self._state = state
        self._buckets = buckets
        self._steps: dict[Bucket, Callable[..., Any]] = {}
        self._load_slot: Callable[..., Any] | None = None

    @property
    def num_graphs(self) -> int:
        """Compiled programs: one per bucket, and the one that fills a slot."""
        return len(self._steps) + (self._load_slot is not None)

    def compile(self, progress: Progress = no_progress) -> None:
        """Compile every program ahead of time, with a call of `progress` after each."""
        total = len(self._buckets) + 1
        for done, bucket in enumerate(self._buckets):
            progress("compile", done, total)
            self._steps[bucket] = self._compile_step(bucket)
        self._load_slot = self._compile_load()
        progress("compile", total, total)

    def _compile_step(self, bucket: Bucket) -> Callable[..., Any]:
        step = jax.jit(
            partial(self._program.__call__, bucket=bucket),
            donate_argnums=(1, 2),
            out_shardings=(_shardings(self._pool), _shardings(self._state), None),
        )
        packed = np.zeros(packed_size(bucket, self._program.shape), np.int32)
        return step.lower(self._params, self._pool, self._state, packed).compile()

    def _compile_load(self) -> Callable[..., Any]:
        shape = self._program.shape
        size = 1 + sum(
            array.size // (shape.num_slots + 1) for array in jax.tree.leaves(self._state)
        )
        load = jax.jit(
            partial(load_slot, shape=shape),
            donate_argnums=0,
            out_shardings=_shardings(self._state),
        )
        return load.lower(self._state, np.zeros(size, np.int32)).compile()

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Enqueue a plan on the device and return at once."""
        if plan.bucket not in self._steps:  # warm-up was turned off
            self._steps[plan.bucket] = self._compile_step(plan.bucket)
        if self._load_slot is None:
            self._load_slot = self._compile_load()
        for load in plan.slot_loads:
            self._state = self._load_slot(self._state, pack_load(load, self._program.shape))
        packed = pack(plan, self._program.shape)
        step = self._steps[plan.bucket]
        self._pool, self._state, outputs = step(self._params, self._pool, self._state, packed)
        for name in _wanted(plan):
            outputs[name].copy_to_host_async()
        return StepHandle(plan, outputs)

    def fetch(self, handle: StepHandle) -> StepResult:
        """Wait for a dispatched step and bring what its plan wants to the host."""
        return StepResult(**{name: np.asarray(handle.outputs[name]) for name in _wanted(handle.plan)})

    def close(self) -> None:
        """Delete the device arrays; the runner cannot be used afterwards."""
        for array in jax.tree.leaves((self._params, self._pool, self._state)):
            array.delete()

    def read_pages(self, group: int, pages: np.ndarray) -> np.ndarray:
        """Copy pages of a KV group to the host: [len(pages), L, 2, K, P, H]."""
        return np.asarray(self._pool.groups[group][pages])


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding, tree)


def _wanted(plan: StepPlan) -> tuple[str, ...]:
    names = ("token_ids",)
    if plan.wants_logprobs:
        names += ("logprobs", "top_ids", "top_logprobs")
    if plan.wants_prompt_logprobs:
        names += ("prompt_logprobs", "prompt_top_ids", "prompt_top_logprobs")
    return names
