"""Prefill on Pallas-Triton: tiles of each row's query rows, each against all keys that they see.

The query rows of one row of the step and one KV head lie token by token, and within a token head by
head. They are cut into tiles of block_m wherever that falls: with 7 heads for each KV head, in the
middle of a token. A tile never spans two rows of the step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.pallas_kernels.paged_attention.specs import Attended, KVPages, RaggedRows
from jaxserve.pallas_kernels.paged_attention.triton_decode import anywhere
from jaxserve.pallas_kernels.paged_attention.triton_tile import (
    Keys,
    Phase,
    Rows,
    Statics,
    attend,
    finish,
    key_blocks,
    load_queries,
    store_tile,
)


def prefill(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    layer: jax.Array,
    sinks_q: jax.Array | None,
    before: Attended,
    statics: Statics,
    *,
    num_warps: int,
    num_stages: int,
) -> Attended:
    """`before`, with the tokens of rows [num_decodes, num_rows) replaced, in place.

    Args:
        pages: `rows_rkph` as [slots, H], `scales_rkp` as [slots].
    """
    num_tokens, _, head_dim = q_tqh.shape
    num_tiles = pl.cdiv(num_tokens * statics.group, statics.block_m) + rows.q_len.shape[0]
    tiles = _cut(rows, num_tiles, statics)
    inputs = {
        "q": q_tqh.reshape(-1, head_dim),
        "pages": pages,
        "page_table": rows.page_table,
        "layer": layer,
        "q_start": rows.q_start,
        "q_len": rows.q_len,
        "kv_len": rows.kv_len,
        "tile_row": tiles.row_n,
        "tile_begin": tiles.begin_n,
    }
    if sinks_q is not None:
        inputs["sinks"] = sinks_q
    outputs = {"out": before.out_tqh.reshape(-1, statics.value_dim)}
    if before.lse_tq is not None:
        outputs["lse"] = before.lse_tq.reshape(-1)
    num_inputs = len(jax.tree.leaves(inputs))
    found = pl.pallas_call(
        functools.partial(_prefill_kernel, statics=statics),
        grid=(num_tiles, statics.num_kv),
        in_specs=[anywhere(inputs), anywhere(outputs)],
        out_specs=anywhere(outputs),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),
        input_output_aliases={num_inputs + i: i for i in range(len(outputs))},
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=statics.interpret,
        name="paged_prefill",
    )(inputs, outputs)
    lse = found.get("lse")
    return Attended(
        found["out"].reshape(before.out_tqh.shape),
        None if lse is None else lse.reshape(q_tqh.shape[:2]),
    )


class _Tiles(NamedTuple):
    """Row of the step and first query row within it; -1 for tiles that are not used."""

    row_n: jax.Array
    begin_n: jax.Array


def _cut(rows: RaggedRows, num_tiles: int, statics: Statics) -> _Tiles:
    """The tiles of all prefill rows. The same for all layers: XLA computes it once a step."""
    row_r = jnp.arange(rows.q_len.shape[0], dtype=jnp.int32)
    is_prefill_r = (row_r >= rows.num_decodes) & (row_r < rows.num_rows)
    tiles_r = (rows.q_len * statics.group + statics.block_m - 1) // statics.block_m
    tiles_r = jnp.where(is_prefill_r, tiles_r, 0)
    end_r = jnp.cumsum(tiles_r, dtype=jnp.int32)
    tile_n = jnp.arange(num_tiles, dtype=jnp.int32)
    row_n = (end_r[None, :] <= tile_n[:, None]).sum(axis=1, dtype=jnp.int32)
    is_used_n = row_n < row_r.shape[0]
    row_n = jnp.where(is_used_n, row_n, 0)
    begin_n = (tile_n - (end_r - tiles_r)[row_n]) * statics.block_m
    return _Tiles(row_n, jnp.where(is_used_n, begin_n, -1))


def _prefill_kernel(
    inputs: dict[str, Any], before: dict[str, Any], outputs: dict[str, Any], *, statics: Statics
) -> None:
    del before  # the same memory as `outputs`
    group, block_m = statics.group, statics.block_m
    # A row's later tiles see more keys: they go first, so that none of them ends the launch alone.
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    row, begin = inputs["tile_row"][tile], inputs["tile_begin"][tile]
    q_len, kv_len = inputs["q_len"][row], inputs["kv_len"][row]
    is_used, begin = begin >= 0, jnp.maximum(begin, 0)
    at_m = begin + lax.iota(jnp.int32, block_m)
    token_m = lax.div(at_m, group)
    q_head_m = pl.program_id(1) * group + lax.rem(at_m, group)
    num_cached = kv_len - q_len
    last_position = num_cached + lax.div(begin + block_m - 1, group)
    rows = Rows(
        index_m=(inputs["q_start"][row] + token_m) * statics.num_q + q_head_m,
        is_live_m=(token_m < q_len) & is_used,
        position_m=num_cached + token_m,
        first_position=num_cached + lax.div(begin, group),
        last_position=jnp.where(is_used, jnp.minimum(last_position, kv_len - 1), -1),
    )
    blocks = key_blocks(rows, statics)
    phases = (
        Phase(True, blocks.begin, blocks.full_begin),
        Phase(False, blocks.full_begin, blocks.full_end),
        Phase(True, blocks.full_end, blocks.end),
    )
    if statics.spec.window is None:
        phases = phases[1:]
    keys = Keys(inputs["pages"], inputs["page_table"], inputs["layer"][0], row, pl.program_id(1))
    queries = load_queries(inputs["q"], rows, statics)
    state = attend(queries, rows, keys, phases, statics, loads_ahead=False)
    sink_m = None
    if "sinks" in inputs:
        at = inputs["sinks"].at[q_head_m]
        sink_m = pltriton.load(at, mask=rows.is_live_m, other=jnp.float32(0))
    found = finish(state, sink_m)
    store_tile(outputs["out"], rows.index_m, rows.is_live_m, statics.value_pieces, found.out_mh)
    if "lse" in outputs:
        pltriton.store(outputs["lse"].at[rows.index_m], found.lse_m, mask=rows.is_live_m)
