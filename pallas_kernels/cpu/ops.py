"""The native CPU kernels as JAX functions. Callers ask `build.load` first whether they exist.

Every output element is summed in one fixed order: results depend neither on the number of threads
nor on which other rows share the call. Not differentiable, and not partitioned over a mesh.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.cpu import build
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows

MAX_ROWS = 64
"""Up to here the native products are at least as fast as XLA's on every machine."""

PANEL_OUTPUTS = 64
"""As many outputs of a matrix are packed together for more than MAX_ROWS rows."""

Products = Callable[[jax.Array, tuple[jax.Array, ...], jnp.dtype], tuple[jax.Array, ...]]
Gated = Callable[[jax.Array, jax.Array, jax.Array, str, Products], jax.Array]


@functools.cache
def products_or(fallback: Products) -> Products:
    """Native products where they are better, else `fallback`; the same object each time."""

    def choose(
        x_td: jax.Array, weights: tuple[jax.Array, ...], out_dtype: jnp.dtype
    ) -> tuple[jax.Array, ...]:
        fits = _is_better(x_td, weights) and out_dtype in (x_td.dtype, jnp.float32)
        return (products if fits else fallback)(x_td, weights, out_dtype)

    return choose


@functools.cache
def gated_or(fallback: Gated) -> Gated:
    """The native hidden layer of a gated MLP where it is better, else `fallback`."""

    def choose(
        x_td: jax.Array,
        up_fd: jax.Array,
        gate_fd: jax.Array,
        activation: str,
        products: Products,
    ) -> jax.Array:
        if activation in ("silu", "gelu_tanh") and _is_better(x_td, (up_fd, gate_fd)):
            return gated(x_td, up_fd, gate_fd, is_gelu=activation == "gelu_tanh")
        return fallback(x_td, up_fd, gate_fd, activation, products)

    return choose


@functools.cache
def rotate_or(fallback: Callable[..., Any]) -> Callable[..., Any]:
    """The native rotation of many tokens, else `fallback`."""

    def choose(
        xs_tqh: tuple[jax.Array, ...], table_t2r: jax.Array, spec: Any
    ) -> tuple[jax.Array, ...]:
        known = all(x.dtype in (jnp.float32, jnp.bfloat16) for x in xs_tqh)
        if spec.interleaved or not known or table_t2r.shape[0] <= MAX_ROWS:
            return fallback(xs_tqh, table_t2r, spec)
        return rotate(xs_tqh, table_t2r)

    return choose


def _is_better(x_td: jax.Array, weights: tuple[jax.Array, ...]) -> bool:
    """The native products take this, and are at least as fast as XLA's."""
    if x_td.dtype not in (jnp.float32, jnp.bfloat16) or any(w.dtype != x_td.dtype for w in weights):
        return False
    if x_td.shape[0] <= MAX_ROWS:
        return True
    if any(w.shape[0] < PANEL_OUTPUTS for w in weights):
        return False  # a panel costs as much as a whole one
    instructions = build.load().detail
    if x_td.dtype == jnp.float32:
        return instructions.split()[0] == "avx512"
    return instructions in ("avx512", "avx512_bf16") and x_td.shape[1] % 2 == 0


def products(
    x_td: Float[Array, "T in"], weights: tuple[jax.Array, ...], out_dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """x @ w.T for each weight [out, in], accumulated in float32; float32 or bfloat16."""
    shapes = [jax.ShapeDtypeStruct((x_td.shape[0], w.shape[0]), out_dtype) for w in weights]
    return tuple(jax.ffi.ffi_call("jaxserve_linear", shapes)(x_td, *weights))


def gated(
    x_td: Float[Array, "T D"],
    up_fd: Float[Array, "F D"],
    gate_fd: Float[Array, "F D"],
    *,
    is_gelu: bool,
) -> Float[Array, "T F"]:
    """activate(x @ gate.T) * (x @ up.T), with silu or the tanh form of gelu.

    Products and activation are rounded to the dtype of `x_td`, as in separate steps.
    """
    shape = jax.ShapeDtypeStruct((x_td.shape[0], up_fd.shape[0]), x_td.dtype)
    return jax.ffi.ffi_call("jaxserve_gated", shape)(x_td, up_fd, gate_fd, is_gelu=is_gelu)


def grouped(
    x_mi: Float[Array, "M I"],
    w_eoi: Float[Array, "E O I"],
    sizes_e: Int[Array, " E"],
    out_dtype: jnp.dtype,
) -> Float[Array, "M O"]:
    """Each run of rows times its matrix, transposed; zeros in the rows after the last run."""
    shape = jax.ShapeDtypeStruct((x_mi.shape[0], w_eoi.shape[1]), out_dtype)
    return jax.ffi.ffi_call("jaxserve_grouped", shape)(x_mi, w_eoi, sizes_e)


def rotate(
    xs_tqh: tuple[jax.Array, ...], table_t2r: Float[Array, "T 2 R"]
) -> tuple[jax.Array, ...]:
    """Turn the pairs (i, R + i) of each head by the angle of its token; each x is [T, heads, H]."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs_tqh]
    return tuple(jax.ffi.ffi_call("jaxserve_rotate", shapes)(table_t2r, *xs_tqh))


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
