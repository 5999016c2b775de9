"""The native CPU kernels as JAX functions. Callers ask `build.load` first whether they exist.

Every output element is summed in one fixed order: results depend neither on the number of threads
nor on which other rows share the call. Not differentiable, and not partitioned over a mesh.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

MAX_ROWS = 64
"""Up to here the native products are at least as fast as XLA's, and independent of the batch."""

Products = Callable[[jax.Array, tuple[jax.Array, ...], jnp.dtype], tuple[jax.Array, ...]]


@functools.cache
def products_or(fallback: Products) -> Products:
    """Native products where they are better, else `fallback`; the same object each time."""

    def choose(
        x_td: jax.Array, weights: tuple[jax.Array, ...], out_dtype: jnp.dtype
    ) -> tuple[jax.Array, ...]:
        known = x_td.dtype in (jnp.float32, jnp.bfloat16) and all(
            w.dtype == x_td.dtype for w in weights
        )
        if not known or x_td.shape[0] > MAX_ROWS or out_dtype not in (x_td.dtype, jnp.float32):
            return fallback(x_td, weights, out_dtype)
        return products(x_td, weights, out_dtype)

    return choose


def products(
    x_td: Float[Array, "T in"], weights: tuple[jax.Array, ...], out_dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """x @ w.T for each weight [out, in], accumulated in float32; float32 or bfloat16."""
    shapes = [jax.ShapeDtypeStruct((x_td.shape[0], w.shape[0]), out_dtype) for w in weights]
    return tuple(jax.ffi.ffi_call("jaxserve_linear", shapes)(x_td, *weights))


def decode_attention(
    q_rqh: Float[Array, "R Q H"],
    pool_rkph: Shaped[Array, "rows K P H"],
    table_rm: Int[Array, "R M"],
    kv_len_r: Int[Array, " R"],
    num_decodes: Int[Array, ""],
    *,
    num_layers: int,
    layer: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "R Q H"]:
    """One query a row over its pages; rows from `num_decodes` on are zero. Reads the pool in place.

    float32 queries want a float32 pool; bfloat16 ones a bfloat16 pool or its raw uint16 bits.
    """
    call = jax.ffi.ffi_call("jaxserve_attention", jax.ShapeDtypeStruct(q_rqh.shape, q_rqh.dtype))
    return call(
        q_rqh,
        pool_rkph,
        table_rm,
        kv_len_r,
        num_decodes,
        num_layers=np.int64(num_layers),
        layer=np.int64(layer),
        window=np.int64(window or 0),
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap or 0.0),
    )
