"""Grouped products on TPU by the kernel that ships with JAX (Megablox).

It wants rows in whole tiles, and says nothing of rows after the last run: they are made zeros here,
and go through the last matrix.
"""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.grouped_matmul.runs import is_in_runs

LANES = 128
TILE_ROWS = 128
TILE = 512
"""Of inputs and outputs; three tiles and their copies stay within VMEM."""


def grouped_matmul(
    x_mi: jax.Array,
    w_eoi: jax.Array,
    sizes_e: jax.Array,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Like `reference.grouped_matmul`.

    Raises:
        NotImplementedError: float16, or sides that are no multiple of the lanes.
    """
    # Imported here: the package of this kernel is there on every machine, its interpreter not.
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    num_rows, num_in = x_mi.shape
    num_out = w_eoi.shape[1]
    if x_mi.dtype == jnp.float16:
        raise NotImplementedError("float16: TPUs have no arithmetic for it, bfloat16 they have")
    if not interpret and (num_in % LANES or num_out % LANES):
        raise NotImplementedError(
            f"{num_in} inputs and {num_out} outputs: not multiples of {LANES}"
        )
    pad = -num_rows % TILE_ROWS
    rest = num_rows + pad - sizes_e.sum(dtype=jnp.int32)
    is_row_m1 = is_in_runs(sizes_e, num_rows)
    sizes_e = sizes_e.at[-1].add(rest)
    y_mo: jax.Array = gmm(
        jnp.pad(jnp.where(is_row_m1, x_mi, jnp.zeros((), x_mi.dtype)), ((0, pad), (0, 0))),
        w_eoi,
        sizes_e,
        preferred_element_type=out_dtype,
        tiling=(TILE_ROWS, min(TILE, num_in), min(TILE, num_out)),
        transpose_rhs=True,
        interpret=interpret,
    )
    return y_mo[:num_rows] if pad else y_mo
