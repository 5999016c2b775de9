"""The inner loop of the Pallas-Triton launches: a tile of query rows against blocks of keys.

A *query row* is one query token of one query head; the rows of a tile share a KV head. Keys go by
in blocks, whose page ids are looked up block by block, under a softmax that is rescaled as it goes
(FlashAttention-2, Dao 2023). The kernel sees the pool as *slots* of H numbers, one for each token
of each head of each pool row, so that the place of a key is one index.

Triton's tiles have power-of-two sides. A head dim that is none is cut into pieces that are (96 =
64 + 32, 192 = 128 + 64), each with products of its own: nothing is padded.

Quantised numbers are multiplied as float16, which holds int8 and float8_e4m3fn exactly and is the
cheapest to convert them to. So that nothing overflows or vanishes whatever the dtype's range,
bfloat16 queries are divided by their largest magnitude, and the weights of the values, which carry
the values' scales, by the largest scale so far.

Knows nothing of launches, of splits, or of where query rows lie. Invariants: keys and values that
no row of the tile sees are not read; scores are kept in base 2, the hardware has no other exp.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton

from jaxserve.pallas_kernels.paged_attention import triton_ptx
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
_LOWEST = -1e20
"""Largest score of a row that has seen no key: finite, so that a difference from it is a number."""
_LEAST_UNIT = 1e-20
MIN_SIDE = 16
"""Shortest side of a tensor core product."""
_WEIGHT_UNIT = 1024.0
"""Largest weight of a quantised value: leaves float16 room for small ones (down to 2**-34)."""

Pieces = tuple[jax.Array, ...]
"""A tile [X, H], cut along H (see `Statics.pieces`)."""


@dataclass(frozen=True, slots=True)
class Statics:
    """What is known of a launch when it is traced.

    Attributes:
        compute: dtype of the products.
        block_m: query rows of a tile.
        block_k: keys of a block.
        piece: longest piece of the head dim.
    """

    spec: AttentionSpec
    num_q: int
    num_kv: int
    head_dim: int
    page_size: int
    table_width: int
    compute: jnp.dtype
    is_quantised: bool
    block_m: int
    block_k: int
    piece: int
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_q // self.num_kv

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """(begin, size) of the powers of two that make up the head dim.

        Of latent pages, those of the latent come first and end with it.
        """
        values = self.value_pieces
        rest = powers_of_two(self.head_dim - self.value_dim, self.piece)
        return (*values, *((self.value_dim + begin, size) for begin, size in rest))

    @property
    def value_pieces(self) -> tuple[tuple[int, int], ...]:
        """The same of a value."""
        return powers_of_two(self.value_dim, self.piece)

    @property
    def value_dim(self) -> int:
        return self.spec.latent_dim or self.head_dim


def powers_of_two(length: int, largest: int = 1 << 30) -> tuple[tuple[int, int], ...]:
    """(begin, size) of powers of two that add up to `length`, none above `largest`."""
    found, begin = [], 0
    while begin < length:
        size = min(largest, 1 << (length - begin).bit_length() - 1)
        found.append((begin, size))
        begin += size
    return tuple(found)


class Rows(NamedTuple):
    """The query rows of a tile."""

    index_m: jax.Array  # [M] int32 into queries and outputs as [T*Q, H]
    is_live_m: jax.Array  # [M] bool: the others are neither read nor written
    position_m: jax.Array | None  # [M] int32; None if all are of one token
    first_position: jax.Array  # [] int32, of the live rows
    last_position: jax.Array  # [] int32


class Keys(NamedTuple):
    """Where the keys of a row of the step lie. The first two are refs."""

    pages: KVPages  # [slots, H], scales [slots]
    page_table: Any  # [R, M]
    layer: jax.Array  # [] int32
    row: jax.Array  # [] int32
    head: jax.Array  # [] int32: KV head


class Queries(NamedTuple):
    """A tile of queries, divided by `unit_m` if that is given."""

    q_mh: Pieces
    unit_m: jax.Array | None


class Softmax(NamedTuple):
    """State of a softmax under way."""

    max_m: jax.Array  # [M] float32, base 2
    sum_m: jax.Array  # [M] float32
    acc_mh: Pieces  # float32
    unit: jax.Array | None  # [] float32, of quantised values: the largest scale so far


class KeyBlocks(NamedTuple):
    """Blocks [begin, end) to visit; every row sees all keys of [full_begin, full_end)."""

    begin: jax.Array
    full_begin: jax.Array
    full_end: jax.Array
    end: jax.Array


class _Block(NamedTuple):
    """Keys and values, ready for products."""

    k_ch: Pieces
    v_ch: Pieces
    k_scale_c: jax.Array | None
    v_scale_c: jax.Array | None


class Phase(NamedTuple):
    """Blocks [begin, end) to visit; of those that are not masked every row sees every key."""

    is_masked: bool
    begin: jax.Array
    end: jax.Array


def key_blocks(rows: Rows, statics: Statics) -> KeyBlocks:
    """The blocks that hold what some row sees."""
    window, block_k = statics.spec.window, statics.block_k
    end = lax.div(rows.last_position + block_k, block_k)
    begin = full_begin = jnp.int32(0)
    if window is not None:
        begin = lax.div(jnp.maximum(rows.first_position - window + 1, 0), block_k)
        full_begin = lax.div(jnp.maximum(rows.last_position - window + block_k, 0), block_k)
        full_begin = jnp.clip(full_begin, begin, end)
    full_end = jnp.clip(lax.div(rows.first_position + 1, block_k), full_begin, end)
    return KeyBlocks(begin, full_begin, full_end, end)


def load_queries(ref: Any, rows: Rows, statics: Statics) -> Queries:
    """The tile's queries; rows that are not live are 0."""
    q_mh = load_tile(ref, rows.index_m, rows.is_live_m, statics.pieces)
    if q_mh[0].dtype == statics.compute:
        return Queries(q_mh, None)
    wide_mh = [q.astype(jnp.float32) for q in q_mh]
    unit_m = jnp.maximum(largest_magnitude(wide_mh), _LEAST_UNIT)
    return Queries(tuple((q / unit_m[:, None]).astype(statics.compute) for q in wide_mh), unit_m)


def largest_magnitude(tile_xh: Sequence[jax.Array]) -> jax.Array:
    """Largest magnitude of each row."""
    found_x = jnp.abs(tile_xh[0]).max(axis=1)
    for piece in tile_xh[1:]:
        found_x = jnp.maximum(found_x, jnp.abs(piece).max(axis=1))
    return found_x


def load_tile(
    ref: Any, index_x: jax.Array, mask_x: jax.Array | None, pieces: tuple[tuple[int, int], ...]
) -> Pieces:
    """Rows `index_x` of a ref [rows, H]; zeros where `mask_x` is False."""
    found = []
    for begin, size in pieces:
        at, mask = _tile(ref, index_x, mask_x, begin, size)
        other = None if mask is None else jnp.zeros((), ref.dtype)
        found.append(pltriton.load(at, mask=mask, other=other))
    return tuple(found)


def store_tile(
    ref: Any,
    index_x: jax.Array,
    mask_x: jax.Array,
    pieces: tuple[tuple[int, int], ...],
    tile_xh: Pieces,
) -> None:
    """The inverse of `load_tile`; rows that are masked out must not be stored by the same call."""
    for (begin, size), piece in zip(pieces, tile_xh, strict=True):
        at, mask = _tile(ref, index_x, mask_x, begin, size)
        pltriton.store(at, piece.astype(ref.dtype), mask=mask)


def _tile(ref: Any, index_x: jax.Array, mask_x: jax.Array | None, begin: int, size: int):
    """Every index in full: a masked access needs that when interpreted."""
    shape = (index_x.shape[0], size)
    column = begin + lax.broadcasted_iota(jnp.int32, shape, 1)
    at = ref.at[lax.broadcast_in_dim(index_x, shape, (0,)), column]
    return at, None if mask_x is None else lax.broadcast_in_dim(mask_x, shape, (0,))


def attend(
    queries: Queries,
    rows: Rows,
    keys: Keys,
    phases: tuple[Phase, ...],
    statics: Statics,
    *,
    loads_ahead: bool,
) -> Softmax:
    """Run the softmax of a tile over blocks of keys.

    Args:
        phases: what to visit, in order.
        loads_ahead: hold the next block in registers while one is worked on. For what is converted
            on the way: from shared memory, into which Triton would have it loaded ahead, 8-bit
            values can only be read byte by byte in the order in which products take them.
    """
    num_m = statics.block_m
    state = Softmax(
        max_m=jnp.full((num_m,), _LOWEST, jnp.float32),
        sum_m=jnp.zeros((num_m,), jnp.float32),
        acc_mh=tuple(jnp.zeros((num_m, size), jnp.float32) for _, size in statics.value_pieces),
        unit=jnp.float32(_LEAST_UNIT) if statics.is_quantised else None,
    )
    for phase in phases:

        def one_block(index, state, phase=phase):
            page_c = _load_pages(keys, rows, index, phase, statics)
            block = _load_block(keys, rows, index, page_c, phase, statics)
            return _attend_block(queries, rows, index, block, state, phase.is_masked, statics)

        def one_block_ahead(index, carry, phase=phase):
            state, block, next_page_c = carry
            next_block = _load_block(keys, rows, index + 1, next_page_c, phase, statics)
            page_c = _load_pages(keys, rows, index + 2, phase, statics)
            state = _attend_block(queries, rows, index, block, state, phase.is_masked, statics)
            return state, next_block, page_c

        if loads_ahead:
            assert phase.is_masked, "the block after the last one must not be read"
            page_c = _load_pages(keys, rows, phase.begin, phase, statics)
            block = _load_block(keys, rows, phase.begin, page_c, phase, statics)
            page_c = _load_pages(keys, rows, phase.begin + 1, phase, statics)
            carry = (state, block, page_c)
            state, *_ = lax.fori_loop(phase.begin, phase.end, one_block_ahead, carry)
        else:
            state = lax.fori_loop(phase.begin, phase.end, one_block, state)
    return state


def _keys_of_block(index: jax.Array, block_k: int) -> jax.Array:
    return index * block_k + lax.iota(jnp.int32, block_k)


def _held(rows: Rows, index: jax.Array, phase: Phase, statics: Statics) -> jax.Array | None:
    """Which keys of a block some row sees; None for all."""
    if not phase.is_masked:
        return None
    key_c = _keys_of_block(index, statics.block_k)
    held_c = key_c <= rows.last_position
    if statics.spec.window is not None:
        held_c &= key_c > rows.first_position - statics.spec.window
    return held_c


def _load_pages(
    keys: Keys, rows: Rows, index: jax.Array, phase: Phase, statics: Statics
) -> jax.Array:
    """Page of each key of a block, or the one page of all."""
    block_k, page_size = statics.block_k, statics.page_size
    if page_size % block_k == 0:
        column = lax.div(index * block_k, page_size)
        return keys.page_table[keys.row, jnp.minimum(column, statics.table_width - 1)]
    column_c = lax.div(_keys_of_block(index, block_k), page_size)
    at = keys.page_table.at[lax.broadcast_in_dim(keys.row, (block_k,), ()), column_c]
    held_c = _held(rows, index, phase, statics)
    return pltriton.load(at, mask=held_c, other=None if held_c is None else jnp.int32(0))


def _load_block(
    keys: Keys,
    rows: Rows,
    index: jax.Array,
    page_c: jax.Array,
    phase: Phase,
    statics: Statics,
) -> _Block:
    """A block's keys and values; zeros where no row sees them, and from `phase.end` on."""
    spec, page_size = statics.spec, statics.page_size
    held_c = _held(rows, index, phase, statics)
    if held_c is not None:
        held_c &= index < phase.end
    offset_c = lax.rem(_keys_of_block(index, statics.block_k), page_size)
    pool_row_c = spec.first_row(page_c, keys.layer)
    k_slot_c = (pool_row_c * statics.num_kv + keys.head) * page_size + offset_c

    def load(slot_c: jax.Array) -> tuple[Pieces, jax.Array | None]:
        stored_ch = load_tile(keys.pages.rows_rkph, slot_c, held_c, statics.pieces)
        scale_c = None
        if statics.is_quantised:
            other = None if held_c is None else jnp.float32(0)
            scales_ref: Any = keys.pages.scales_rkp
            scale_c = pltriton.load(scales_ref.at[slot_c], mask=held_c, other=other)
        return tuple(_to_compute(x, statics) for x in stored_ch), scale_c

    k_ch, k_scale_c = load(k_slot_c)
    if spec.latent_dim is not None:
        return _Block(k_ch, k_ch[: len(statics.value_pieces)], k_scale_c, k_scale_c)
    v_ch, v_scale_c = load(k_slot_c + statics.num_kv * page_size)  # of the next pool row
    return _Block(k_ch, v_ch, k_scale_c, v_scale_c)


def _to_compute(stored: jax.Array, statics: Statics) -> jax.Array:
    """Numbers of the pool in the dtype of the products; unsigned ones are raw bits."""
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(stored, statics.compute)
    if stored.dtype == jnp.uint8:
        stored = lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
    if statics.is_quantised and statics.compute == jnp.float16:
        return triton_ptx.widened(stored, interpret=statics.interpret)
    return stored.astype(statics.compute)


def _attend_block(
    queries: Queries,
    rows: Rows,
    index: jax.Array,
    block: _Block,
    state: Softmax,
    is_masked: bool,
    statics: Statics,
) -> Softmax:
    """Take a block into the softmax."""
    interpret = statics.interpret
    s_mc, factor_m = _scores(queries, block, statics)
    if is_masked:
        s_mc = jnp.where(_seen(rows, index, statics), s_mc, -jnp.inf)
    max_m = jnp.maximum(state.max_m, s_mc.max(axis=1) * factor_m)
    factor_mc, max_mc = (lax.broadcast_in_dim(x, s_mc.shape, (0,)) for x in (factor_m, max_m))
    p_mc = triton_ptx.exp2_of_difference(s_mc, factor_mc, max_mc, interpret=interpret)
    fade_m = triton_ptx.exp2(state.max_m - max_m, interpret=interpret)
    sum_m = state.sum_m * fade_m + p_mc.sum(axis=1)
    unit = None
    if block.v_scale_c is not None:
        assert state.unit is not None
        unit = jnp.maximum(state.unit, block.v_scale_c.max())
        p_mc *= (block.v_scale_c * (_WEIGHT_UNIT / unit))[None, :]
        fade_m *= state.unit / unit
    p_mc = p_mc.astype(statics.compute)
    acc_mh = tuple(
        acc * fade_m[:, None] + _product(p_mc, v, 0, statics)
        for acc, v in zip(state.acc_mh, block.v_ch, strict=True)
    )
    return Softmax(max_m, sum_m, acc_mh, unit)


def _scores(queries: Queries, block: _Block, statics: Statics) -> tuple[jax.Array, jax.Array]:
    """Scores [M, C], to be multiplied with positive numbers [M] to be those of base 2.

    That joins the subtraction of the largest one: a fused multiply-add instead of two steps.
    """
    spec, factor = statics.spec, statics.spec.scale * LOG2_E
    products = [_product(q, k, 1, statics) for q, k in zip(queries.q_mh, block.k_ch, strict=True)]
    s_mc = products[0]
    for product in products[1:]:
        s_mc += product
    if block.k_scale_c is not None:
        s_mc *= (block.k_scale_c * factor)[None, :]
        factor = 1.0
    if factor <= 0:
        s_mc, factor = s_mc * factor, 1.0
    factor_m = jnp.full((statics.block_m,), factor, jnp.float32)
    if queries.unit_m is not None:
        factor_m = queries.unit_m * factor
    if spec.soft_cap is None:
        return s_mc, factor_m
    # cap * tanh(x) = cap - 2 * cap / (1 + exp(2 * x)), with x = s / cap
    cap = spec.soft_cap * LOG2_E
    s_mc *= (factor_m * (2 * LOG2_E / cap))[:, None]
    power_mc = 1 + triton_ptx.exp2(s_mc, interpret=statics.interpret)
    s_mc = cap - 2 * cap * triton_ptx.reciprocal(power_mc, interpret=statics.interpret)
    return s_mc, jnp.ones_like(factor_m)


def _seen(rows: Rows, index: jax.Array, statics: Statics) -> jax.Array:
    """[M, C] or [1, C] bool: causal, and within the window."""
    key_1c = _keys_of_block(index, statics.block_k)[None, :]
    position = rows.last_position if rows.position_m is None else rows.position_m[:, None]
    seen_mc = key_1c <= position
    if statics.spec.window is not None:
        seen_mc &= key_1c > position - statics.spec.window
    return seen_mc


def _product(a: jax.Array, b: jax.Array, contract_b: int, statics: Statics) -> jax.Array:
    """A float32 product over a's axis 1; of float32, as three products of TF32 parts."""
    precision = None
    if a.dtype == jnp.float32:
        exact, parts = lax.Precision.HIGHEST, lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = exact if statics.interpret else parts
    dims = (((1,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class Finished(NamedTuple):
    """What a softmax comes to."""

    out_mh: Pieces  # float32
    lse_m: jax.Array  # [M] float32, natural


def finish(state: Softmax, sink_m: jax.Array | None) -> Finished:
    """Outputs and log-sum-exp; zeros and -inf for a row that saw nothing.

    Args:
        sink_m: extra scores, natural; -inf for none.
    """
    max_m, sum_m, fade_m = state.max_m, state.sum_m, None
    if sink_m is not None:
        sink_m = sink_m * LOG2_E
        max_m = jnp.maximum(state.max_m, sink_m)
        fade_m = jnp.exp2(state.max_m - max_m)
        sum_m = sum_m * fade_m + jnp.exp2(sink_m - max_m)
    safe_m = jnp.where(sum_m > 0, sum_m, 1.0)
    weight_m = 1.0 / safe_m
    if fade_m is not None:
        weight_m *= fade_m
    if state.unit is not None:
        weight_m *= state.unit / _WEIGHT_UNIT
    lse_m = jnp.where(sum_m > 0, max_m * LN_2 + jnp.log(safe_m), -jnp.inf)
    return Finished(tuple(acc * weight_m[:, None] for acc in state.acc_mh), lse_m)
