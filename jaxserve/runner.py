"""Owns the parameters, the KV pool, the slot state and the compiled steps.

One compiled program per bucket, made ahead of time, so that serving can never compile. `dispatch`
returns at once with device futures; `fetch` waits for them. The pool and the state are donated to
each program and replaced by its outputs. Knows nothing of requests or policies.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxserve.attend import build_attend, close_cache, open_cache
from jaxserve.batch import (
    Batch,
    SlotState,
    StateShape,
    load_size,
    load_slot,
    pack,
    pack_load,
    packed_size,
    unpack,
)
from jaxserve.constrained import (
    CONSTRAINED_ROWS,
    constrained_size,
    logprobs_if,
    no_logprobs,
    pack_constrained,
    sample_constrained,
    sampling_batch,
)
from jaxserve.kv.pool import KVPool
from jaxserve.kv.transfer_plan import NO_TRANSFERS
from jaxserve.models import decoder
from jaxserve.models import layers as nn
from jaxserve.models.config import DecoderConfig
from jaxserve.pallas_kernels.cpu import build
from jaxserve.pallas_kernels.paged_attention.api import UNSTABLE_CUSTOM_CALLS, Backend
from jaxserve.plan import (
    NO_STATES,
    NO_STEP,
    Bucket,
    ConstrainedRow,
    PageUpdates,
    PrefillChunk,
    SlotLoad,
    StepPlan,
    StepResult,
)
from jaxserve.programs import ProgramSpec, ProgramStore, compile_all
from jaxserve.sampling import sample, token_logprobs
from jaxserve.transfers import Transfers
from jaxserve.types import MAX_LOGPROBS, KVGroup, Progress, SamplingParams, no_progress

PROMPT_LOGPROB_TILE = 64
LOAD_SLOT = "load slot"
STATE_ROWS = 64
"""Logits that somebody wants to see are computed in tiles of so many rows."""
SAMPLE_CONSTRAINED = "sample constrained"
DECODE_OUTPUTS = ("token_ids", "logprobs", "top_ids", "top_logprobs")
PROMPT_OUTPUTS = ("prompt_logprobs", "prompt_top_ids", "prompt_top_logprobs")
HIDDEN, TOKEN_HIDDEN = "hidden", "token_hidden"


@dataclass(frozen=True, slots=True)
class ConstrainedTile:
    """Futures of the tokens of some constrained rows of a step."""

    rows: tuple[int, ...]
    outputs: "dict[str, jax.Array]"


@dataclass(frozen=True, slots=True)
class StepHandle:
    """Futures of a dispatched step."""

    plan: StepPlan
    outputs: "dict[str, jax.Array]"
    logits: "dict[str, list[jax.Array]]" = field(default_factory=dict)  # in tiles, by result
    dispatched_s: float = 0.0  # on time.perf_counter
    constrained: "tuple[ConstrainedTile, ...]" = ()

    @property
    def is_done(self) -> bool:
        """The device has finished the step."""
        outputs = [*self.outputs.values()]
        outputs += [x for tile in self.constrained for x in tile.outputs.values()]
        return all(x.is_ready() for x in outputs)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True)
class StepProgram:
    """Everything static about a step, so that it can be traced for any bucket."""

    model: DecoderConfig
    kv_groups: tuple[KVGroup, ...]
    shape: StateShape
    backend: Backend
    mesh: Mesh | None
    kernels: nn.Kernels = nn.XLA

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
            params,
            self.model,
            tokens_t,
            batch.position,
            attend,
            open_cache(pool),
            num_tokens=batch.row_len.sum(),
            kernels=self.kernels,
        )
        pool = close_cache(cache, pool)
        hidden_rd = hidden_td
        if not bucket.is_decode:
            hidden_rd = hidden_td[jnp.maximum(batch.row_start + batch.row_len - 1, 0)]
        with jax.named_scope("logits"):
            logits_rv = decoder.compute_logits(params, self.model, hidden_rd, kernels=self.kernels)
        with jax.named_scope("sample"):
            token_r = sample(
                logits_rv,
                sampling_batch(state, batch.row_slot, batch.row_samples > 0, batch.row_kv_len),
            )
        outputs = {"token_ids": token_r, **logprobs_if(batch.wants_logprobs, logits_rv, token_r)}
        outputs[HIDDEN] = hidden_rd
        if not bucket.is_decode:
            outputs |= self._prompt_logprobs(params, state, batch, hidden_td)
            outputs[TOKEN_HIDDEN] = hidden_td
        slot_r = jnp.where(batch.row_samples > 0, batch.row_slot, self.shape.num_slots)
        token_ids = state.token_ids.at[slot_r, batch.row_kv_len].set(token_r)
        kept_logits = lax.dynamic_update_slice_in_dim(state.kept_logits, logits_rv, 0, axis=0)
        return pool, replace(state, token_ids=token_ids, kept_logits=kept_logits), outputs

    def logits(self, params: Any, hidden_nd: jax.Array, start: jax.Array) -> jax.Array:
        """Logits of the rows [start, start + STATE_ROWS), or of the last so many rows."""
        num_rows = min(STATE_ROWS, hidden_nd.shape[0])
        rows = lax.dynamic_slice_in_dim(hidden_nd, start, num_rows)
        return decoder.compute_logits(params, self.model, rows, kernels=self.kernels)

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
            logits = decoder.compute_logits(params, self.model, hidden, kernels=self.kernels)
            update = token_logprobs(logits, target, MAX_LOGPROBS)
            return jax.tree.map(
                lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, axis=0),
                carry,
                update,
            )

        num_tiles = jnp.where(
            batch.wants_prompt_logprobs > 0, (batch.row_len.sum() + tile - 1) // tile, 0
        )
        start = no_logprobs(num_tokens, self.model.vocab_size)
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
    return replace(state, page_tables=tables)


class Runner:
    """Executes plans, in the order they are dispatched."""

    def __init__(
        self,
        program: StepProgram,
        params: Any,
        pool: KVPool,
        state: SlotState,
        buckets: tuple[Bucket, ...],
        store: ProgramStore,
    ):
        self.transfers: Transfers | None = None
        self._program = program
        self._buckets = buckets
        self._store = store
        self._params, self._params_tree = jax.tree.flatten(params)
        self._device, self._device_tree = jax.tree.flatten((pool, state))
        self._num_pool = len(jax.tree.leaves(pool))
        self._compiled: dict[str, jax.stages.Compiled] = {}

    @property
    def pool(self) -> "list[jax.Array]":
        """The pool's arrays, one per KV group, as they are now."""
        return self._device[: self._num_pool]

    @property
    def num_graphs(self) -> int:
        """Compiled programs: one per bucket, those that fill a slot and sample constrained rows,
        and those of transfers."""
        return len(self._compiled)

    @property
    def num_kept_graphs(self) -> int:
        """How many of them an earlier start had traced."""
        return self._store.num_kept

    def compile(self, progress: Progress = no_progress) -> None:
        """Compile every program ahead of time; `progress` hears of each."""
        specs = [self._step_spec(bucket) for bucket in self._buckets]
        moves = [] if self.transfers is None else self.transfers.specs()
        self._compiled = compile_all(
            self._store, [*specs, self._load_spec(), self._constrained_spec(), *moves], progress
        )
        if self.transfers is not None:
            self.transfers.use(self._compiled)

    def _step_spec(self, bucket: Bucket) -> ProgramSpec:
        num_params, num_device = len(self._params), len(self._device)

        def step(*leaves: jax.Array) -> "list[jax.Array]":
            params = jax.tree.unflatten(self._params_tree, leaves[:num_params])
            pool, state = jax.tree.unflatten(self._device_tree, leaves[num_params:-1])
            pool, state, outputs = self._program(params, pool, state, leaves[-1], bucket=bucket)
            return [*jax.tree.leaves((pool, state)), *(outputs[x] for x in _output_names(bucket))]

        packed = np.zeros(packed_size(bucket, self._program.shape), np.int32)
        return ProgramSpec(
            name=_step_name(bucket),
            function=step,
            args=(*self._params, *self._device, packed),
            donate=tuple(range(num_params, num_params + num_device)),
            out_shardings=self._out_shardings(self._device, len(_output_names(bucket))),
            custom_calls=(*build.TARGETS, *UNSTABLE_CUSTOM_CALLS),
        )

    def _load_spec(self) -> ProgramSpec:
        shape, state = self._program.shape, self._device[self._num_pool :]
        state_tree = jax.tree.structure(jax.tree.unflatten(self._device_tree, self._device)[1])

        def load(*leaves: jax.Array) -> "list[jax.Array]":
            old = jax.tree.unflatten(state_tree, leaves[:-1])
            return jax.tree.leaves(load_slot(old, leaves[-1], shape))

        return ProgramSpec(
            name=LOAD_SLOT,
            function=load,
            args=(*state, np.zeros(load_size(shape), np.int32)),
            donate=tuple(range(len(state))),
            out_shardings=self._out_shardings(state),
        )

    def _constrained_spec(self) -> ProgramSpec:
        shape, state = self._program.shape, self._device[self._num_pool :]
        state_tree = jax.tree.structure(jax.tree.unflatten(self._device_tree, self._device)[1])

        def constrained(*leaves: jax.Array) -> "list[jax.Array]":
            old = jax.tree.unflatten(state_tree, leaves[:-1])
            new, outputs = sample_constrained(old, leaves[-1], shape)
            return [*jax.tree.leaves(new), *(outputs[name] for name in DECODE_OUTPUTS)]

        return ProgramSpec(
            name=SAMPLE_CONSTRAINED,
            function=constrained,
            args=(*state, np.zeros(constrained_size(shape), np.int32)),
            donate=tuple(range(len(state))),
            out_shardings=self._out_shardings(state, len(DECODE_OUTPUTS)),
        )

    def _out_shardings(self, kept: "list[jax.Array]", num_others: int = 0) -> Any:
        """What is donated comes back where it was; one device needs no word about it."""
        if self._program.mesh is None:
            return None
        return [*(array.sharding for array in kept), *[None] * num_others]

    def _get(self, name: str, spec: Callable[[], ProgramSpec]) -> "jax.stages.Compiled":
        if name not in self._compiled:  # warm-up was turned off
            self._compiled[name] = self._store.lower(spec()).compile()
        return self._compiled[name]

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Enqueue a plan on the device and return at once."""
        shape, start_s = self._program.shape, time.perf_counter()
        if plan.transfers is not NO_TRANSFERS:
            assert self.transfers is not None, "a plan moves blocks, but there are no lower tiers"
            self._device[: self._num_pool] = self.transfers.execute(plan.transfers, self.pool)
        for slot_load in plan.slot_loads:
            load = self._get(LOAD_SLOT, self._load_spec)
            state = self._device[self._num_pool :]
            self._device[self._num_pool :] = load(*state, pack_load(slot_load, shape))
        bucket = plan.bucket
        if bucket == NO_STEP:
            return StepHandle(plan, {}, dispatched_s=start_s)
        step = self._get(_step_name(bucket), lambda: self._step_spec(bucket))
        results = step(*self._params, *self._device, pack(plan, shape))
        num_device = len(self._device)
        self._device = results[:num_device]
        outputs = dict(zip(_output_names(bucket), results[num_device:], strict=True))
        for name in _wanted(plan):
            outputs[name].copy_to_host_async()
        logits = {}
        if plan.states.row_logits:
            logits["logits"] = self._logits(outputs[HIDDEN], plan.num_rows)
        if plan.states.token_logits and plan.prefills:
            logits["token_logits"] = self._logits(outputs[TOKEN_HIDDEN], plan.num_tokens)
        return StepHandle(plan, outputs, logits, start_s)

    def _logits(self, hidden_nd: jax.Array, num_rows: int) -> "list[jax.Array]":
        """Logits of the first rows, in tiles; compiled when they are asked for the first time."""
        num_hidden = hidden_nd.shape[0]
        tile = min(STATE_ROWS, num_hidden)

        def logits(*leaves: jax.Array) -> "list[jax.Array]":
            params = jax.tree.unflatten(self._params_tree, leaves[:-2])
            return [self._program.logits(params, leaves[-2], leaves[-1])]

        spec = ProgramSpec(
            name=f"logits {num_hidden}",
            function=logits,
            args=(*self._params, hidden_nd, np.int32(0)),
            donate=(),
            custom_calls=(*build.TARGETS, *UNSTABLE_CUSTOM_CALLS),
        )
        program = self._get(spec.name, lambda: spec)
        starts = range(0, num_rows, tile)
        tiles = [program(*self._params, hidden_nd, np.int32(start))[0] for start in starts]
        for array in tiles:
            array.copy_to_host_async()
        return tiles

    def sample_constrained(
        self, handle: StepHandle, rows: Sequence[ConstrainedRow], masks_rw: np.ndarray
    ) -> StepHandle:
        """Enqueue the sampling of constrained rows of the step that was dispatched last.

        Args:
            rows: those that still want a token.
            masks_rw: packed bits of the tokens that each may get, [len(rows), ceil(V / 32)] int32.
        """
        tiles = []
        for start in range(0, len(rows), CONSTRAINED_ROWS):
            tile = rows[start : start + CONSTRAINED_ROWS]
            program = self._get(SAMPLE_CONSTRAINED, self._constrained_spec)
            state = self._device[self._num_pool :]
            masks = masks_rw[start : start + CONSTRAINED_ROWS]
            packed = pack_constrained(tile, masks, handle.plan.wants_logprobs, self._program.shape)
            results = program(*state, packed)
            self._device[self._num_pool :] = results[: len(state)]
            outputs: dict[str, jax.Array] = dict(
                zip(DECODE_OUTPUTS, results[len(state) :], strict=True)
            )
            for name in _sampled(handle.plan):
                outputs[name].copy_to_host_async()
            tiles.append(ConstrainedTile(tuple(row.row for row in tile), outputs))
        return replace(handle, constrained=tuple(tiles))

    def time_prefill(self, bucket: Bucket) -> float:
        """Seconds of a step that computes a prompt which fills this bucket.

        Writes into the first pages: for a start, when nobody holds any.
        """
        shape = self._program.shape
        num_pages = min(array.shape[0] for array in self.pool)
        num_tokens = min(bucket.num_tokens, shape.max_len, num_pages * shape.page_size)
        token_ids = np.arange(num_tokens, dtype=np.int32) % shape.vocab_size
        pages = np.arange(-(-num_tokens // shape.page_size), dtype=np.int32)
        sampling = SamplingParams(temperature=0.0, seed=0)
        nothing = np.zeros(0, np.int32)
        plan = StepPlan(
            step_id=0,
            bucket=bucket,
            slot_loads=(
                SlotLoad(0, (pages,) * shape.num_groups, token_ids, num_tokens, sampling, ()),
            ),
            decode_slots=nothing,
            decode_positions=nothing,
            prefills=(PrefillChunk(0, 0, num_tokens, token_ids, samples=True),),
            page_updates=(PageUpdates(nothing, nothing, nothing),) * self._num_pool,
        )
        jax.block_until_ready(self.dispatch(plan).outputs)
        plan = replace(plan, slot_loads=())
        times_s = []
        for _ in range(2):
            start_s = time.perf_counter()
            jax.block_until_ready(self.dispatch(plan).outputs)
            times_s.append(time.perf_counter() - start_s)
        return min(times_s)

    def fetch(self, handle: StepHandle) -> StepResult:
        """Wait for a dispatched step and bring what its plan wants to the host."""
        if handle.plan.bucket == NO_STEP:
            return StepResult(np.zeros(0, np.int32))
        plan = handle.plan
        wanted = {name: np.asarray(handle.outputs[name]) for name in _wanted(plan)}
        if handle.constrained:
            _fill_in(wanted, handle)
        for name in (HIDDEN, TOKEN_HIDDEN):
            if name in wanted:
                wanted[name] = wanted[name].astype(np.float32)
        for name, tiles in handle.logits.items():
            num_rows = plan.num_rows if name == "logits" else plan.num_tokens
            num_hidden = plan.bucket.num_rows if name == "logits" else plan.bucket.num_tokens
            wanted[name] = _join_tiles(tiles, num_rows, num_hidden)
        return StepResult(**wanted)

    def close(self) -> None:
        """Delete the device arrays; the runner cannot be used afterwards."""
        if self.transfers is not None:
            self.transfers.close()
        for array in (*self._params, *self._device):
            array.delete()

    def read_pages(self, group: int, pages: np.ndarray) -> np.ndarray:
        """Copy pages of a KV group to the host: [len(pages), L, parts, K, P, H]."""
        return np.asarray(self._device[group][pages])


def _step_name(bucket: Bucket) -> str:
    kind = "decode" if bucket.is_decode else "mixed"
    return f"{kind} {bucket.num_tokens}x{bucket.num_rows}"


def _output_names(bucket: Bucket) -> tuple[str, ...]:
    """Results of a step after pool and state, in order."""
    names = (*DECODE_OUTPUTS, HIDDEN)
    return names if bucket.is_decode else (*names, *PROMPT_OUTPUTS, TOKEN_HIDDEN)


def _sampled(plan: StepPlan) -> tuple[str, ...]:
    """What is fetched of each sampled token."""
    return DECODE_OUTPUTS if plan.wants_logprobs else DECODE_OUTPUTS[:1]


def _wanted(plan: StepPlan) -> tuple[str, ...]:
    names = _sampled(plan)
    if plan.wants_prompt_logprobs:
        names += PROMPT_OUTPUTS
    if plan.states is not NO_STATES:
        names += (HIDDEN,) if plan.states.row_hidden else ()
        names += (TOKEN_HIDDEN,) if plan.states.token_hidden and plan.prefills else ()
    return names


def _fill_in(wanted: "dict[str, np.ndarray]", handle: StepHandle) -> None:
    """Put what was sampled after the step in its place."""
    for name in _sampled(handle.plan):
        wanted[name] = wanted[name].copy()
        for tile in handle.constrained:
            wanted[name][list(tile.rows)] = np.asarray(tile.outputs[name])[: len(tile.rows)]


def _join_tiles(tiles: "list[jax.Array]", num_rows: int, num_hidden: int) -> np.ndarray:
    """The first rows of tiles that lie end to end in `num_hidden` rows; the last is moved back."""
    tile = len(tiles[0])
    rows = np.empty((num_hidden, tiles[0].shape[1]), np.float32)
    for i, array in enumerate(tiles):
        start = min(i * tile, num_hidden - tile)
        rows[start : start + tile] = np.asarray(array)
    return rows[:num_rows]
