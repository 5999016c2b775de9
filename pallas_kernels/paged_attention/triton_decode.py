"""Decode on Pallas-Triton: one query token a row, its keys split among programs, then merged.

A program attends for the query heads of one KV head to one split of one row's keys; a second launch
merges the splits by their log-sum-exp. Splits are runs of whole blocks of keys, equal within a row;
those that a short row leaves empty yield zeros and -inf.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.pallas_kernels.paged_attention.specs import Attended, KVPages, RaggedRows
from jaxserve.pallas_kernels.paged_attention.triton_tile import (
    Keys,
    Phase,
    Rows,
    Statics,
    attend,
    finish,
    key_blocks,
    load_queries,
    load_tile,
    powers_of_two,
    store_tile,
)


def decode(
    q_rqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    layer: jax.Array,
    sinks_q: jax.Array | None,
    statics: Statics,
    *,
    num_splits: int,
    num_warps: int,
    num_stages: int,
) -> Attended:
    """Attention of rows [0, num_decodes); the others yield zeros.

    Args:
        q_rqh: a token for each row.
        pages: `rows_rkph` as [slots, H], `scales_rkp` as [slots].
    """
    num_rows, num_q, head_dim = q_rqh.shape
    value_dim = statics.value_dim
    inputs = {
        "q": q_rqh.reshape(-1, head_dim),
        "pages": pages,
        "page_table": rows.page_table,
        "layer": layer,
        "kv_len": rows.kv_len,
        "num_decodes": rows.num_decodes.reshape(1),
    }
    if sinks_q is not None:
        inputs["sinks"] = sinks_q
    count = num_splits * num_rows * num_q
    is_split = num_splits > 1
    outputs = {
        "out": jax.ShapeDtypeStruct((count, value_dim), jnp.float32 if is_split else q_rqh.dtype)
    }
    if is_split or statics.spec.needs_lse:
        outputs["lse"] = jax.ShapeDtypeStruct((count,), jnp.float32)
    num_tiles = pl.cdiv(statics.group, statics.block_m)
    found = pl.pallas_call(
        functools.partial(_decode_kernel, statics=statics),
        grid=(statics.num_kv * num_tiles, num_splits, num_rows),
        in_specs=[anywhere(inputs)],
        out_specs=anywhere(outputs),
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=statics.interpret,
        name="paged_decode",
    )(inputs)
    if is_split:
        found = _merge(found, num_splits, q_rqh.dtype, statics)
    lse = found.get("lse")
    return Attended(
        found["out"].reshape(num_rows, num_q, value_dim),
        None if lse is None else lse.reshape(num_rows, num_q),
    )


def anywhere(tree: Any) -> Any:
    """Specs of whole arrays in global memory."""
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), tree)


def _decode_kernel(inputs: dict[str, Any], outputs: dict[str, Any], *, statics: Statics) -> None:
    group, block_m = statics.group, statics.block_m
    num_tiles = pl.cdiv(group, block_m)
    head = lax.div(pl.program_id(0), num_tiles)
    split, row = pl.program_id(1), pl.program_id(2)
    kv_len = jnp.where(row < inputs["num_decodes"][0], inputs["kv_len"][row], 0)
    of_group_m = lax.rem(pl.program_id(0), num_tiles) * block_m + lax.iota(jnp.int32, block_m)
    q_head_m = head * group + of_group_m
    rows = Rows(
        index_m=row * statics.num_q + q_head_m,
        is_live_m=of_group_m < group,
        position_m=None,
        first_position=kv_len - 1,
        last_position=kv_len - 1,
    )
    blocks = key_blocks(rows, statics)
    length = pl.cdiv(blocks.end - blocks.begin, pl.num_programs(1))
    begin = blocks.begin + split * length
    phase = Phase(True, begin, jnp.minimum(begin + length, blocks.end))
    keys = Keys(inputs["pages"], inputs["page_table"], inputs["layer"][0], row, head)
    queries = load_queries(inputs["q"], rows, statics)
    state = attend(queries, rows, keys, (phase,), statics, loads_ahead=statics.is_quantised)
    sink_m = None
    if "sinks" in inputs:
        at = inputs["sinks"].at[q_head_m]
        sink_m = pltriton.load(at, mask=rows.is_live_m, other=jnp.float32(0))
        sink_m = jnp.where(split == 0, sink_m, -jnp.inf)
    found = finish(state, sink_m)
    index_m = split * (pl.num_programs(2) * statics.num_q) + rows.index_m
    store_tile(outputs["out"], index_m, rows.is_live_m, statics.value_pieces, found.out_mh)
    if "lse" in outputs:
        pltriton.store(outputs["lse"].at[index_m], found.lse_m, mask=rows.is_live_m)


def _merge(
    parts: dict[str, jax.Array], num_splits: int, dtype: jnp.dtype, statics: Statics
) -> dict[str, jax.Array]:
    """One launch for what XLA makes three of (see `merge` for the formula)."""
    count = parts["out"].shape[0] // num_splits
    outputs = {"out": jax.ShapeDtypeStruct((count, statics.value_dim), dtype)}
    if statics.spec.needs_lse:
        outputs["lse"] = jax.ShapeDtypeStruct((count,), jnp.float32)
    return pl.pallas_call(
        functools.partial(_merge_kernel, num_splits=num_splits),
        grid=(count,),
        in_specs=[anywhere(parts)],
        out_specs=anywhere(outputs),
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(num_warps=1 if num_splits <= 8 else 4),
        interpret=statics.interpret,
        name="paged_decode_merge",
    )(parts)


def _merge_kernel(inputs: dict[str, Any], outputs: dict[str, Any], *, num_splits: int) -> None:
    """Merges the splits of one query row."""
    index, count = pl.program_id(0), pl.num_programs(0)
    split_s = lax.iota(jnp.int32, pl.next_power_of_2(num_splits))
    is_split_s = split_s < num_splits
    at_s = split_s * count + index
    lse_s = pltriton.load(inputs["lse"].at[at_s], mask=is_split_s, other=jnp.float32(-jnp.inf))
    max_lse = lse_s.max()
    base = jnp.where(max_lse > -jnp.inf, max_lse, 0.0)
    weight_s = jnp.exp(lse_s - base)
    total = weight_s.sum()
    weight_s *= 1 / jnp.where(total > 0, total, 1.0)
    for piece in powers_of_two(inputs["out"].shape[1]):
        [part_sh] = load_tile(inputs["out"], at_s, is_split_s, (piece,))
        begin, size = piece
        out_h = (part_sh * weight_s[:, None]).sum(axis=0)
        outputs["out"][index, pl.ds(begin, size)] = out_h.astype(outputs["out"].dtype)
    if "lse" in outputs:
        outputs["lse"][index] = base + jnp.log(total)
