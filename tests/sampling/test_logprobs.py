"""Log-probabilities against float64, and the shape of the program that computes them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling import token_logprobs


def log_softmax(logits_v: np.ndarray) -> np.ndarray:
    shifted = logits_v.astype(np.float64) - logits_v.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_logprobs_equal_float64_log_softmax_of_the_untouched_logits():
    rng = np.random.default_rng(0)
    logits_rv = rng.normal(0, 5, (6, 1501)).astype(np.float32)
    logits_rv[5] *= 40
    ids_r = rng.integers(0, 1501, 6).astype(np.int32)
    got = jax.jit(token_logprobs)(jnp.asarray(logits_rv), jnp.asarray(ids_r))
    for row, (logits_v, token) in enumerate(zip(logits_rv, ids_r, strict=True)):
        want = log_softmax(logits_v)
        order = np.argsort(-want, kind="stable")[:20]
        np.testing.assert_allclose(got.logprob_r[row], want[token], rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(got.top_ids_rn[row], order)
        np.testing.assert_allclose(got.top_logprobs_rn[row], want[order], rtol=1e-6, atol=1e-5)


def test_ties_come_lowest_id_first():
    got = token_logprobs(jnp.zeros((1, 50), jnp.float32), jnp.zeros(1, jnp.int32), num_top=5)
    assert got.top_ids_rn.tolist() == [[0, 1, 2, 3, 4]]


def test_the_likeliest_may_crowd_in_one_block_or_be_impossible():
    crowded_v = np.full(500, -np.inf, np.float32)
    crowded_v[130:145] = np.arange(15) // 3
    crowded_v[[499, 3]] = 7.0, np.nan
    got = token_logprobs(jnp.asarray(crowded_v)[None, :], jnp.zeros(1, jnp.int32))
    want = [499, 142, 143, 144, 139, 140, 141, 136, 137, 138, 133, 134, 135, 130, 131, 132]
    assert got.top_ids_rn[0].tolist() == [*want, 0, 1, 2, 3]


def test_it_partitions_over_devices():
    """The vocabulary of a tensor-parallel model lies across devices."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    logits_rv = np.random.default_rng(1).normal(0, 3, (8, 2048)).astype(np.float32)
    by_vocab = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    ids_r = jnp.arange(8, dtype=jnp.int32)
    want = token_logprobs(jnp.asarray(logits_rv), ids_r)
    got = jax.jit(token_logprobs)(jax.device_put(logits_rv, by_vocab), ids_r)
    np.testing.assert_array_equal(got.top_ids_rn, want.top_ids_rn)
    np.testing.assert_allclose(got.logprob_r, want.logprob_r, rtol=1e-5)
    np.testing.assert_allclose(got.top_logprobs_rn, want.top_logprobs_rn, rtol=1e-5)


def test_small_vocabularies_and_ids_out_of_range():
    logits_rv = jnp.asarray([[0.0, 1.0, -jnp.inf]] * 2, jnp.float32)
    got = token_logprobs(logits_rv, jnp.asarray([-1, 2], jnp.int32))
    want = log_softmax(np.asarray(logits_rv[0]))
    assert got.top_ids_rn.tolist() == [[1, 0, 2]] * 2
    np.testing.assert_allclose(got.logprob_r, want[[0, 2]], rtol=1e-6)


def test_no_sort_of_the_vocabulary_is_compiled():
    """Where callers slice the result, XLA:CPU takes a top_k for a full sort, 120 times slower."""

    def sliced(logits_rv: jax.Array) -> jax.Array:
        got = token_logprobs(logits_rv, jnp.zeros(len(logits_rv), jnp.int32))
        return got.top_logprobs_rn[:, :5] + got.logprob_r[:, None]

    program = jax.jit(sliced).lower(jnp.zeros((4, 4096), jnp.float32)).compile().as_text()
    assert program is not None and " sort(" not in program
