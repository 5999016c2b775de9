"""Keys and values in 8 bits: one float32 scale for each token and head, value = stored * scale.

The scale is the largest magnitude over the largest number that the storage holds, so nothing
overflows; a vector of zeros has scale 0. float8_e4m3fn may be kept as raw uint8 (see `specs`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "uint8": 448.0}
"""Largest number of each storage dtype; uint8 holds the bits of float8_e4m3fn."""


class Quantised(NamedTuple):
    """Vectors in 8 bits."""

    stored_tkh: jax.Array
    scale_tk: jax.Array  # float32


def quantise(x_tkh: Float[Array, "T K H"], storage: jnp.dtype) -> Quantised:
    """Round each vector to `storage`, to nearest; its scale is chosen by its largest magnitude.

    Raises:
        ValueError: values cannot be quantised to `storage`.
    """
    storage = jnp.dtype(storage)
    if storage.name not in LARGEST:
        raise ValueError(f"cannot quantise to {storage.name}; expected one of {list(LARGEST)}")
    largest = jnp.float32(LARGEST[storage.name])
    x_tkh = x_tkh.astype(jnp.float32)
    scale_tk = jnp.abs(x_tkh).max(axis=-1) / largest
    divisor_tk = jnp.where(scale_tk > 0, scale_tk, jnp.float32(1))
    # A subnormal scale is rounded so coarsely that the quotient can pass `largest`.
    stored_tkh = jnp.clip(x_tkh / divisor_tk[..., None], -largest, largest)
    if storage == jnp.int8:
        return Quantised(jnp.round(stored_tkh).astype(storage), scale_tk)
    bits_tkh = stored_tkh.astype(jnp.float8_e4m3fn)
    if storage == jnp.uint8:
        return Quantised(lax.bitcast_convert_type(bits_tkh, storage), scale_tk)
    return Quantised(bits_tkh, scale_tk)


def dequantise(
    stored_tkh: Shaped[Array, "... H"], scale_tk: Float[Array, "..."], compute: jnp.dtype
) -> Float[Array, "... H"]:
    """The values, multiplied in float32 and then rounded to `compute`."""
    if stored_tkh.dtype == jnp.uint8:
        stored_tkh = lax.bitcast_convert_type(stored_tkh, jnp.float8_e4m3fn)
    return (stored_tkh.astype(jnp.float32) * scale_tk[..., None]).astype(compute)
