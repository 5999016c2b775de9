"""Prefill on Hopper: tiles of query tokens against all keys that they see.

A block has three warpgroups. Two compute, 64 query rows each (tokens of one head, or of several
heads of one KV head), and share each tile of keys and values; the third copies tiles into a ring
ahead of them, and widens pages of 8 bits. The two take turns (FlashAttention-3, Shah et al. 2024):
while one is at its softmax, the other has the tensor cores.

XLA cuts each row's query tokens into blocks, which start where the row starts: the last block of a
row hangs over, and what it computes there is not used. One thread block (program) to a
multiprocessor goes through many of these, those with most keys first, to and fro, so that all
programs end at about the same time; the copies of the next block begin while this one ends. Tiles
whose keys all queries see are not masked.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tiles import (
    WARPGROUP_ROWS,
    Machine,
    place_among,
)
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_warpgroups import (
    COMPUTING,
    Block,
    Computer,
    Copier,
    Launch,
    RowTiles,
    Schedule,
    Scratch,
    Turn,
    scratch_types,
)
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)


def row_tiles(group: int) -> RowTiles:
    """As many heads as go into the rows of two warpgroups without a rest.

    The more heads, the fewer tokens: a short prompt or chunk wastes less. At least 8 tokens, which
    is what one copy of outputs needs.
    """
    for heads in (8, 4, 2, 1):
        if group % (COMPUTING * heads) == 0:
            return RowTiles(heads, False, group // (COMPUTING * heads))
    return RowTiles(1, True, group)


class Blocks(NamedTuple):
    """How the rows' query tokens are cut; unused blocks come last."""

    block_b8: jax.Array  # [B, 8] int32: see `Block`
    place_t: jax.Array  # [T] int32: where the token's results are, as block * tokens + token
    is_prefill_t: jax.Array  # [T] bool


def cut(
    rows: RaggedRows, spec: AttentionSpec, num_tokens: int, tile: int, block_tokens: int
) -> Blocks:
    """Cut each prefill row into blocks of `block_tokens` queries."""
    row_r = jnp.arange(rows.q_len.shape[0], dtype=jnp.int32)
    is_prefill_r = (row_r >= rows.num_decodes) & (row_r < rows.num_rows)
    q_len_r = jnp.where(is_prefill_r, rows.q_len, 0)
    end_r = jnp.cumsum(-(-q_len_r // block_tokens)).astype(jnp.int32)
    first_r = jnp.concatenate([jnp.zeros(1, jnp.int32), end_r[:-1]])
    num_blocks = num_tokens // block_tokens + row_r.shape[0]

    index_b = jnp.arange(num_blocks, dtype=jnp.int32)
    row_b = place_among(end_r, index_b)
    row_b = jnp.minimum(row_b, row_r.shape[0] - 1)
    skipped_b = (index_b - first_r[row_b]) * block_tokens
    position_b = rows.kv_len[row_b] - rows.q_len[row_b] + skipped_b
    begin_b = jnp.zeros_like(index_b)
    if spec.window is not None:
        begin_b = jnp.maximum(position_b - spec.window + 1, 0) // tile
    end_b = -(-jnp.minimum(position_b + block_tokens, rows.kv_len[row_b]) // tile)
    is_used_b = index_b < end_r[-1]
    begin_b, end_b = jnp.where(is_used_b, begin_b, 0), jnp.where(is_used_b, end_b, 0)
    plan = Block(
        index_b,
        row_b,
        rows.kv_len[row_b],
        rows.q_start[row_b] + skipped_b,
        position_b,
        begin_b,
        end_b,
        jnp.broadcast_to(end_r[-1], index_b.shape),
    )
    longest_first = jnp.argsort(begin_b - end_b)
    block_b8 = jnp.stack(plan, axis=1)[longest_first].astype(jnp.int32)

    token_t = jnp.arange(num_tokens, dtype=jnp.int32)
    row_t = place_among(rows.q_start, token_t) - 1
    row_t = jnp.maximum(row_t, 0)
    within_t = token_t - rows.q_start[row_t]
    place_t = (first_r[row_t] + within_t // block_tokens) * block_tokens + within_t % block_tokens
    is_prefill_t = is_prefill_r[row_t] & (within_t < q_len_r[row_t])
    return Blocks(block_b8, jnp.where(is_prefill_t, place_t, 0), is_prefill_t)


def attend(
    q_tqh: Float[Array, "T Q H"],
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    launch: Launch,
    machine: Machine,
    layer: Int32[Array, "1"],
    sinks_q: Float[Array, " Q"] | None,
) -> Attended:
    """Attention of the prefill rows' tokens; the other tokens get zeros and -inf."""
    num_tokens, num_q, head_dim = q_tqh.shape
    num_kv = pages.rows_rkph.shape[1]
    shape = row_tiles(num_q // num_kv)
    blocks = cut(rows, spec, num_tokens, launch.page_tiles.tile_tokens, shape.block_tokens)
    if machine.is_interpreted:  # A copy that hangs over the end brings zeros on the device.
        q_tqh = jnp.pad(q_tqh, ((0, shape.block_tokens), (0, 0), (0, 0)))
    if sinks_q is not None:
        sinks_q = sinks_q.astype(jnp.float32).reshape(num_kv * shape.chunks, -1, shape.heads)
        warpgroups = (sinks_q.shape[0], COMPUTING, shape.heads, shape.tokens)
        sinks_q = jnp.broadcast_to(sinks_q[..., None], warpgroups)
        sinks_q = sinks_q.reshape(-1, COMPUTING, WARPGROUP_ROWS)
    out, lse = _launch(
        q_tqh, pages, rows, blocks.block_b8, spec, launch, machine, layer, shape, sinks_q
    )
    out_tqh = out.reshape(-1, num_q, head_dim)[blocks.place_t]
    # lse is [blocks, chunks, warpgroups, heads, tokens]
    lse = lse.reshape(-1, num_kv, shape.chunks, COMPUTING, shape.heads, shape.tokens)
    order = (0, 3, 5, 1, 2, 4) if shape.splits_tokens else (0, 5, 1, 2, 3, 4)
    lse_tq = lse.transpose(order).reshape(-1, num_q)[blocks.place_t]
    return Attended(
        jnp.where(blocks.is_prefill_t[:, None, None], out_tqh, jnp.zeros((), out_tqh.dtype)),
        jnp.where(blocks.is_prefill_t[:, None], lse_tq, -jnp.inf),
    )


def _launch(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    block_b8: jax.Array,
    spec: AttentionSpec,
    launch: Launch,
    machine: Machine,
    layer: jax.Array,
    shape: RowTiles,
    sinks: jax.Array | None,
) -> "tuple[jax.Array, jax.Array]":
    """Outputs [B, splits of tokens, tokens, Q, H] and lse [B, chunks, 2, 64]."""
    _, num_q, head_dim = q_tqh.shape
    num_kv, num_blocks = pages.rows_rkph.shape[1], block_b8.shape[0]
    num_chunks = num_kv * shape.chunks

    def paged_prefill(
        q_ref: Any, table_ref: Any, layer_ref: Any, block_ref: Any, *refs: Any, **scratch: Any
    ) -> None:
        *pool_refs, out_ref, lse_ref = refs
        sink_ref = pool_refs.pop(0) if sinks is not None else None
        warpgroup = lax.axis_index("warpgroup")
        schedule = Schedule(spec, launch, block_ref, num_chunks)
        smem = Scratch(**scratch)

        def compute() -> None:
            plgpu.set_max_registers(launch.computing_registers, action="increase")
            computer = Computer(spec, launch, machine, shape, smem, warpgroup)

            def take_turn(turn: Turn) -> None:
                queries = computer.queries(turn)
                sink_at = None if sink_ref is None else sink_ref.at[turn.chunk, warpgroup]
                computer.take_queries(queries, q_ref, sink_at)
                state = computer.attend(turn, queries)
                # Read again rather than kept in registers meanwhile.
                turn = schedule.turn(machine.opaque(turn.number), turn.step)
                place = turn.block.place
                computer.give_results(
                    state,
                    computer.queries(turn),
                    out_ref.at[place],
                    lse_ref.at[place, turn.chunk, warpgroup],
                    has_sinks=sinks is not None,
                )

            schedule.for_each(
                lambda turn: pl.when(turn.block.num_tiles > 0)(lambda: take_turn(turn))
            )

        def copy() -> None:
            plgpu.set_max_registers(launch.copying_registers, action="decrease")
            here = layer_ref[jnp.int32(0)]
            copier = Copier(launch, machine, smem, pool_refs, table_ref, here, shape.chunks)
            copier.drain(schedule.for_each(copier.copy_tiles))

        pl.when(warpgroup < COMPUTING)(compute)
        pl.when(warpgroup == COMPUTING)(copy)

    splits = COMPUTING if shape.splits_tokens else 1
    sink_operands = () if sinks is None else (sinks,)
    types = scratch_types(
        q_tqh.dtype, pages.rows_rkph.dtype, head_dim, launch, shape, has_sinks=sinks is not None
    )
    if not machine.is_interpreted:  # The old interpreter knows no unions.
        types = types._replace(q=plgpu.RefUnion(*types.q))
    return machine.kernel(
        paged_prefill,
        out_type=(
            jax.ShapeDtypeStruct((num_blocks, splits, shape.tokens, num_q, head_dim), q_tqh.dtype),
            jax.ShapeDtypeStruct((num_blocks, num_chunks, COMPUTING, WARPGROUP_ROWS), jnp.float32),
        ),
        scratch_types=types._asdict(),
        grid=(launch.num_programs,),
        grid_names=("program",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
    )(q_tqh, rows.page_table, layer, block_b8, *sink_operands, *launch.page_tiles.split(pages))
