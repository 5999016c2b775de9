"""Grouped products in plain jnp/lax: what every other backend falls back to.

A loop over tiles of rows of one run, with a dynamic trip count: what it computes grows with the
rows there are, not with the number of matrices. On CPU the matrix of a tile is copied out of the
stack first, which costs as much as reading it twice more.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.grouped_matmul.runs import is_in_runs

TILE_ROWS = 64


def grouped_matmul(
    x_mi: Float[Array, "M I"],
    w_eoi: Float[Array, "E O I"],
    sizes_e: Int[Array, " E"],
    out_dtype: jnp.dtype,
) -> Float[Array, "M O"]:
    """Each run of rows times its matrix, transposed; summed in float32.

    Args:
        sizes_e: rows of each run; runs follow each other, and may be empty.

    Returns:
        Zeros in the rows after the last run.
    """
    num_rows = x_mi.shape[0]
    # XLA:CPU's library takes bfloat16 products of two rows or more only.
    tile = max(2, min(TILE_ROWS, num_rows))
    tiles_e = (sizes_e + tile - 1) // tile
    last_e = jnp.cumsum(tiles_e, dtype=jnp.int32)
    begin_e = jnp.cumsum(sizes_e, dtype=jnp.int32) - sizes_e
    x_pi = jnp.pad(x_mi, ((0, tile), (0, 0)))

    def one_tile(index: jax.Array, out_po: jax.Array) -> jax.Array:
        run = jnp.searchsorted(last_e, index, side="right").astype(jnp.int32)
        start = begin_e[run] + (index - (last_e - tiles_e)[run]) * tile
        x_ti = lax.dynamic_slice_in_dim(x_pi, start, tile)
        w_oi = lax.dynamic_index_in_dim(w_eoi, run, keepdims=False)
        dims = (((1,), (1,)), ((), ()))
        y_to = lax.dot_general(x_ti, w_oi, dims, preferred_element_type=jnp.float32)
        # What runs past the run lands on rows that a later tile writes, or that are cleared.
        return lax.dynamic_update_slice_in_dim(out_po, y_to.astype(out_dtype), start, axis=0)

    out_po = jnp.zeros((num_rows + tile, w_eoi.shape[1]), out_dtype)
    out_mo = lax.fori_loop(0, last_e[-1], one_tile, out_po)[:num_rows]
    return jnp.where(is_in_runs(sizes_e, num_rows), out_mo, jnp.zeros((), out_dtype))
