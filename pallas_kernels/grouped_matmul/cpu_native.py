"""Grouped products on CPU by the C++ kernels, which read each matrix where it lies.

Needs `pallas_kernels.cpu.build.load` to have said that the kernels are there.
"""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.cpu import ops


def grouped_matmul(
    x_mi: jax.Array, w_eoi: jax.Array, sizes_e: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """Like `reference.grouped_matmul`.

    Raises:
        NotImplementedError: dtypes that the kernels do not know.
    """
    known = x_mi.dtype in (jnp.float32, jnp.bfloat16)
    if not known or out_dtype not in (x_mi.dtype, jnp.float32):
        raise NotImplementedError(f"rows of {x_mi.dtype} with results of {out_dtype}")
    return ops.grouped(x_mi, w_eoi, sizes_e, out_dtype)
