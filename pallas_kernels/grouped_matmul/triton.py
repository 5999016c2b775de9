"""Grouped products in Pallas-Triton: a program makes one tile of rows of one run, by some outputs.

A tile is as high as runs are long on average, so that few rows are padded: with few tokens, what
costs time is reading the matrices, and each is read once. Upstream has deprecated Pallas-Triton
(see `paged_attention.triton`); this is as thin as that.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.pallas_kernels.grouped_matmul.runs import cut
from jaxserve.pallas_kernels.paged_attention.triton_decode import anywhere
from jaxserve.pallas_kernels.paged_attention.triton_tile import MIN_SIDE

MAX_BLOCK_M = 128
BLOCK_O = 128
BLOCK_I = 64


def grouped_matmul(
    x_mi: jax.Array,
    w_eoi: jax.Array,
    sizes_e: jax.Array,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Like `reference.grouped_matmul`."""
    (num_rows, num_in), (num_runs, num_out, _) = x_mi.shape, w_eoi.shape
    if num_rows == 0:
        return jnp.zeros((0, num_out), out_dtype)
    is_wide = x_mi.dtype.itemsize > 2
    block_m = min(MAX_BLOCK_M, max(MIN_SIDE, pl.next_power_of_2(-(-num_rows // num_runs))))
    block_o = min(BLOCK_O, max(MIN_SIDE, pl.next_power_of_2(num_out)))
    block_i = min(BLOCK_I // (2 if is_wide else 1), max(MIN_SIDE, pl.next_power_of_2(num_in)))
    tiles = cut(sizes_e, num_rows, block_m)
    inputs = {"x": x_mi, "w": w_eoi.reshape(-1, num_in), "tiles": tiles}
    out = jax.ShapeDtypeStruct((num_rows, num_out), out_dtype)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            num_runs=num_runs,
            block_m=block_m,
            block_o=block_o,
            block_i=block_i,
            interpret=interpret,
        ),
        # Programs that share a matrix are neighbours.
        grid=(tiles.run_n.shape[0], pl.cdiv(num_out, block_o)),
        in_specs=[anywhere(inputs)],
        out_specs=anywhere(out),
        out_shape=out,
        compiler_params=pltriton.CompilerParams(
            num_warps=8 if block_m == MAX_BLOCK_M else 4, num_stages=3
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(inputs)


def _kernel(
    inputs: dict[str, Any],
    out_mo: Any,
    *,
    num_runs: int,
    block_m: int,
    block_o: int,
    block_i: int,
    interpret: bool,
) -> None:
    x_ref, w_ref, tiles = inputs["x"], inputs["w"], inputs["tiles"]
    num_out, num_in = out_mo.shape[1], x_ref.shape[1]
    tile = pl.program_id(0)
    run, begin, end = tiles.run_n[tile], tiles.begin_n[tile], tiles.end_n[tile]
    row_m = begin + lax.iota(jnp.int32, block_m)
    output_o = pl.program_id(1) * block_o + lax.iota(jnp.int32, block_o)
    is_row_m, is_output_o = row_m < end, output_o < num_out
    # Rows after the last run have no matrix, and come out as zeros.
    has_matrix = (run < num_runs) & (begin < end)
    num_blocks = jnp.where(has_matrix, jnp.int32(pl.cdiv(num_in, block_i)), jnp.int32(0))
    at_o = jnp.where(run < num_runs, run, 0) * num_out + jnp.where(is_output_o, output_o, 0)
    precision = _precision(x_ref.dtype, interpret)

    def one_block(index: jax.Array, acc_mo: jax.Array) -> jax.Array:
        input_i = index * block_i + lax.iota(jnp.int32, block_i)
        x = _load(x_ref, row_m, is_row_m, input_i, num_in)
        w = _load(w_ref, at_o, is_output_o, input_i, num_in)
        dims = (((1,), (1,)), ((), ()))
        return acc_mo + lax.dot_general(
            x, w, dims, precision=precision, preferred_element_type=jnp.float32
        )

    acc_mo = jnp.zeros((block_m, block_o), jnp.float32)
    acc_mo = lax.fori_loop(jnp.int32(0), num_blocks, one_block, acc_mo)
    at, mask = _place(out_mo, row_m, is_row_m, output_o, is_output_o)
    pltriton.store(at, acc_mo.astype(out_mo.dtype), mask=mask)


def _precision(dtype: jnp.dtype, interpret: bool) -> Any:
    """Of float32, as three products of TF32 parts."""
    if dtype != jnp.float32:
        return None
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _load(
    ref: Any, row_x: jax.Array, is_row_x: jax.Array, input_i: jax.Array, num_in: int
) -> jax.Array:
    """A block of a matrix; zeros beyond its sides."""
    at, mask = _place(ref, row_x, is_row_x, input_i, input_i < num_in)
    return pltriton.load(at, mask=mask, other=jnp.zeros((), ref.dtype))


def _place(
    ref: Any, row_x: jax.Array, is_row_x: jax.Array, column_y: jax.Array, is_column_y: jax.Array
) -> tuple[Any, jax.Array]:
    """Every index in full: a masked access needs that when interpreted."""
    shape = (row_x.shape[0], column_y.shape[0])
    rows, is_row = (lax.broadcast_in_dim(x, shape, (0,)) for x in (row_x, is_row_x))
    columns, is_column = (lax.broadcast_in_dim(x, shape, (1,)) for x in (column_y, is_column_y))
    return ref.at[rows, columns], is_row & is_column
