"""The XLA reference against float64, over ragged batches and every feature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec
from tests.pallas_kernels.cases import Case

BATCHES = {
    "one decode": dict(decode_lens=(37,), prefills=()),
    "ragged decodes": dict(decode_lens=(1, 300, 16, 17, 129, 64, 2, 5, 200, 31), prefills=()),
    "one prefill": dict(decode_lens=(), prefills=((150, 150),)),
    "chunk after a cached prefix": dict(decode_lens=(), prefills=((70, 290),)),
    "mixed": dict(decode_lens=(33, 140), prefills=((1, 50), (90, 90), (17, 200))),
    "mixed and padded": dict(
        decode_lens=(5, 260, 7), prefills=((66, 131), (3, 3)), pad_rows=3, pad_tokens=11
    ),
}
FEATURES = {
    "plain": dict(),
    "window": dict(window=19),
    "soft cap": dict(soft_cap=5.0),
    "window of one chunk and soft cap": dict(window=128, soft_cap=20.0),
}


def small_case(batch: str, feature: str) -> Case:
    """Heads of a size that no kernel is made for."""
    shape = {"heads": (6, 2), "head_dim": 20, "layers": (3, 1), "scale": 0.3}
    return Case(**shape, **BATCHES[batch], **FEATURES[feature])


def run(case: Case, pool=None) -> np.ndarray:
    compiled = jax.jit(reference.ragged_paged_attention, static_argnums=3)
    pool = case.pages.rows_rkph if pool is None else pool
    q, pool, rows = jax.tree.map(jnp.asarray, (case.q_tqh, pool, case.rows))
    out = np.asarray(compiled(q, pool, rows, case.spec), np.float32)
    assert np.isfinite(out).all()
    return out[: case.num_tokens]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("batch", BATCHES)
def test_matches_float64(batch: str, feature: str):
    case = small_case(batch, feature)
    np.testing.assert_allclose(run(case), case.expected.out_tqh, atol=2e-6)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1)])
def test_any_page_size_and_grouping(page_size: int, heads: tuple[int, int]):
    lengths = {"decode_lens": (3, 201), "prefills": ((40, 60),)}
    case = Case(page_size, heads=heads, head_dim=8, page_size=page_size, scale=0.25, **lengths)
    np.testing.assert_allclose(run(case), case.expected.out_tqh, atol=2e-6)


def test_sixteen_bit_pool_is_read_from_its_raw_bits():
    lengths = {"decode_lens": (40,), "prefills": ((30, 70),)}
    case = Case(heads=(4, 2), head_dim=16, layers=(2, 1), dtype="bfloat16", scale=0.3, **lengths)
    out = run(case, np.asarray(case.pages.rows_rkph).view(np.uint16))
    # bfloat16 keeps 8 bits: 2^-8 of values up to about 3, a few roundings deep.
    np.testing.assert_allclose(out, case.expected.out_tqh, atol=0.04)


def test_write_kv_touches_only_the_given_places():
    spec = AttentionSpec(scale=1.0, num_layers=2, layer=1)
    pool = jnp.zeros((5 * 2 * 2, 3, 4, 8), jnp.float32)
    rng = np.random.default_rng(2)
    k, v = (jnp.asarray(rng.standard_normal((3, 3, 8)), jnp.float32) for _ in range(2))
    page, offset = jnp.array([4, -1, 0]), jnp.array([3, 0, 1])
    written = np.asarray(reference.write_kv(pool, k, v, page, offset, spec))
    expected = np.zeros(pool.shape, np.float32)
    for token, (p, o) in enumerate([(4, 3), (-1, 0), (0, 1)]):
        if p >= 0:
            expected[(p * 2 + 1) * 2, :, o] = k[token]
            expected[(p * 2 + 1) * 2 + 1, :, o] = v[token]
    np.testing.assert_array_equal(written, expected)
