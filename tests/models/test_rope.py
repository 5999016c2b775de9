"""Frequencies of each scaling kind against the published formulas, at positions that matter."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import WeightsError
from jaxserve.models import layers
from jaxserve.models.config import RopeSpec
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope

DIM = 64


def rope_of(**values) -> RopeSpec:
    context_len = values.pop("context_len", None)
    values.setdefault("max_position_embeddings", 8192)
    return read_rope(Fields(values, "config.json"), DIM, context_len=context_len)


PLAIN = 10000.0 ** -(np.arange(0, DIM, 2) / DIM)


def test_default_frequencies_are_powers_of_the_base():
    np.testing.assert_allclose(rope_of().frequencies, PLAIN, rtol=3e-7)
    assert rope_of().amplitude == 1.0


def test_both_spellings_mean_the_same():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    old = rope_of(rope_theta=5e5, rope_scaling=scaling)
    new = rope_of(rope_parameters={**scaling, "rope_theta": 5e5})
    assert old == new != rope_of(rope_theta=5e5)


def test_linear_divides_all_frequencies():
    rope = rope_of(rope_scaling={"rope_type": "linear", "factor": 4.0})
    np.testing.assert_allclose(rope.frequencies, PLAIN / 4, rtol=3e-7)


def test_llama3_keeps_fast_and_divides_slow_frequencies():
    rope = rope_of(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    )
    turns = 1024 * PLAIN / (2 * math.pi)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    np.testing.assert_allclose(rope.frequencies, PLAIN * (smooth + (1 - smooth) / 8), rtol=2e-6)
    assert (smooth == 0).any() and (smooth == 1).any() and ((smooth > 0) & (smooth < 1)).any()


def test_yarn_ramps_between_two_rotation_counts_and_grows_the_amplitude():
    rope = rope_of(
        rope_scaling={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 1024,
        }
    )

    def pair_with(rotations):
        return DIM * math.log(1024 / (rotations * 2 * math.pi)) / (2 * math.log(10000))

    low, high = math.floor(pair_with(32)), math.ceil(pair_with(1))
    ramp = np.clip((np.arange(DIM // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(rope.frequencies, PLAIN * (1 - ramp + ramp / 16), rtol=2e-6)
    assert rope.amplitude == pytest.approx(0.1 * math.log(16) + 1)


def test_longrope_is_decided_once_by_the_context():
    short, long = [1.0] * (DIM // 2), [2.0] * (DIM // 2)
    values = dict(
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": short, "long_factor": long},
    )
    amplitude = math.sqrt(1 + math.log(2) / math.log(4096))
    for context_len, factor in ((None, 2.0), (4097, 2.0), (4096, 1.0)):
        rope = rope_of(**values, context_len=context_len)
        np.testing.assert_allclose(rope.frequencies, PLAIN / factor, rtol=3e-7)
        assert rope.amplitude == pytest.approx(amplitude)


def test_dynamic_is_plain_within_the_trained_context():
    assert rope_of(rope_scaling={"type": "dynamic", "factor": 6.0}) == rope_of()


@pytest.mark.parametrize(
    "scaling, field",
    [
        ({"rope_type": "spiral"}, "rope_type"),
        ({"type": "spiral"}, "type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor"),
        ({"rope_type": "default", "twist": 3}, "twist"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "long_factor"),
    ],
)
def test_unknown_or_broken_rope_names_the_field(scaling, field):
    with pytest.raises(WeightsError, match=f"config.json.*'{field}'"):
        rope_of(rope_scaling=scaling, original_max_position_embeddings=4096)


def test_rotation_at_position_100000_is_exact_to_float32_angles():
    rope = rope_of(rope_theta=5e5)
    table_t2r = np.asarray(layers.rotation(rope, jnp.asarray([0, 1, 100_000], jnp.int32)))
    angles_r = np.float32(100_000) * np.asarray(rope.frequencies, np.float32)
    np.testing.assert_allclose(table_t2r[2, 0], np.cos(angles_r.astype(np.float64)), atol=2e-6)
    np.testing.assert_allclose(table_t2r[2, 1], np.sin(angles_r.astype(np.float64)), atol=2e-6)
    np.testing.assert_array_equal(table_t2r[0], [np.ones(DIM // 2), np.zeros(DIM // 2)])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_length_and_leaves_the_rest_of_the_head_alone(interleaved):
    rope = RopeSpec(tuple(PLAIN[:5].tolist()), 1.0, interleaved)
    x_tqh = np.random.default_rng(0).normal(size=(3, 2, 16)).astype(np.float32)
    table = layers.rotation(rope, jnp.asarray([0, 7, 31], jnp.int32))
    y_tqh = np.asarray(layers.rotate((jnp.asarray(x_tqh),), table, rope)[0])
    np.testing.assert_array_equal(y_tqh[..., 10:], x_tqh[..., 10:])
    np.testing.assert_array_equal(y_tqh[0], x_tqh[0])
    np.testing.assert_allclose(
        np.linalg.norm(y_tqh, axis=-1), np.linalg.norm(x_tqh, axis=-1), rtol=1e-5
    )
    pair = (0, 1) if interleaved else (0, 5)
    a, b = x_tqh[1, 0, pair[0]], x_tqh[1, 0, pair[1]]
    np.testing.assert_allclose(y_tqh[1, 0, pair[0]], a * math.cos(7) - b * math.sin(7), rtol=1e-4)
