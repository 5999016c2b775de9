"""Paged attention in plain jnp/lax: what every other backend falls back to. It can do everything.

Blocked with an online softmax, and looped with dynamic trip counts, so that padding rows, short
sequences and the upper triangle cost nothing. Softmax is in float32.

Decode rows are sorted by length and done in groups of rows that then have similar lengths;
prefill rows are cut into tiles of query tokens of one row. A tile's tail may run past its row: the
garbage lands on tokens that a later tile writes, or on padding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention import page_moves
from jaxserve.pallas_kernels.paged_attention.quant import dequantise
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)

write_kv = page_moves.write_kv
gather_pages = page_moves.gather_pages
scatter_pages = page_moves.scatter_pages

NEG_INF = -1e30

# Measured on two cores of a Zen 5: smaller blocks lose to loop overhead, larger ones to the cache.
DECODE_GROUP_ROWS = 4
DECODE_CHUNK_TOKENS = 128
PREFILL_TILE_TOKENS = 256
PREFILL_CHUNK_TOKENS = 256


def _chunk_pages(chunk_tokens: int, page_size: int) -> int:
    """Pages per chunk of keys."""
    return max(1, chunk_tokens // page_size)


def ragged_paged_attention(
    q_tqh: Float[Array, "T Q H"],
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    *,
    sinks_q: Float[Array, " Q"] | None = None,
) -> Attended:
    """Causal attention of every row's queries to its pages; padding tokens get anything finite.

    Args:
        sinks_q: an extra score of each head, of which only the weight counts; not scaled or capped.

    Returns:
        `lse_tq` is left out unless the spec asks for it.
    """
    num_tokens, num_q, head_dim = q_tqh.shape
    num_kv = pages.rows_rkph.shape[1]
    num_groups = num_q // num_kv
    step = _Step(pages, rows, spec, None if sinks_q is None else sinks_q.reshape(num_kv, -1))
    q_tkgh = q_tqh.reshape(num_tokens, num_kv, num_groups, head_dim)
    found = _decode(step, q_tkgh[: rows.q_len.shape[0]])
    pad = num_tokens - rows.q_len.shape[0]
    if pad:
        found = found.padded(pad)
    if rows.has_prefills:
        found = _prefill(step, found, q_tkgh)
    lse_tkg = found.lse_tkg
    return Attended(
        found.out_tkgh.reshape(num_tokens, num_q, -1),
        None if lse_tkg is None else lse_tkg.reshape(num_tokens, num_q),
    )


class _Step(NamedTuple):
    """What all queries of a call share."""

    pages: KVPages
    rows: RaggedRows
    spec: AttentionSpec
    sinks_kg: jax.Array | None


class _Found(NamedTuple):
    """Results by token, heads apart by KV head."""

    out_tkgh: jax.Array
    lse_tkg: jax.Array | None

    def padded(self, count: int) -> "_Found":
        """More tokens behind, which see nothing."""
        lse_tkg = self.lse_tkg
        return _Found(
            _pad_tokens(self.out_tkgh, count),
            None if lse_tkg is None else _pad_tokens(lse_tkg, count),
        )


def _pad_tokens(x_t: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x_t, ((0, count), *((0, 0),) * (x_t.ndim - 1)))


def _decode(step: _Step, q_rkgh: jax.Array) -> _Found:
    rows, num_rows = step.rows, q_rkgh.shape[0]
    group_rows = min(DECODE_GROUP_ROWS, num_rows)
    kv_len_r = jnp.where(jnp.arange(num_rows) < rows.num_decodes, rows.kv_len, 0)
    order = jnp.argsort(-kv_len_r).astype(jnp.int32)
    pad = -num_rows % group_rows
    order = jnp.pad(order, (0, pad), constant_values=num_rows)

    def one_group(group, found: _Found) -> _Found:
        row_g = lax.dynamic_slice(order, (group * group_rows,), (group_rows,))
        length_g = kv_len_r.at[row_g].get(mode="fill", fill_value=0)
        table_gm = rows.page_table.at[row_g].get(mode="clip")
        q_gkgh = q_rkgh.at[row_g].get(mode="clip")[:, :, :, None, :]
        part = _attend_chunks(step, q_gkgh, length_g - 1, length_g, table_gm, DECODE_CHUNK_TOKENS)
        out_rkgh = found.out_tkgh.at[row_g].set(part.out_skgbh[:, :, :, 0, :], mode="drop")
        if found.lse_tkg is None or part.lse_skgb is None:
            return _Found(out_rkgh, None)
        return _Found(out_rkgh, found.lse_tkg.at[row_g].set(part.lse_skgb[..., 0], mode="drop"))

    num_groups = (rows.num_decodes + group_rows - 1) // group_rows
    lse_rkg = jnp.zeros(q_rkgh.shape[:3], jnp.float32) if step.spec.needs_lse else None
    out_dim = step.spec.latent_dim or q_rkgh.shape[-1]
    start = _Found(jnp.zeros((*q_rkgh.shape[:3], out_dim), q_rkgh.dtype), lse_rkg)
    return lax.fori_loop(0, num_groups, one_group, start)


def _prefill(step: _Step, found: _Found, q_tkgh: jax.Array) -> _Found:
    """`found` with the tokens of prefill rows filled in."""
    rows, num_tokens = step.rows, q_tkgh.shape[0]
    tile = min(PREFILL_TILE_TOKENS, num_tokens)
    is_prefill_r = jnp.arange(rows.q_len.shape[0]) >= rows.num_decodes
    tiles_r = jnp.where(is_prefill_r, (rows.q_len + tile - 1) // tile, 0)
    end_r = jnp.cumsum(tiles_r).astype(jnp.int32)
    found, q_tkgh = found.padded(tile), _pad_tokens(q_tkgh, tile)

    def one_tile(index, found: _Found) -> _Found:
        row = jnp.searchsorted(end_r, index, side="right").astype(jnp.int32)
        first = (index - (end_r[row] - tiles_r[row])) * tile  # within the row's queries
        start = rows.q_start[row] + first
        position = rows.kv_len[row] - rows.q_len[row] + first
        q_bkgh = lax.dynamic_slice_in_dim(q_tkgh, start, tile, axis=0)
        q_1kgbh = q_bkgh.transpose(1, 2, 0, 3)[None]
        length_1 = jnp.minimum(rows.kv_len[row], position + tile)[None]
        table_1m = lax.dynamic_slice_in_dim(rows.page_table, row, 1, axis=0)
        part = _attend_chunks(
            step, q_1kgbh, position[None], length_1, table_1m, PREFILL_CHUNK_TOKENS
        )
        out_bkgh = part.out_skgbh[0].transpose(2, 0, 1, 3)
        out_tkgh = lax.dynamic_update_slice_in_dim(found.out_tkgh, out_bkgh, start, axis=0)
        if found.lse_tkg is None or part.lse_skgb is None:
            return _Found(out_tkgh, None)
        lse_bkg = part.lse_skgb[0].transpose(2, 0, 1)
        return _Found(
            out_tkgh, lax.dynamic_update_slice_in_dim(found.lse_tkg, lse_bkg, start, axis=0)
        )

    found = lax.fori_loop(0, end_r[-1], one_tile, found)
    lse_tkg = found.lse_tkg
    return _Found(found.out_tkgh[:num_tokens], None if lse_tkg is None else lse_tkg[:num_tokens])


class _Part(NamedTuple):
    """Results of B consecutive queries of each of some sequences."""

    out_skgbh: jax.Array
    lse_skgb: jax.Array | None


def _attend_chunks(
    step: _Step,
    q_skgbh: Float[Array, "S K G B H"],
    position_s: Int[Array, " S"],
    length_s: Int[Array, " S"],
    table_sm: Int[Array, "S M"],
    chunk_tokens: int,
) -> _Part:
    """B consecutive queries of each sequence, from `position_s`, over keys [0, length_s)."""
    spec = step.spec
    num_seqs, num_kv, num_groups, num_queries, head_dim = q_skgbh.shape
    out_dim = spec.latent_dim or head_dim
    page_size = step.pages.rows_rkph.shape[2]
    num_pages = _chunk_pages(chunk_tokens, page_size)
    if pad := -table_sm.shape[1] % num_pages:
        table_sm = jnp.pad(table_sm, ((0, 0), (0, pad)))
    chunk = num_pages * page_size
    load = _chunk_loader(step.pages, num_kv, chunk, q_skgbh.dtype)
    q_skxh = q_skgbh.reshape(num_seqs, num_kv, num_groups * num_queries, head_dim)
    q_pos_sb = position_s[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None]

    def one_chunk(index, carry):
        max_skx, sum_skx, acc_skxh = carry
        page_sc = lax.dynamic_slice_in_dim(table_sm, index * num_pages, num_pages, axis=1)
        row_sc = spec.first_row(page_sc)
        k_skch = load(row_sc)
        v_skch = load(row_sc + 1) if spec.latent_dim is None else k_skch[..., : spec.latent_dim]
        k_pos_c = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        held_sc = k_pos_c[None] < length_s[:, None]
        if spec.window is not None:
            held_sc &= k_pos_c[None] > position_s[:, None] - spec.window
        # Elsewhere lies what others left behind: a weight of 0 does not hold back their NaN.
        v_skch = jnp.where(held_sc[:, None, :, None], v_skch, jnp.zeros((), v_skch.dtype))
        s_skxc = jnp.einsum(
            "skxh,skch->skxc", q_skxh, k_skch, preferred_element_type=jnp.float32
        ) * jnp.float32(spec.scale)
        if spec.soft_cap is not None:
            s_skxc = spec.soft_cap * jnp.tanh(s_skxc / spec.soft_cap)
        seen_sbc = (k_pos_c[None, None, :] <= q_pos_sb[:, :, None]) & (
            k_pos_c[None, None, :] < length_s[:, None, None]
        )
        if spec.window is not None:
            seen_sbc &= k_pos_c[None, None, :] > q_pos_sb[:, :, None] - spec.window
        seen = jnp.broadcast_to(
            seen_sbc[:, None, None], (num_seqs, num_kv, num_groups, num_queries, chunk)
        ).reshape(s_skxc.shape)
        s_skxc = jnp.where(seen, s_skxc, NEG_INF)
        new_max = jnp.maximum(max_skx, s_skxc.max(axis=-1))
        p_skxc = jnp.where(seen, jnp.exp(s_skxc - new_max[..., None]), 0.0)
        fade = jnp.exp(max_skx - new_max)
        acc = acc_skxh * fade[..., None] + jnp.einsum(
            "skxc,skch->skxh",
            p_skxc.astype(v_skch.dtype),
            v_skch,
            preferred_element_type=jnp.float32,
        )
        return new_max, sum_skx * fade + p_skxc.sum(axis=-1), acc

    first = jnp.int32(0)
    if spec.window is not None:
        earliest = jnp.where(length_s > 0, position_s - spec.window + 1, jnp.int32(2**30)).min()
        first = jnp.maximum(earliest, 0) // chunk
    last = (length_s.max() + chunk - 1) // chunk
    start = _start_softmax(step.sinks_kg, q_skgbh, out_dim)
    max_skx, sum_skx, acc_skxh = lax.fori_loop(first, last, one_chunk, start)
    out_skxh = acc_skxh / jnp.maximum(sum_skx, jnp.float32(1e-30))[..., None]
    out_skgbh = out_skxh.astype(q_skgbh.dtype).reshape(*q_skgbh.shape[:4], out_dim)
    if not spec.needs_lse:
        return _Part(out_skgbh, None)
    lse_skx = jnp.where(sum_skx > 0, max_skx + jnp.log(sum_skx), -jnp.inf)
    return _Part(out_skgbh, lse_skx.reshape(q_skgbh.shape[:4]))


def _chunk_loader(
    pages: KVPages, num_kv: int, chunk: int, compute: jnp.dtype
) -> Callable[[jax.Array], jax.Array]:
    """Gathers rows of the pool [S, pages of a chunk] as values [S, K, C, H]."""
    page_size, head_dim = pages.rows_rkph.shape[2:]
    pool_headwise = pages.rows_rkph.reshape(-1, page_size, head_dim)
    head_k = jnp.arange(num_kv, dtype=jnp.int32)

    def load(row_sc: jax.Array) -> jax.Array:
        row_skc = row_sc[:, None, :] * num_kv + head_k[None, :, None]
        stored = pool_headwise.at[row_skc].get(mode="clip")
        if pages.scales_rkp is None:
            kv = page_moves.from_storage(stored, compute)
        else:
            scale = pages.scales_rkp.reshape(-1, page_size).at[row_skc].get(mode="clip")
            kv = dequantise(stored, scale, compute)
        return kv.reshape(row_sc.shape[0], num_kv, chunk, head_dim)

    return load


def _start_softmax(
    sinks_kg: jax.Array | None, q_skgbh: jax.Array, out_dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest score, sum of weights and weighted values before any key: nothing, or the sink."""
    num_seqs, num_kv, num_groups, num_queries, _ = q_skgbh.shape
    shape = (num_seqs, num_kv, num_groups * num_queries)
    acc_skxh = jnp.zeros((*shape, out_dim), jnp.float32)
    if sinks_kg is None:
        return jnp.full(shape, NEG_INF, jnp.float32), jnp.zeros(shape, jnp.float32), acc_skxh
    sink = sinks_kg.astype(jnp.float32)[None, :, :, None]
    return (
        jnp.broadcast_to(sink, q_skgbh.shape[:4]).reshape(shape),
        jnp.ones(shape, jnp.float32),
        acc_skxh,
    )


def table_width(max_model_len: int, page_size: int) -> int:
    """Page-table entries per sequence: all its pages, padded to whole chunks."""
    multiple = math.lcm(
        _chunk_pages(DECODE_CHUNK_TOKENS, page_size), _chunk_pages(PREFILL_CHUNK_TOKENS, page_size)
    )
    return math.ceil(max_model_len / page_size / multiple) * multiple
