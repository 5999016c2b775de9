"""Decode on Hopper: one query token a row, split over the keys, then merged by log-sum-exp.

XLA cuts each row's tiles of keys into pieces, so that all rows together give about as many blocks
as fill the multiprocessors a few times over; a block is a piece of one KV head. The G query heads
of the KV head lie in the first of the 64 rows of a wgmma (the others hold what nobody reads).

One warpgroup does all: it waits for a tile, starts the product with the keys, meanwhile lets one
of its warps issue the copies of a later tile, and goes on with softmax and values. Two blocks share
a multiprocessor: while one computes, the other's copies and its own are in flight.

Bytes in flight (Little's law): an H200 reads 4.8 TB/s with a latency of about 1 us under load, so
4.8 MB must be under way, 36 KB on each of 132 multiprocessors. A block has `stages` tiles of at
most 32 KB, all but the one in work under way: with 3 stages and 2 blocks at least 128 KB.

Pages of 8 bits are copied as they are and widened into a second tile, from which the tensor cores
read; the scales multiply scores and weights.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_tiles as tiles
from jaxserve.pallas_kernels.paged_attention.merge import merge_stacked
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tiles import (
    KEYS,
    VALUES,
    WARPGROUP_ROWS,
    KeyRange,
    Machine,
    PageTiles,
    Softmax,
    place_among,
)
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)

ROW_TILE = 8
"""Rows of a swizzled tile: copies of query heads come in this many."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Static sizes of a decode launch.

    Attributes:
        stages: tiles of keys, and as many of values, in shared memory.
        target_pieces: pieces of one KV head that fill the device as often as wished.
        min_piece_tiles: shorter pieces cost more to start than they save.
        max_row_pieces: bounds what the merge reads.
    """

    page_tiles: PageTiles
    stages: int
    target_pieces: int
    min_piece_tiles: int
    max_row_pieces: int


class HeadChunks(NamedTuple):
    """How query heads are cut: those of one KV head, as few times as fits the rows of wgmma."""

    total: int
    heads: int  # of each


def head_chunks(num_q: int, num_kv: int) -> HeadChunks:
    group = num_q // num_kv
    chunks = -(-group // WARPGROUP_ROWS)
    return HeadChunks(num_kv * chunks, -(-group // chunks))


class Pieces(NamedTuple):
    """How the rows' tiles are cut; W pieces in the order of rows, unused ones last."""

    piece_w4: jax.Array  # [W, 4] int32: row, its kv_len, first tile, end tile
    first_r: jax.Array  # [R] int32: first piece of the row
    count_r: jax.Array  # [R] int32


def cut(rows: RaggedRows, spec: AttentionSpec, launch: Launch) -> Pieces:
    """Cut each decode row into pieces of about equal size over all rows."""
    num_rows = rows.kv_len.shape[0]
    tile = launch.page_tiles.tile_tokens
    is_decode_r = jnp.arange(num_rows) < rows.num_decodes
    end_r = (rows.kv_len + tile - 1) // tile
    begin_r = jnp.zeros_like(end_r)
    if spec.window is not None:
        begin_r = jnp.maximum(rows.kv_len - spec.window, 0) // tile
    tiles_r = jnp.where(is_decode_r, end_r - begin_r, 0)
    size = jnp.maximum(-(-tiles_r.sum() // launch.target_pieces), launch.min_piece_tiles)
    size = jnp.maximum(size, -(-tiles_r.max() // launch.max_row_pieces))
    # Pieces of a row are made equally long, rather than leaving a short one at its end.
    size_r = jnp.maximum(-(-tiles_r // jnp.maximum(-(-tiles_r // size), 1)), 1)
    count_r = -(-tiles_r // size_r)
    last_r = jnp.cumsum(count_r)
    first_r = last_r - count_r
    num_pieces = min(launch.target_pieces + num_rows, launch.max_row_pieces * num_rows)
    piece_w = jnp.arange(num_pieces, dtype=jnp.int32)
    row_w = place_among(last_r, piece_w)
    row_w = jnp.minimum(row_w, num_rows - 1)
    is_used_w = piece_w < last_r[-1]
    begin_w = begin_r[row_w] + (piece_w - first_r[row_w]) * size_r[row_w]
    end_w = jnp.minimum(begin_w + size_r[row_w], end_r[row_w])
    begin_w, end_w = jnp.where(is_used_w, begin_w, 0), jnp.where(is_used_w, end_w, 0)
    piece_w4 = jnp.stack([row_w, rows.kv_len[row_w], begin_w, end_w], axis=1)
    return Pieces(piece_w4.astype(jnp.int32), first_r, count_r)


def attend(
    q_rqh: Float[Array, "R Q H"],
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    launch: Launch,
    machine: Machine,
    layer: Int32[Array, "1"],
) -> Attended:
    """Attention of the decode rows, without sinks, in float32; other rows give zeros and -inf."""
    num_rows, num_q, head_dim = q_rqh.shape
    num_kv = pages.rows_rkph.shape[1]
    group = num_q // num_kv
    total, heads = head_chunks(num_q, num_kv)
    chunks, padded = total // num_kv, -(-heads // ROW_TILE) * ROW_TILE
    q_rcgh = q_rqh.reshape(num_rows, num_kv, group, head_dim)
    q_rcgh = jnp.pad(q_rcgh, ((0, 0), (0, 0), (0, chunks * heads - group), (0, 0)))
    q_rcgh = q_rcgh.reshape(num_rows, num_kv * chunks, heads, head_dim)
    q_rcgh = jnp.pad(q_rcgh, ((0, 0), (0, 0), (0, padded - heads), (0, 0)))
    pieces = cut(rows, spec, launch)
    part_wcgh, lse_wcm = _launch(q_rcgh, pages, rows, pieces.piece_w4, spec, launch, machine, layer)

    index_ir = pieces.first_r[None] + jnp.arange(launch.max_row_pieces, dtype=jnp.int32)[:, None]
    is_held_ir = jnp.arange(launch.max_row_pieces)[:, None] < pieces.count_r[None]
    index_ir = jnp.where(is_held_ir, index_ir, 0)
    lse_ircg = lse_wcm[index_ir][..., :heads]
    lse_ircg = jnp.where(is_held_ir[..., None, None], lse_ircg, -jnp.inf)
    merged = merge_stacked(part_wcgh[index_ir][..., :heads, :], lse_ircg, jnp.dtype(jnp.float32))
    assert merged.lse_tq is not None

    def to_heads(x: jax.Array) -> jax.Array:
        x = x.reshape(num_rows, num_kv, chunks * heads, *x.shape[3:])[:, :, :group]
        return x.reshape(num_rows, num_q, *x.shape[3:])

    return Attended(to_heads(merged.out_tqh), to_heads(merged.lse_tq))


def _launch(
    q_rcgh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    piece_w4: jax.Array,
    spec: AttentionSpec,
    launch: Launch,
    machine: Machine,
    layer: jax.Array,
) -> "tuple[jax.Array, jax.Array]":
    """Outputs [W, C, G, H] and lse [W, C, 64] of the pieces; of unused ones, anything."""
    _, num_chunks, padded, head_dim = q_rcgh.shape
    num_pieces = piece_w4.shape[0]
    num_kv = pages.rows_rkph.shape[1]
    page_tiles, stages = launch.page_tiles, launch.stages
    heads = pl.ds(0, padded)
    is_quantised = pages.scales_rkp is not None

    def paged_decode(
        q_ref: Any, table_ref: Any, layer_ref: Any, piece_ref: Any, *refs: Any, **scratch: Any
    ) -> None:
        *pool_refs, out_ref, lse_ref = refs
        q_smem, q_ready = scratch["q_smem"], scratch["q_ready"]
        ring_smem, (out_smem, lse_smem) = scratch["union"]
        ring = tiles.Ring(page_tiles, machine, pool_refs, ring_smem, scratch["ready"])
        piece, chunk = lax.axis_index("piece"), lax.axis_index("chunk")
        kv_head = lax.div(chunk, jnp.int32(num_chunks // num_kv))
        row, kv_len, begin, end = (piece_ref[piece, index] for index in range(4))
        here = layer_ref[jnp.int32(0)]
        keys = KeyRange(jnp.int32(0), kv_len)
        if spec.window is not None:
            keys = KeyRange(jnp.maximum(kv_len - spec.window, 0), kv_len)

        def fetch(tile: jax.Array, slot: Any) -> None:
            source = tiles.Source(table_ref, here, row, kv_head, tile, keys)
            ring.fetch(source, (slot,) * len(pool_refs))

        def fetch_first() -> None:
            plgpu.copy_gmem_to_smem(q_ref.at[row, chunk], q_smem.at[heads], q_ready)
            for stage in range(stages):
                tile = begin + stage
                pl.when(tile < end)(lambda tile=tile, stage=stage: fetch(tile, stage))

        def take(part: int, slot: jax.Array) -> Any:
            """A slot's keys or values, once they are there and wide enough."""
            smem = ring.wait(part, slot)
            if not is_quantised:
                return smem
            machine.widen_tile(smem, scratch["wide"][part])
            return scratch["wide"][part]

        def scaled(x_mt: jax.Array, part: int, slot: jax.Array) -> jax.Array:
            if not is_quantised:
                return x_mt
            return tiles.scaled(machine, x_mt, ring_smem[1][part].at[slot])

        def one_tile(tile: jax.Array, state: Softmax) -> Softmax:
            slot = lax.rem(tile - begin, jnp.int32(stages))
            first = tile * page_tiles.tile_tokens

            def refill() -> None:
                """All warps are past the tile before this one: its slot is free."""
                wanted = tile + (stages - 1)
                freed = lax.rem(wanted - begin, jnp.int32(stages))
                pl.when((tile > begin) & (wanted < end))(lambda: fetch(wanted, freed))

            k_smem = take(KEYS, slot)
            score_mt = machine.scores(q_smem, k_smem, lambda: machine.from_one_warp(refill))
            score_mt = tiles.capped_base2(scaled(score_mt, KEYS, slot), spec)
            sees_mt = keys.holds(first + machine.iota(score_mt.shape, 1))
            score_mt = jnp.where(sees_mt, score_mt, -jnp.inf)
            weights = tiles.weigh(state, score_mt, may_be_masked=False)
            v_smem = take(VALUES, slot)
            is_cut = keys.cuts(first, page_tiles.tile_tokens)
            pl.when(is_cut)(lambda: machine.zero_rows_outside(v_smem, first, keys))
            weight_mt = scaled(weights.weight_mt, VALUES, slot)
            if is_quantised:  # The scales of what is not seen may be NaN.
                weight_mt = jnp.where(sees_mt, weight_mt, jnp.zeros_like(weight_mt))
            acc_mh = machine.accumulate(weights.state.acc_mh, weight_mt.astype(q_ref.dtype), v_smem)
            return weights.state._replace(acc_mh=acc_mh)

        @pl.when(begin < end)
        def _attend_piece() -> None:
            machine.from_one_warp(fetch_first)
            plgpu.barrier_wait(q_ready)
            state = lax.fori_loop(begin, end, one_tile, tiles.empty_softmax(machine, head_dim))
            done = tiles.finish(state)
            out_smem[...] = done.out_mh
            lse_smem[...] = done.lse_m
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[heads], out_ref.at[piece, chunk])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[piece, chunk])
            plgpu.wait_smem_to_gmem(0)

    outs = (
        tiles.smem_tile((WARPGROUP_ROWS, head_dim), jnp.float32),
        plgpu.SMEM((WARPGROUP_ROWS,), jnp.float32),
    )
    ring_shape = (stages, page_tiles.tile_tokens, head_dim)
    stored = pages.rows_rkph.dtype
    scratch: dict[str, Any] = {
        "q_smem": tiles.smem_tile((WARPGROUP_ROWS, head_dim), q_rcgh.dtype),
        "q_ready": plgpu.Barrier(),
        "ready": tiles.copy_barriers(page_tiles, stages, has_scales=is_quantised),
    }
    if is_quantised:
        scales = plgpu.SMEM(ring_shape[:2], jnp.float32)
        ring_types = (tiles.narrow_pair(ring_shape, stored), (scales, scales))
        scratch["wide"] = tiles.tile_pair(ring_shape[1:], q_rcgh.dtype)
    else:
        ring_types = (tiles.tile_pair(ring_shape, stored),)
    # Outputs take the place of keys and values. The old interpreter knows no unions.
    union = (ring_types, outs)
    scratch["union"] = union if machine.is_interpreted else plgpu.RefUnion(*union)
    operands = (q_rcgh, rows.page_table, layer, piece_w4, *page_tiles.split(pages))
    return machine.kernel(
        paged_decode,
        out_type=(
            jax.ShapeDtypeStruct((num_pieces, num_chunks, padded, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_pieces, num_chunks, WARPGROUP_ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(num_pieces, num_chunks),
        grid_names=("piece", "chunk"),
    )(*operands)
