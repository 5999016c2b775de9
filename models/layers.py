"""The pieces of a decoder layer as pure functions: products, norms, activations, rotation.

Knows nothing of configs beyond the small specs it is handed, nothing of caches or meshes.
Norms, rotation and activations compute in float32 and return the dtype they were given.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.models.config import NormSpec, QueryScaleSpec, RopeSpec


def linear(
    x_td: Float[Array, "T in"], w_od: Float[Array, "out in"], bias_o: Array | None = None
) -> Float[Array, "T out"]:
    """x @ w.T + bias; the only place that multiplies by a weight matrix."""
    y_to = lax.dot_general(x_td, w_od, (((1,), (1,)), ((), ())))
    return y_to if bias_o is None else y_to + bias_o[None, :]


def logits(x_td: Float[Array, "T D"], head_vd: Float[Array, "V D"]) -> Float[Array, "T V"]:
    """x @ head.T with a float32 result."""
    return lax.dot_general(
        x_td, head_vd, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


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


def soft_cap(x: Array, cap: float) -> Array:
    return jnp.tanh(x * jnp.asarray(1 / cap, x.dtype)) * jnp.asarray(cap, x.dtype)


def rotation(spec: RopeSpec, positions_t: Int[Array, " T"]) -> Float[Array, "T 2 R"]:
    """Cosine and sine of each position, float32; R is half of the rotated width."""
    frequencies_r = jnp.asarray(spec.frequencies, jnp.float32)
    angles_tr = positions_t.astype(jnp.float32)[:, None] * frequencies_r[None, :]
    table_t2r = jnp.stack([jnp.cos(angles_tr), jnp.sin(angles_tr)], axis=1)
    return table_t2r if spec.amplitude == 1.0 else table_t2r * jnp.float32(spec.amplitude)


def rotate(
    x_tqh: Float[Array, "T Q H"], table_t2r: Float[Array, "T 2 R"], spec: RopeSpec
) -> Float[Array, "T Q H"]:
    """Rotate the pairs of each head by their angle; what lies beyond the pairs stays."""
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
