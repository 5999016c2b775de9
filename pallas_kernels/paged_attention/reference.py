"""Paged attention in plain jnp/lax: the oracle of the kernels and the CPU default.

Blocked with an online softmax, and looped with dynamic trip counts, so that padding rows, short
sequences and the upper triangle cost nothing. Softmax is in float32.

Decode rows are sorted by length and done in groups of rows that then have similar lengths;
prefill rows are cut into tiles of query tokens of one row. A tile's tail may run past its row: the
garbage lands on tokens that a later tile writes, or on padding.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows

NEG_INF = -1e30

# Measured on two cores of a Zen 5: smaller blocks lose to loop overhead, larger ones to the cache.
DECODE_GROUP_ROWS = 4
DECODE_CHUNK_TOKENS = 128
PREFILL_TILE_TOKENS = 256
PREFILL_CHUNK_TOKENS = 256


def _chunk_pages(chunk_tokens: int, page_size: int) -> int:
    """Pages per chunk of keys."""
    return max(1, chunk_tokens // page_size)


def write_kv(
    pool_rkph: Shaped[Array, "rows K P H"],
    k_tkh: Float[Array, "T K H"],
    v_tkh: Float[Array, "T K H"],
    page_t: Int[Array, " T"],
    offset_t: Int[Array, " T"],
    spec: AttentionSpec,
) -> Shaped[Array, "rows K P H"]:
    """Write one layer's keys and values; tokens whose page is negative are dropped."""
    num_rows = pool_rkph.shape[0]
    row_t = jnp.where(page_t < 0, num_rows, (page_t * spec.num_layers + spec.layer) * 2)
    k_tkh = to_storage(k_tkh, pool_rkph.dtype)
    v_tkh = to_storage(v_tkh, pool_rkph.dtype)
    if row_t.shape[0] == 1:
        # XLA turns a scatter of one update into a slice update, and copies the pool for it.
        row_t = jnp.pad(row_t, (0, 1), constant_values=num_rows)
        offset_t = jnp.pad(offset_t, (0, 1))
        k_tkh, v_tkh = (jnp.pad(x, ((0, 1), (0, 0), (0, 0))) for x in (k_tkh, v_tkh))
    pool_rkph = pool_rkph.at[row_t, :, offset_t, :].set(k_tkh, mode="drop")
    return pool_rkph.at[row_t + 1, :, offset_t, :].set(v_tkh, mode="drop")


def to_storage(x: jax.Array, storage: jnp.dtype) -> jax.Array:
    """Cast to the pool's dtype; an unsigned one holds the raw bits (see kv.pool)."""
    return lax.bitcast_convert_type(x, storage) if storage == jnp.uint16 else x.astype(storage)


def from_storage(x: jax.Array, compute: jnp.dtype) -> jax.Array:
    """The inverse of `to_storage`."""
    return lax.bitcast_convert_type(x, compute) if x.dtype == jnp.uint16 else x.astype(compute)


def ragged_paged_attention(
    q_tqh: Float[Array, "T Q H"],
    pool_rkph: Shaped[Array, "rows K P H"],
    rows: RaggedRows,
    spec: AttentionSpec,
) -> Float[Array, "T Q H"]:
    """Causal attention of every row's queries to its pages; padding tokens get anything finite."""
    num_tokens, num_q, head_dim = q_tqh.shape
    num_kv = pool_rkph.shape[1]
    num_groups = num_q // num_kv
    q_tkgh = q_tqh.reshape(num_tokens, num_kv, num_groups, head_dim)
    out_tkgh = _decode(q_tkgh[: rows.q_len.shape[0]], pool_rkph, rows, spec)
    pad = num_tokens - out_tkgh.shape[0]
    if pad:
        out_tkgh = jnp.pad(out_tkgh, ((0, pad), (0, 0), (0, 0), (0, 0)))
    if rows.has_prefills:
        out_tkgh = _prefill(out_tkgh, q_tkgh, pool_rkph, rows, spec)
    return out_tkgh.reshape(num_tokens, num_q, head_dim)


def _decode(q_rkgh: jax.Array, pool: jax.Array, rows: RaggedRows, spec: AttentionSpec) -> jax.Array:
    num_rows = q_rkgh.shape[0]
    group_rows = min(DECODE_GROUP_ROWS, num_rows)
    kv_len_r = jnp.where(jnp.arange(num_rows) < rows.num_decodes, rows.kv_len, 0)
    order = jnp.argsort(-kv_len_r).astype(jnp.int32)
    pad = -num_rows % group_rows
    order = jnp.pad(order, (0, pad), constant_values=num_rows)

    def one_group(group, out_rkgh):
        row_g = lax.dynamic_slice(order, (group * group_rows,), (group_rows,))
        length_g = kv_len_r.at[row_g].get(mode="fill", fill_value=0)
        table_gm = rows.page_table.at[row_g].get(mode="clip")
        q_gkgh = q_rkgh.at[row_g].get(mode="clip")[:, :, :, None, :]
        out_gkgh = _attend_chunks(
            q_gkgh, length_g - 1, length_g, table_gm, pool, spec, DECODE_CHUNK_TOKENS
        )
        return out_rkgh.at[row_g].set(out_gkgh[:, :, :, 0, :], mode="drop")

    num_groups = (rows.num_decodes + group_rows - 1) // group_rows
    return lax.fori_loop(0, num_groups, one_group, jnp.zeros_like(q_rkgh))


def _prefill(
    out_tkgh: jax.Array,
    q_tkgh: jax.Array,
    pool: jax.Array,
    rows: RaggedRows,
    spec: AttentionSpec,
) -> jax.Array:
    num_tokens = q_tkgh.shape[0]
    tile = min(PREFILL_TILE_TOKENS, num_tokens)
    is_prefill_r = jnp.arange(rows.q_len.shape[0]) >= rows.num_decodes
    tiles_r = jnp.where(is_prefill_r, (rows.q_len + tile - 1) // tile, 0)
    end_r = jnp.cumsum(tiles_r).astype(jnp.int32)
    out_tkgh = jnp.pad(out_tkgh, ((0, tile), (0, 0), (0, 0), (0, 0)))
    q_tkgh = jnp.pad(q_tkgh, ((0, tile), (0, 0), (0, 0), (0, 0)))

    def one_tile(index, out_tkgh):
        row = jnp.searchsorted(end_r, index, side="right").astype(jnp.int32)
        first = (index - (end_r[row] - tiles_r[row])) * tile  # within the row's queries
        start = rows.q_start[row] + first
        position = rows.kv_len[row] - rows.q_len[row] + first
        q_bkgh = lax.dynamic_slice_in_dim(q_tkgh, start, tile, axis=0)
        q_1kgbh = q_bkgh.transpose(1, 2, 0, 3)[None]
        length_1 = jnp.minimum(rows.kv_len[row], position + tile)[None]
        table_1m = lax.dynamic_slice_in_dim(rows.page_table, row, 1, axis=0)
        out_1kgbh = _attend_chunks(
            q_1kgbh, position[None], length_1, table_1m, pool, spec, PREFILL_CHUNK_TOKENS
        )
        out_bkgh = out_1kgbh[0].transpose(2, 0, 1, 3)
        return lax.dynamic_update_slice_in_dim(out_tkgh, out_bkgh, start, axis=0)

    return lax.fori_loop(0, end_r[-1], one_tile, out_tkgh)[:num_tokens]


def _attend_chunks(
    q_skgbh: Float[Array, "S K G B H"],
    position_s: Int[Array, " S"],
    length_s: Int[Array, " S"],
    table_sm: Int[Array, "S M"],
    pool: Shaped[Array, "rows K P H"],
    spec: AttentionSpec,
    chunk_tokens: int,
) -> Float[Array, "S K G B H"]:
    """B consecutive queries of each sequence, from `position_s`, over keys [0, length_s)."""
    num_seqs, num_kv, num_groups, num_queries, head_dim = q_skgbh.shape
    page_size = pool.shape[2]
    num_pages = _chunk_pages(chunk_tokens, page_size)
    if table_sm.shape[1] % num_pages:
        raise ValueError(
            f"the page table is {table_sm.shape[1]} wide; expected a multiple of {num_pages}: "
            "make it table_width(...) wide"
        )
    chunk = num_pages * page_size
    pool_headwise = pool.reshape(-1, page_size, head_dim)
    head_k = jnp.arange(num_kv, dtype=jnp.int32)
    q_skxh = q_skgbh.reshape(num_seqs, num_kv, num_groups * num_queries, head_dim)
    q_pos_sb = position_s[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None]

    def load(row_sc):
        row_skc = row_sc[:, None, :] * num_kv + head_k[None, :, None]
        kv = from_storage(pool_headwise.at[row_skc].get(mode="clip"), q_skgbh.dtype)
        return kv.reshape(num_seqs, num_kv, chunk, head_dim)

    def one_chunk(index, carry):
        max_skx, sum_skx, acc_skxh = carry
        page_sc = lax.dynamic_slice_in_dim(table_sm, index * num_pages, num_pages, axis=1)
        row_sc = (page_sc * spec.num_layers + spec.layer) * 2
        k_skch, v_skch = load(row_sc), load(row_sc + 1)
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
    shape = q_skxh.shape[:3]
    start = (
        jnp.full(shape, NEG_INF, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, sum_skx, acc_skxh = lax.fori_loop(first, last, one_chunk, start)
    out = acc_skxh / jnp.maximum(sum_skx, jnp.float32(1e-30))[..., None]
    return out.astype(q_skgbh.dtype).reshape(q_skgbh.shape)


def table_width(max_model_len: int, page_size: int) -> int:
    """Page-table entries per sequence: all its pages, padded to whole chunks."""
    multiple = math.lcm(
        _chunk_pages(DECODE_CHUNK_TOKENS, page_size), _chunk_pages(PREFILL_CHUNK_TOKENS, page_size)
    )
    return math.ceil(max_model_len / page_size / multiple) * multiple
