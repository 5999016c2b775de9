"""Paged attention on TPU (Pallas), with the writes and moves of pages.

Compiled for v5e and v6e. What it refuses, while it is traced:

- float16: the compiler has no arithmetic for it.
- page sizes that are no multiple of 16.

Pages have to be laid out row-major on the device. That is XLA's own choice for head dimensions that
are multiples of 128, and has to be asked for where the pool is created for others, whose lanes are
then padded to 128: head dimension 64 takes twice its memory.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.paged_attention import tpu_attention
from jaxserve.pallas_kernels.paged_attention.arguments import check_arguments
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)
from jaxserve.pallas_kernels.paged_attention.tpu_attention import LANES, Q_ALIGNMENT, Inputs, Shape
from jaxserve.pallas_kernels.paged_attention.tpu_pages import gather_pages, scatter_pages, write_kv

__all__ = ["Tuning", "gather_pages", "ragged_paged_attention", "scatter_pages", "write_kv"]


class Tuning(NamedTuple):
    """Block sizes.

    Attributes:
        chunk_tokens: keys computed with at a time, at most.
        chunk_bytes: of one of the two buffers for these keys and their values, at most.
        tile_rows: query heads times queries of a prefill tile, about.
    """

    chunk_tokens: int = 512
    chunk_bytes: int = 4 << 20
    tile_rows: int = 512


DEFAULT_TUNING = Tuning()


def ragged_paged_attention(
    q_tqh: Float[Array, "T Q H"],
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    *,
    sinks_q: Float[Array, " Q"] | None = None,
    tuning: Tuning = DEFAULT_TUNING,
    interpret: Any = False,
) -> Attended:
    """See `reference`.

    Args:
        interpret: True, or `pltpu.InterpretParams`, runs the kernels on CPU.

    Raises:
        NotImplementedError: this backend cannot; the reason is in the message.
    """
    check_arguments(q_tqh, pages, rows, spec, sinks_q)
    _refuse(q_tqh, pages, spec)
    attend = functools.partial(
        _attend,
        q_tqh,
        pages,
        rows,
        sinks_q,
        jnp.full(1, spec.layer, jnp.int32),
        facts=_Facts(
            spec.scale,
            spec.num_layers,
            spec.window,
            spec.soft_cap,
            spec.needs_lse,
            spec.latent_dim,
        ),
        tuning=tuning,
        interpret=interpret,
    )
    return attend()


def _refuse(q_tqh: jax.Array, pages: KVPages, spec: AttentionSpec) -> None:
    page_size = pages.rows_rkph.shape[2]
    if jnp.float16 in (q_tqh.dtype, pages.rows_rkph.dtype):
        raise NotImplementedError("float16: TPUs have no arithmetic for it, bfloat16 they have")
    if page_size % 16:
        raise NotImplementedError(f"pages of {page_size} tokens: not a multiple of 16")
    if spec.latent_dim is not None and spec.latent_dim % LANES:
        raise NotImplementedError(f"a latent of {spec.latent_dim} is no multiple of {LANES}")


class _Facts(NamedTuple):
    """`AttentionSpec` without the layer: layers share one compiled kernel."""

    scale: float
    num_layers: int
    window: int | None
    soft_cap: float | None
    needs_lse: bool
    latent_dim: int | None


@functools.partial(jax.jit, static_argnames=("facts", "tuning", "interpret"))
def _attend(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    sinks_q: jax.Array | None,
    layer: jax.Array,
    *,
    facts: _Facts,
    tuning: Tuning,
    interpret: Any,
) -> Attended:
    num_tokens, num_q, _ = q_tqh.shape
    num_kv = pages.rows_rkph.shape[1]
    q_tkgh = q_tqh.reshape(num_tokens, num_kv, num_q // num_kv, -1)
    sinks_kg = None if sinks_q is None else sinks_q.reshape(num_kv, -1).astype(jnp.float32)
    table_rm = jnp.pad(rows.page_table, ((0, 0), (0, -rows.page_table.shape[1] % LANES)))
    table_rml = table_rm.reshape(table_rm.shape[0], -1, LANES)
    arrays = _Arrays(layer, table_rml, pages, rows, sinks_kg)
    shape = functools.partial(_shape, q_tkgh, pages, facts, tuning, interpret, sinks_q is not None)
    out_tkgh, lse_tkg = _decode(shape, arrays, q_tkgh)
    if rows.has_prefills:
        out_tkgh, lse_tkg = _prefill(shape, arrays, q_tkgh, tuning, out_tkgh, lse_tkg)
    lse_tq = None if lse_tkg is None else lse_tkg.reshape(num_tokens, num_q)
    return Attended(out_tkgh.reshape(num_tokens, num_q, -1), lse_tq)


class _Arrays(NamedTuple):
    layer: jax.Array
    table_rml: jax.Array
    pages: KVPages
    rows: RaggedRows
    sinks_kg: jax.Array | None


def _shape(
    q_tkgh: jax.Array,
    pages: KVPages,
    facts: _Facts,
    tuning: Tuning,
    interpret: Any,
    has_sinks: bool,
    *,
    num_tile_rows: int,
    tile_queries: int,
) -> Shape:
    _, num_kv, page_size, head_dim = pages.rows_rkph.shape
    # Eight heads: the scales' sublanes, and as many as are worth unrolling.
    head_block = 8 if num_kv % 8 == 0 else num_kv
    padded = -(-head_dim // LANES) * LANES * pages.rows_rkph.dtype.itemsize
    chunk_tokens = min(tuning.chunk_tokens, tuning.chunk_bytes // (2 * head_block * padded))
    return Shape(
        num_layers=facts.num_layers,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        latent_dim=facts.latent_dim,
        page_size=page_size,
        num_tile_rows=num_tile_rows,
        tile_queries=tile_queries,
        head_block=head_block,
        chunk_pages=max(1, chunk_tokens // page_size),
        compute=jnp.dtype(q_tkgh.dtype),
        scale=facts.scale,
        window=facts.window,
        soft_cap=facts.soft_cap,
        is_quantised=pages.scales_rkp is not None,
        has_sinks=has_sinks,
        needs_lse=facts.needs_lse,
        interpret=interpret,
    )


def _decode(
    make_shape: Any, arrays: _Arrays, q_tkgh: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Outputs and log-sum-exps of the decode rows' tokens, zeros of others."""
    rows, num_groups = arrays.rows, q_tkgh.shape[2]
    num_rows = rows.q_len.shape[0]
    padded = -(-num_groups // Q_ALIGNMENT) * Q_ALIGNMENT
    shape = make_shape(num_tile_rows=padded, tile_queries=1)
    index = jnp.arange(num_rows, dtype=jnp.int32)
    is_decode = index < rows.num_decodes
    tiles = tpu_attention.make_tiles(
        shape, index, rows.kv_len - 1, is_decode.astype(jnp.int32), jnp.zeros_like(index)
    )
    widen = ((0, 0), (0, padded - num_groups), (0, 0))
    q_rkxh = jnp.pad(q_tkgh[:num_rows], ((0, 0), *widen))
    sinks_kxl = None
    if arrays.sinks_kg is not None:
        sinks_kxl = jnp.pad(arrays.sinks_kg[:, :, None], widen)
        sinks_kxl = jnp.broadcast_to(sinks_kxl, (*sinks_kxl.shape[:2], LANES))
    pages = arrays.pages
    inputs = Inputs(
        arrays.layer, arrays.table_rml, tiles, rows.num_decodes, q_rkxh, pages.rows_rkph,
        pages.scales_rkp, sinks_kxl,
    )  # fmt: skip
    out, lse = tpu_attention.launch_decode(shape, inputs)

    def real(x_rkg: jax.Array) -> jax.Array:
        """Of all tokens, zeros beyond the decode rows."""
        mask = is_decode.reshape(-1, *(1,) * (x_rkg.ndim - 1))
        x_rkg = jnp.where(mask, x_rkg, jnp.zeros((), x_rkg.dtype))
        beyond = q_tkgh.shape[0] - num_rows
        return jnp.pad(x_rkg, ((0, beyond), *((0, 0),) * (x_rkg.ndim - 1)))

    out_tkgh = real(out[:, :, :num_groups])
    return out_tkgh, None if lse is None else real(lse[:, :, :num_groups, 0])


class _Places(NamedTuple):
    """Where the queries of prefill rows lie when each row begins at a multiple of `Q_ALIGNMENT`."""

    token_of_slot: jax.Array  # [slots]; any token for slots of none
    slot_of_token: jax.Array  # [T]; any slot for tokens of no prefill row
    is_prefill: jax.Array  # [T]
    start: jax.Array  # [R]: first slot of each row


def _place(rows: RaggedRows, num_tokens: int, num_slots: int) -> _Places:
    row = jnp.arange(rows.q_len.shape[0], dtype=jnp.int32)
    is_prefill_r = (row >= rows.num_decodes) & (row < rows.num_rows)
    q_len = jnp.where(is_prefill_r, rows.q_len, 0)
    aligned = -(-q_len // Q_ALIGNMENT) * Q_ALIGNMENT
    start = jnp.cumsum(aligned) - aligned
    end_of_tokens = rows.num_decodes + jnp.cumsum(q_len)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    row_of_token = _find(end_of_tokens, token)
    row_of_slot = _find(start + aligned, slot)
    return _Places(
        jnp.clip(rows.q_start[row_of_slot] + slot - start[row_of_slot], 0, num_tokens - 1),
        jnp.clip(start[row_of_token] + token - rows.q_start[row_of_token], 0, num_slots - 1),
        (token >= rows.num_decodes) & (token < end_of_tokens[-1]),
        start,
    )


def _find(end: jax.Array, value: jax.Array) -> jax.Array:
    """The first range that ends beyond a value; the last one if none does."""
    found = jnp.searchsorted(end, value, side="right", method="compare_all")
    return jnp.minimum(found, end.shape[0] - 1).astype(jnp.int32)


def _prefill(
    make_shape: Any,
    arrays: _Arrays,
    q_tkgh: jax.Array,
    tuning: Tuning,
    out_tkgh: jax.Array,
    lse_tkg: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Adds the outputs and log-sum-exps of the prefill rows' tokens."""
    rows, pages = arrays.rows, arrays.pages
    num_tokens, _, num_groups, _ = q_tkgh.shape
    num_rows = rows.q_len.shape[0]
    tile_queries = 1 << (max(1, tuning.tile_rows // num_groups).bit_length() - 1)
    tile_queries = min(tile_queries, 1 << math.ceil(math.log2(num_tokens)))
    tile_queries = max(tile_queries, Q_ALIGNMENT)
    shape = make_shape(num_tile_rows=tile_queries * num_groups, tile_queries=tile_queries)
    num_slots = num_tokens + (Q_ALIGNMENT - 1) * num_rows + tile_queries
    num_slots = -(-num_slots // Q_ALIGNMENT) * Q_ALIGNMENT
    places = _place(rows, num_tokens, num_slots)

    row = jnp.arange(num_rows, dtype=jnp.int32)
    is_prefill_r = (row >= rows.num_decodes) & (row < rows.num_rows)
    tiles_r = jnp.where(is_prefill_r, -(-rows.q_len // tile_queries), 0)
    end_r = jnp.cumsum(tiles_r)
    tile = jnp.arange(num_tokens // tile_queries + num_rows, dtype=jnp.int32)
    row_b = _find(end_r, tile)
    first_b = (tile - (end_r[row_b] - tiles_r[row_b])) * tile_queries
    num_queries_b = jnp.clip(rows.q_len[row_b] - first_b, 0, tile_queries)
    tiles = tpu_attention.make_tiles(
        shape,
        row_b,
        rows.kv_len[row_b] - rows.q_len[row_b] + first_b,
        jnp.where(tile < end_r[-1], num_queries_b, 0),
        places.start[row_b] + first_b,
    )
    sinks_kxl = None
    if arrays.sinks_kg is not None:
        sinks_kxl = jnp.repeat(arrays.sinks_kg, tile_queries, axis=1)[:, :, None]
        sinks_kxl = jnp.broadcast_to(sinks_kxl, (*sinks_kxl.shape[:2], LANES))
    q_kgsh = q_tkgh[places.token_of_slot].transpose(1, 2, 0, 3)
    inputs = Inputs(
        arrays.layer, arrays.table_rml, tiles, end_r[-1], q_kgsh, pages.rows_rkph,
        pages.scales_rkp, sinks_kxl,
    )  # fmt: skip
    out_kgsh, lse_kgsl = tpu_attention.launch_prefill(shape, inputs)

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        mask = places.is_prefill.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(mask, new[places.slot_of_token], old)

    out_tkgh = merge(out_tkgh, out_kgsh.transpose(2, 0, 1, 3))
    if lse_kgsl is not None and lse_tkg is not None:
        lse_tkg = merge(lse_tkg, lse_kgsl[..., 0].transpose(2, 0, 1))
    return out_tkgh, lse_tkg
