"""The native CPU kernels as JAX functions. Callers ask `build.load` first whether they exist.

Every output element is summed in one fixed order: results depend neither on the number of threads
nor on which other rows share the call. Not differentiable, and not partitioned over a mesh.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas_kernels.cpu import build
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows

MAX_ROWS = 64
"""Up to here the native products are at least as fast as XLA's on every machine."""

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
        if not known or out_dtype not in (x_td.dtype, jnp.float32):
            return fallback(x_td, weights, out_dtype)
        if x_td.shape[0] > MAX_ROWS and not _packs(x_td):
            return fallback(x_td, weights, out_dtype)
        return products(x_td, weights, out_dtype)

    return choose


def _packs(x_td: jax.Array) -> bool:
    """The kernel for many rows takes this, and is faster than XLA's."""
    is_fast = x_td.dtype == jnp.bfloat16 and build.load().detail == "avx512_bf16"
    return is_fast and x_td.shape[1] % 2 == 0


def products(
    x_td: Float[Array, "T in"], weights: tuple[jax.Array, ...], out_dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """x @ w.T for each weight [out, in], accumulated in float32; float32 or bfloat16."""
    shapes = [jax.ShapeDtypeStruct((x_td.shape[0], w.shape[0]), out_dtype) for w in weights]
    return tuple(jax.ffi.ffi_call("jaxserve_linear", shapes)(x_td, *weights))


def attention(
    q_tqh: Float[Array, "T Q H"],
    pool_rkph: Shaped[Array, "rows K P H"],
    rows: RaggedRows,
    spec: AttentionSpec,
) -> Float[Array, "T Q H"]:
    """Causal attention of every row's queries to its pages; padding tokens get zeros.

    Reads the pool in place. float32 queries want a float32 pool; bfloat16 ones a bfloat16 pool or
    its raw uint16 bits.
    """
    call = jax.ffi.ffi_call("jaxserve_attention", jax.ShapeDtypeStruct(q_tqh.shape, q_tqh.dtype))
    return call(
        q_tqh,
        pool_rkph,
        rows.page_table,
        rows.q_start,
        rows.q_len,
        rows.kv_len,
        rows.num_decodes.astype(jnp.int32),
        num_layers=np.int64(spec.num_layers),
        layer=np.int64(spec.layer),
        window=np.int64(spec.window or 0),
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0.0),
    )
