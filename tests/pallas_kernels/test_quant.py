"""Eight-bit keys and values: errors stay within half a step, and nothing overflows."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention.quant import LARGEST, dequantise, quantise


@pytest.mark.parametrize("storage", LARGEST)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30])
def test_values_come_back_within_half_a_step(storage: str, size: float):
    x = np.random.default_rng(0).standard_normal((50, 3, 32)).astype(np.float32)
    x *= np.float32(size)
    x[0] = 0.0
    stored, scale = quantise(jnp.asarray(x), jnp.dtype(storage))
    assert stored.dtype == storage and scale.shape == (50, 3)
    back = np.asarray(dequantise(stored, scale, jnp.dtype(jnp.float32)), np.float64)
    step = np.asarray(scale, np.float64)[..., None]
    half_step = step / 2 if storage == "int8" else np.maximum(np.abs(x) / 16.0, step * 2.0**-10)
    if size < 1e-40:  # scales are subnormal there, or zero: all is lost but finiteness
        assert np.isfinite(back).all()
        return
    assert (np.abs(back - x) <= half_step * (1 + 1e-5)).all()
    assert (back[0] == 0).all()


@pytest.mark.parametrize("storage", LARGEST)
def test_the_largest_value_is_exact(storage: str):
    x = jnp.asarray([[[1.0, -LARGEST[storage], 3.0]]])
    stored, scale = quantise(x, jnp.dtype(storage))
    np.testing.assert_array_equal(scale, 1.0)
    np.testing.assert_array_equal(dequantise(stored, scale, x.dtype), x)


def test_an_unknown_storage_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="int16; expected one of .*int8"):
        quantise(jnp.zeros((1, 1, 4)), jnp.dtype(jnp.int16))
