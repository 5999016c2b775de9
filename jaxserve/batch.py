"""Packs a `StepPlan` into one int32 array, and unpacks it inside the compiled step.

One array means one transfer and one leaf a step. Sections of the packed array (R rows and T tokens
of the bucket, U = R + T // page_size page-table updates a KV group):

    scalars | row_slot R | row_start R | row_len R | row_kv_len R | row_samples R
    | token_row T | position T                       (absent from decode buckets: token i is row i)
    | update_slot U | update_index U | update_page U (for each KV group)

Everything else a row needs (its tokens, page table, sampling parameters) is in the device state of
its slot, `SlotState`, which a `SlotLoad` fills once when the sequence is admitted. Padding rows and
tokens point at the spare slot, the last one.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxserve.plan import Bucket, SlotLoad, StepPlan
from jaxserve.types import (
    MAX_BAD_SEQUENCES,
    MAX_BAD_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
)

NUM_SCALARS = 4
FLOAT_PARAMS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
INT_PARAMS = ("top_k", "seed_low", "seed_high", "num_prompt", "min_length")


@dataclass(frozen=True, slots=True)
class StateShape:
    """Static sizes of the slot state.

    `num_slots` excludes the spare slot; `max_len` is the most tokens a sequence can have;
    `table_width` the entries of a page-table row.
    """

    num_slots: int
    num_groups: int
    max_len: int
    table_width: int
    vocab_size: int
    page_size: int

    @property
    def mask_words(self) -> int:
        return math.ceil(self.vocab_size / 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """Device state per slot, donated to each step. S counts the spare slot."""

    token_ids: jax.Array  # [S, max_len + 1] int32: every known token of the sequence
    page_tables: jax.Array  # [G, S, M] int32
    float_params: jax.Array  # [S, len(FLOAT_PARAMS)] float32
    int_params: jax.Array  # [S, len(INT_PARAMS)] int32
    stop_ids: jax.Array  # [S, MAX_STOP_TOKEN_IDS] int32, -1: none
    bias_ids: jax.Array  # [S, MAX_LOGIT_BIAS] int32, -1: none
    bias_values: jax.Array  # [S, MAX_LOGIT_BIAS] float32
    bad_ids: jax.Array  # [S, MAX_BAD_SEQUENCES, MAX_BAD_TOKENS] int32, at the end; -1: none
    allow_bits: jax.Array  # [S, ceil(V / 32)] int32
    kept_logits: jax.Array  # [S - 1, V] float32: of the last step, row by row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step's rows and tokens, on the device."""

    num_decodes: jax.Array  # [] int32
    num_rows: jax.Array  # [] int32
    wants_logprobs: jax.Array  # [] int32
    wants_prompt_logprobs: jax.Array  # [] int32
    row_slot: jax.Array  # [R] int32
    row_start: jax.Array  # [R] int32: its first token in the step
    row_len: jax.Array  # [R] int32: its tokens in the step
    row_kv_len: jax.Array  # [R] int32: its tokens including this step's
    row_samples: jax.Array  # [R] int32: 1 if it yields a token
    token_row: jax.Array  # [T] int32
    position: jax.Array  # [T] int32
    update_slot: jax.Array  # [G, U] int32
    update_index: jax.Array  # [G, U] int32
    update_page: jax.Array  # [G, U] int32


def num_updates(bucket: Bucket, page_size: int) -> int:
    """Room for page-table updates of one KV group in a step of this bucket."""
    return bucket.num_rows + (0 if bucket.is_decode else bucket.num_tokens // page_size)


def packed_size(bucket: Bucket, shape: StateShape) -> int:
    """Length of the packed array of a bucket."""
    token_sections = 0 if bucket.is_decode else 2 * bucket.num_tokens
    updates = 3 * shape.num_groups * num_updates(bucket, shape.page_size)
    return NUM_SCALARS + 5 * bucket.num_rows + token_sections + updates


def pack(plan: StepPlan, shape: StateShape) -> Int32[np.ndarray, " packed"]:
    """The packed array of a plan.

    Raises:
        ValueError: the plan does not fit its bucket.
    """
    bucket, num_decodes, num_rows = plan.bucket, plan.num_decodes, plan.num_rows
    num_tokens = plan.num_tokens
    if num_rows > bucket.num_rows or num_tokens > bucket.num_tokens:
        raise ValueError(f"{num_rows} rows, {num_tokens} tokens do not fit {bucket}")
    packed = np.zeros(packed_size(bucket, shape), np.int32)
    packed[:NUM_SCALARS] = num_decodes, num_rows, plan.wants_logprobs, plan.wants_prompt_logprobs
    rows = packed[NUM_SCALARS : NUM_SCALARS + 5 * bucket.num_rows].reshape(5, bucket.num_rows)
    row_slot, row_start, row_len, row_kv_len, row_samples = rows
    row_slot[:num_decodes] = plan.decode_slots
    row_slot[num_rows:] = shape.num_slots
    row_start[:num_decodes] = np.arange(num_decodes)
    row_start[num_rows:] = num_tokens
    row_len[:num_decodes] = 1
    row_kv_len[:num_decodes] = plan.decode_positions
    row_kv_len[:num_decodes] += 1
    row_samples[:num_decodes] = 1
    start = num_decodes
    for row, chunk in enumerate(plan.prefills, num_decodes):
        row_slot[row], row_start[row] = chunk.slot, start
        row_len[row], row_kv_len[row] = chunk.end - chunk.start, chunk.end
        row_samples[row] = chunk.samples
        start += chunk.end - chunk.start
    for constrained in plan.constrained:
        row_samples[constrained.row] = 0
    offset = NUM_SCALARS + 5 * bucket.num_rows
    if not bucket.is_decode:
        tokens = packed[offset : offset + 2 * bucket.num_tokens].reshape(2, bucket.num_tokens)
        token_row, position = tokens
        token_row[:num_tokens] = np.repeat(np.arange(num_rows), row_len[:num_rows])
        token_row[num_tokens:] = min(num_rows, bucket.num_rows - 1)
        position[:num_decodes] = plan.decode_positions
        start = num_decodes
        for chunk in plan.prefills:
            stop = start + chunk.end - chunk.start
            position[start:stop] = np.arange(chunk.start, chunk.end)
            start = stop
        offset += 2 * bucket.num_tokens
    room = num_updates(bucket, shape.page_size)
    updates = packed[offset:].reshape(shape.num_groups, 3, room)
    for group, update in zip(updates, plan.page_updates, strict=True):
        count = len(update.slots)
        group[0, :count], group[1, :count] = update.slots, update.indices
        group[2, :count] = update.pages
        group[0, count:] = shape.num_slots + 1  # out of range: dropped
    return packed


def unpack(packed: Int[Array, " packed"], bucket: Bucket, shape: StateShape) -> Batch:
    """The inverse of `pack`, inside the compiled step."""
    num_decodes, num_rows, wants_logprobs, wants_prompt = packed[:NUM_SCALARS]
    offset = NUM_SCALARS + 5 * bucket.num_rows
    rows = packed[NUM_SCALARS:offset].reshape(5, bucket.num_rows)
    if bucket.is_decode:
        token_row = jnp.arange(bucket.num_rows, dtype=jnp.int32)
        position = jnp.maximum(rows[3] - 1, 0)
    else:
        tokens = packed[offset : offset + 2 * bucket.num_tokens]
        token_row, position = tokens.reshape(2, bucket.num_tokens)
        offset += 2 * bucket.num_tokens
    updates = packed[offset:].reshape(shape.num_groups, 3, num_updates(bucket, shape.page_size))
    return Batch(
        num_decodes=num_decodes,
        num_rows=num_rows,
        wants_logprobs=wants_logprobs,
        wants_prompt_logprobs=wants_prompt,
        row_slot=rows[0],
        row_start=rows[1],
        row_len=rows[2],
        row_kv_len=rows[3],
        row_samples=rows[4],
        token_row=token_row,
        position=position,
        update_slot=updates[:, 0],
        update_index=updates[:, 1],
        update_page=updates[:, 2],
    )


def create_state(
    shape: StateShape,
    sharding: jax.sharding.Sharding,
    logits_sharding: jax.sharding.Sharding | None = None,
) -> SlotState:
    """A state in which no slot is in use; logits may be split like the output layer's rows."""
    slots = shape.num_slots + 1

    def zeros(*dims: int, dtype: type = np.int32) -> jax.Array:
        return jnp.zeros(dims, dtype, device=sharding)

    return SlotState(
        token_ids=zeros(slots, shape.max_len + 1),
        page_tables=zeros(shape.num_groups, slots, shape.table_width),
        float_params=zeros(slots, len(FLOAT_PARAMS), dtype=np.float32),
        int_params=zeros(slots, len(INT_PARAMS)),
        stop_ids=zeros(slots, MAX_STOP_TOKEN_IDS),
        bias_ids=zeros(slots, MAX_LOGIT_BIAS),
        bias_values=zeros(slots, MAX_LOGIT_BIAS, dtype=np.float32),
        bad_ids=zeros(slots, MAX_BAD_SEQUENCES, MAX_BAD_TOKENS),
        allow_bits=zeros(slots, shape.mask_words),
        kept_logits=jnp.zeros(
            (shape.num_slots, shape.vocab_size), np.float32, device=logits_sharding or sharding
        ),
    )


def load_size(shape: StateShape) -> int:
    """Length of a packed `SlotLoad`."""
    return (
        1
        + (shape.max_len + 1)
        + shape.num_groups * shape.table_width
        + len(FLOAT_PARAMS)
        + len(INT_PARAMS)
        + MAX_STOP_TOKEN_IDS
        + 2 * MAX_LOGIT_BIAS
        + MAX_BAD_SEQUENCES * MAX_BAD_TOKENS
        + shape.mask_words
    )


def pack_load(load: SlotLoad, shape: StateShape) -> Int32[np.ndarray, " packed"]:
    """A `SlotLoad` as one int32 array: the slot, then the rows of `SlotState` in field order."""
    params = load.sampling
    assert params.seed is not None, "the engine resolves seeds before a request is scheduled"
    token_ids = np.zeros(shape.max_len + 1, np.int32)
    token_ids[: len(load.token_ids)] = load.token_ids
    tables = np.zeros((shape.num_groups, shape.table_width), np.int32)
    for table, pages in zip(tables, load.page_rows, strict=True):
        table[: len(pages)] = pages
    floats = np.array(
        [
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ],
        np.float32,
    )
    seed = params.seed & 0xFFFFFFFFFFFFFFFF
    ints = np.array(
        [
            params.top_k,
            np.uint32(seed & 0xFFFFFFFF).view(np.int32),
            np.uint32(seed >> 32).view(np.int32),
            load.num_prompt_tokens,
            load.num_prompt_tokens + params.min_tokens,
        ],
        np.int32,
    )
    stop_ids = np.full(MAX_STOP_TOKEN_IDS, -1, np.int32)
    stop_ids[: len(load.stop_token_ids)] = load.stop_token_ids
    bias_ids = np.full(MAX_LOGIT_BIAS, -1, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_ids[: len(params.logit_bias)] = list(params.logit_bias)
    bias_values[: len(params.logit_bias)] = list(params.logit_bias.values())
    bad_ids = np.full((MAX_BAD_SEQUENCES, MAX_BAD_TOKENS), -1, np.int32)
    for row, sequence in zip(bad_ids, params.bad_token_sequences, strict=False):
        row[MAX_BAD_TOKENS - len(sequence) :] = sequence
    sections = (
        np.array([load.slot], np.int32),
        token_ids,
        tables.ravel(),
        floats.view(np.int32),
        ints,
        stop_ids,
        bias_ids,
        bias_values.view(np.int32),
        bad_ids.ravel(),
        _allow_bits(load, shape),
    )
    return np.concatenate(sections)


def _allow_bits(load: SlotLoad, shape: StateShape) -> Int32[np.ndarray, " words"]:
    """Bit `id % 32` of word `id // 32` is set if the token may be sampled."""
    allowed, banned = load.sampling.allowed_token_ids, load.sampling.banned_token_ids
    if allowed is None and not banned:
        return np.full(shape.mask_words, -1, np.int32)
    flags = np.ones(shape.mask_words * 32, np.uint8)
    if allowed is not None:
        flags[:] = 0
        flags[list(allowed)] = 1
    flags[list(banned)] = 0
    return np.packbits(flags, bitorder="little").view(np.int32)


def load_slot(state: SlotState, packed: Int[Array, " packed"], shape: StateShape) -> SlotState:
    """Write a packed `SlotLoad` into the (donated) state."""
    slot, offset = packed[0], 1

    def take(*dims: int) -> jax.Array:
        nonlocal offset
        size = math.prod(dims)
        section = packed[offset : offset + size].reshape(dims)
        offset += size
        return section

    def as_float(bits: jax.Array) -> Float[Array, "..."]:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    return SlotState(
        token_ids=state.token_ids.at[slot].set(take(shape.max_len + 1)),
        page_tables=state.page_tables.at[:, slot].set(take(shape.num_groups, shape.table_width)),
        float_params=state.float_params.at[slot].set(as_float(take(len(FLOAT_PARAMS)))),
        int_params=state.int_params.at[slot].set(take(len(INT_PARAMS))),
        stop_ids=state.stop_ids.at[slot].set(take(MAX_STOP_TOKEN_IDS)),
        bias_ids=state.bias_ids.at[slot].set(take(MAX_LOGIT_BIAS)),
        bias_values=state.bias_values.at[slot].set(as_float(take(MAX_LOGIT_BIAS))),
        bad_ids=state.bad_ids.at[slot].set(take(MAX_BAD_SEQUENCES, MAX_BAD_TOKENS)),
        allow_bits=state.allow_bits.at[slot].set(take(shape.mask_words)),
        kept_logits=state.kept_logits,
    )
