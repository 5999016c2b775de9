"""Merging parts by their log-sum-exp gives attention over the whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention.merge import merge, merge_stacked
from jaxserve.pallas_kernels.paged_attention.specs import Attended


def attend(score_tqc, v_tqch) -> Attended:
    """Dense attention over the keys of one part."""
    max_tq1 = score_tqc.max(axis=-1, keepdims=True)
    weight_tqc = jnp.exp(score_tqc - max_tq1)
    sum_tq = weight_tqc.sum(axis=-1)
    out_tqh = jnp.einsum("tqc,tqch->tqh", weight_tqc, v_tqch) / sum_tq[..., None]
    return Attended(out_tqh, max_tq1[..., 0] + jnp.log(sum_tq))


def test_parts_merge_to_the_whole():
    rng = np.random.default_rng(0)
    score = jnp.asarray(rng.normal(0, 30, (4, 3, 20)), jnp.float32)
    v = jnp.asarray(rng.standard_normal((4, 3, 20, 8)), jnp.float32)
    cuts = [slice(0, 1), slice(1, 12), slice(12, 20)]
    merged = merge([attend(score[..., cut], v[..., cut, :]) for cut in cuts])
    whole = attend(score, v)
    np.testing.assert_allclose(merged.out_tqh, whole.out_tqh, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(merged.lse_tq), np.asarray(whole.lse_tq), rtol=1e-6, atol=1e-5
    )


def test_a_part_that_saw_nothing_counts_for_nothing_even_if_it_is_nan():
    out = jnp.asarray([[[[1.0, 2.0]]], [[[np.nan, np.inf]]]])
    merged = merge_stacked(out, jnp.asarray([[[5.0]], [[-np.inf]]]), jnp.dtype(jnp.bfloat16))
    assert merged.out_tqh.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.out_tqh.astype(jnp.float32), [[[1.0, 2.0]]])
    np.testing.assert_array_equal(merged.lse_tq, [[5.0]])


def test_nothing_seen_at_all_is_zeros_and_minus_infinity():
    nothing = Attended(jnp.full((1, 1, 2), jnp.nan), jnp.full((1, 1), -jnp.inf))
    merged = merge([nothing, nothing])
    np.testing.assert_array_equal(merged.out_tqh, 0.0)
    np.testing.assert_array_equal(merged.lse_tq, -np.inf)


def test_parts_without_their_lse_are_refused():
    part = Attended(jnp.zeros((1, 1, 2)), None)
    with pytest.raises(ValueError, match="0 of 1 parts.*needs_lse"):
        merge([part])
    with pytest.raises(ValueError, match="at least one part"):
        merge([])
