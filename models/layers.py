"""The pieces of a decoder layer as pure functions: products, norms, activations, rotation.

Knows nothing of configs beyond the small specs it is handed, nothing of caches or meshes.
Norms, rotation and activations compute in float32 and return the dtype they were given.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.models.config import NormSpec, QueryScaleSpec, RopeSpec


def products(x_td: Array, weights: tuple[Array, ...], out_dtype: jnp.dtype) -> tuple[Array, ...]:
    """x @ w.T for each weight [out, in], in the form that each platform does best."""
    if x_td.dtype != jnp.bfloat16:
        return tuple(_contract(x_td, w_od, out_dtype) for w_od in weights)
    default = partial(_contract, out_dtype=out_dtype)
    on_cpu = partial(_contract_bf16_cpu, out_dtype=out_dtype)
    return tuple(lax.platform_dependent(x_td, w, cpu=on_cpu, default=default) for w in weights)


Products = Callable[[Array, tuple[Array, ...], jnp.dtype], tuple[Array, ...]]


def _contract(a_id: Array, b_jd: Array, out_dtype: jnp.dtype) -> Array:
    return lax.dot_general(a_id, b_jd, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def _contract_bf16_cpu(x_td: Array, w_od: Array, out_dtype: jnp.dtype) -> Array:
    """The shapes that XLA:CPU's library takes: others cost 10 times as much (jax 0.10, 0.11).

    The result must be float32, there must be two rows, and a long contraction wants the weight on
    the left.
    """
    num_rows = x_td.shape[0]
    if num_rows == 1:
        x_td = lax.pad(x_td, jnp.zeros((), x_td.dtype), ((0, 1, 0), (0, 0, 0)))
    if w_od.shape[1] > w_od.shape[0]:
        y_to = _contract(w_od, x_td, jnp.dtype(jnp.float32)).T
    else:
        y_to = _contract(x_td, w_od, jnp.dtype(jnp.float32))
    return y_to[:num_rows].astype(out_dtype)


def linears(
    x_td: Float[Array, "T in"],
    weights: tuple[Array, ...],
    biases: tuple[Array | None, ...],
    *,
    products: Products = products,
) -> list[Array]:
    """x @ w.T + bias for several weights that read the same input."""
    ys = products(x_td, weights, x_td.dtype)
    return [y if b is None else y + b[None, :] for y, b in zip(ys, biases, strict=True)]


def logits(
    x_td: Float[Array, "T D"], head_vd: Float[Array, "V D"], *, products: Products = products
) -> Float[Array, "T V"]:
    """x @ head.T with a float32 result."""
    return products(x_td, (head_vd,), jnp.dtype(jnp.float32))[0]


def embed(table_vd: Float[Array, "V D"], tokens_t: Int[Array, " T"]) -> Float[Array, "T D"]:
    return jnp.take(table_vd, tokens_t, axis=0, mode="clip")


def norm(x: Array, weight: Array | None, spec: NormSpec, bias: Array | None = None) -> Array:
    """Normalise the last axis; `weight` and `bias` have the trailing axes of `x`."""
    y = x.astype(jnp.float32)
    if spec.centered:
        y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(spec.eps))
    if weight is not None:
        scale = weight.astype(jnp.float32)
        y *= _lead(scale + jnp.float32(spec.offset) if spec.offset else scale, y)
    if bias is not None:
        y += _lead(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


def _lead(weight: Array, x: Array) -> Array:
    """Leading axes of length 1, up to the rank of `x`."""
    return lax.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def activate(x: Array, name: str) -> Array:
    return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)


def gated(
    x_td: Float[Array, "T D"],
    up_fd: Float[Array, "F D"],
    gate_fd: Float[Array, "F D"],
    activation: str,
    products: Products,
) -> Float[Array, "T F"]:
    """The hidden layer of a gated MLP without biases."""
    up_tf, gate_tf = products(x_td, (up_fd, gate_fd), x_td.dtype)
    return activate(gate_tf, activation) * up_tf


def experts(
    x_md: Float[Array, "M D"],
    sizes_e: Int[Array, " E"],
    up_efd: Float[Array, "E F D"],
    gate_efd: Float[Array, "E F D"],
    down_edf: Float[Array, "E D F"],
    activation: str,
) -> Float[Array, "M D"]:
    """Gated MLPs, each over its own run of `sizes_e` rows, in order; zeros after the last run."""
    up_mf, gate_mf = (
        lax.ragged_dot(x_md, w_efd.swapaxes(1, 2), sizes_e) for w_efd in (up_efd, gate_efd)
    )
    h_mf = activate(gate_mf, activation) * up_mf
    return lax.ragged_dot(h_mf, down_edf.swapaxes(1, 2), sizes_e)


def soft_cap(x: Array, cap: float) -> Array:
    return jnp.tanh(x * jnp.asarray(1 / cap, x.dtype)) * jnp.asarray(cap, x.dtype)


def rotation(spec: RopeSpec, positions_t: Int[Array, " T"]) -> Float[Array, "T 2 R"]:
    """Cosine and sine of each position, float32; R is half of the rotated width."""
    frequencies_r = jnp.asarray(spec.frequencies, jnp.float32)
    angles_tr = positions_t.astype(jnp.float32)[:, None] * frequencies_r[None, :]
    table_t2r = jnp.stack([jnp.cos(angles_tr), jnp.sin(angles_tr)], axis=1)
    return table_t2r if spec.amplitude == 1.0 else table_t2r * jnp.float32(spec.amplitude)


def rotate(
    xs_tqh: tuple[Array, ...], table_t2r: Float[Array, "T 2 R"], spec: RopeSpec
) -> tuple[Array, ...]:
    """Rotate the pairs of each head by their angle; what lies beyond the pairs stays.

    Each of `xs_tqh` has the shape [T, heads, H].
    """
    return tuple(_rotate(x_tqh, table_t2r, spec) for x_tqh in xs_tqh)


def _rotate(x_tqh: Array, table_t2r: Array, spec: RopeSpec) -> Array:
    num_pairs = len(spec.frequencies)
    cos_t1r, sin_t1r = table_t2r[:, :1], table_t2r[:, 1:]
    x = x_tqh.astype(jnp.float32)
    rotated, rest = x[..., : 2 * num_pairs], x[..., 2 * num_pairs :]
    if spec.interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated[..., :num_pairs], rotated[..., num_pairs:]
    a, b = a * cos_t1r - b * sin_t1r, b * cos_t1r + a * sin_t1r
    if spec.interleaved:
        rotated = jnp.stack([a, b], axis=-1).reshape(rotated.shape)
        y = jnp.concatenate([rotated, rest], axis=-1)
    else:
        y = jnp.concatenate([a, b, rest], axis=-1)
    return y.astype(x_tqh.dtype)


def scale_queries(q_tqh: Array, positions_t: Array, spec: QueryScaleSpec) -> Array:
    """Grow queries with the logarithm of their position."""
    steps_t = (positions_t // jnp.asarray(spec.period, positions_t.dtype)).astype(jnp.float32)
    factor_t = 1.0 + jnp.float32(spec.beta) * jnp.log1p(steps_t)
    return (q_tqh.astype(jnp.float32) * factor_t[:, None, None]).astype(q_tqh.dtype)


class Kernels(NamedTuple):
    """The pieces that a platform may know to do better than plain XLA, each like the function here.

    Nothing else multiplies by weight matrices, but for those of latent attention.
    """

    products: Products = products
    gated: Callable[[Array, Array, Array, str, Products], Array] = gated
    rotate: Callable[[tuple[Array, ...], Array, RopeSpec], tuple[Array, ...]] = rotate
    experts: Callable[[Array, Array, Array, Array, Array, str], Array] = experts


XLA = Kernels()
