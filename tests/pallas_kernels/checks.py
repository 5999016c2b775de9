"""What every attention backend must pass, for any case. `functions` may be a module.

    check_attention(functions, case)              outputs and lse against float64
    check_write_kv(functions, ...)                new tokens go to their places and nowhere else
    check_gather_scatter(functions, ...)          whole pages come back; ids out of range do nothing

A backend that cannot do a case raises NotImplementedError out of these.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged_attention.api import Backend
from jaxserve.pallas_kernels.paged_attention.specs import Attended, AttentionSpec, KVPages
from tests.pallas_kernels.cases import DTYPES, Case


class Tolerance(NamedTuple):
    """Largest error, absolute for what is below 1 and relative above."""

    out: float
    lse: float


TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5),  # sums of some hundred terms, half an ulp each
    "float16": Tolerance(4e-3, 2e-3),  # weights and outputs of up to 4 are rounded to 11 bits
    "bfloat16": Tolerance(3e-2, 1e-2),  # ... to 8 bits
}
"""By the dtype of the queries, in which the weights, too, are multiplied with the values."""

DEQUANTISED_FACTOR = 1.5
"""Keys and values of quantised pages may be rounded to the queries' dtype once more."""


def check_attention(functions: Backend, case: Case, *, needs_lse: bool = True) -> Attended:
    """Outputs and log-sum-exp of the real tokens are right, and no output is NaN or infinite."""
    attend = partial(functions.ragged_paged_attention, spec=replace(case.spec, needs_lse=needs_lse))
    if case.sinks_q is not None:
        attend = partial(attend, sinks_q=jnp.asarray(case.sinks_q))
    found = jax.jit(attend)(*jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows)))
    tolerance = TOLERANCES[case.dtype]
    factor = 1.0 if case.quantised is None else DEQUANTISED_FACTOR
    assert isinstance(found, Attended)
    assert found.out_tqh.shape == (*case.q_tqh.shape[:2], case.latent_dim or case.head_dim)
    assert found.out_tqh.dtype == case.q_tqh.dtype
    out_tqh = np.asarray(found.out_tqh, np.float64)
    assert np.isfinite(out_tqh).all(), "NaN or infinity in the outputs (padding included)"
    most = tolerance.out * factor
    np.testing.assert_allclose(
        out_tqh[: case.num_tokens], case.expected.out_tqh, most, most, err_msg="outputs"
    )
    if found.lse_tq is None:
        assert not needs_lse, "the spec asks for the log-sum-exp"
        return found
    assert found.lse_tq.shape == case.q_tqh.shape[:2] and found.lse_tq.dtype == jnp.float32
    lse_tq = np.asarray(found.lse_tq, np.float64)[: case.num_tokens]
    most = tolerance.lse * factor
    np.testing.assert_allclose(lse_tq, case.expected.lse_tq, most, most, err_msg="log-sum-exp")
    return found


def check_write_kv(
    functions: Backend,
    *,
    dtype: str = "float32",
    quantised: str | None = None,
    num_tokens: int = 7,
    num_kv: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    layers: tuple[int, int] = (3, 1),
    latent_dim: int | None = None,
    seed: int = 0,
) -> None:
    """New tokens are found again at their places; every other byte of the pool is as before."""
    rng, num_pages = np.random.default_rng(seed), 5
    spec = AttentionSpec(1.0, *layers, latent_dim=latent_dim)
    shape = (num_pages * layers[0] * spec.parts, num_kv, page_size, head_dim)
    kind = DTYPES[quantised or dtype]
    pool = (50 * rng.standard_normal(shape)).astype(kind)
    scales = None if quantised is None else rng.random(shape[:3], np.float32)
    place = rng.permutation(num_pages * page_size)[:num_tokens]
    page_t = np.where(rng.random(num_tokens) < 0.25, -1, place // page_size).astype(np.int32)
    page_t[:1] = place[:1] // page_size  # at least one is written
    offset_t = (place % page_size).astype(np.int32)
    k_tkh, v_tkh = (
        (rng.standard_normal((num_tokens, num_kv, head_dim)) * rng.lognormal(0, 1.5)).astype(
            DTYPES[dtype]
        )
        for _ in range(2)
    )
    written = (k_tkh, v_tkh)[: spec.parts]
    if num_tokens > 1:
        k_tkh[1], page_t[1] = 0.0, place[1] // page_size  # a token of zeros has no scale
    write = jax.jit(partial(functions.write_kv, spec=spec), donate_argnums=0)
    old = KVPages(jnp.asarray(pool), None if scales is None else jnp.asarray(scales))
    new_values = None if latent_dim else jnp.asarray(v_tkh)
    new = write(old, jnp.asarray(k_tkh), new_values, jnp.asarray(page_t), jnp.asarray(offset_t))
    new_pool = np.asarray(new.rows_rkph)
    new_scales = None if new.scales_rkp is None else np.asarray(new.scales_rkp)
    assert new_pool.dtype == pool.dtype and (new_scales is None) == (scales is None)
    untouched = np.ones(shape[:3], bool)
    for token, (page, offset) in enumerate(zip(page_t, offset_t, strict=True)):
        if page < 0:
            continue
        for part, x_tkh in enumerate(written):
            at = ((page * layers[0] + layers[1]) * spec.parts + part, slice(None), offset)
            untouched[at] = False
            value = x_tkh[token].astype(np.float64)
            if new_scales is None:
                np.testing.assert_array_equal(
                    new_pool[at].view(np.uint8), x_tkh[token].view(np.uint8)
                )
                continue
            scale = new_scales[at].astype(np.float64)[:, None]
            stored = new_pool[at].astype(np.float64)
            half_step = scale / 2
            if quantised == "float8_e4m3fn":  # 3 bits of mantissa; 2^-9 between subnormals
                half_step = np.maximum(np.abs(value) / 16, scale * 2.0**-10)
            assert (np.abs(stored * scale - value) <= half_step * (1 + 1e-3)).all()
            largest = np.abs(value).max(axis=-1, keepdims=True)
            limit = 127.0 if quantised == "int8" else 448.0
            np.testing.assert_allclose(scale, largest / limit, rtol=1e-6)
    np.testing.assert_array_equal(
        new_pool[untouched].view(np.uint8), pool[untouched].view(np.uint8)
    )
    if new_scales is not None and scales is not None:
        np.testing.assert_array_equal(
            new_scales[untouched].view(np.uint32), scales[untouched].view(np.uint32)
        )


def check_gather_scatter(
    functions: Backend, dtype: str = "bfloat16", page_shape: tuple[int, ...] = (3, 2, 2, 16, 64)
) -> None:
    """Pages come out as they are, go in where they should, and ids out of range do nothing."""
    rng, num_pages = np.random.default_rng(0), 11
    kind = DTYPES[dtype]

    pool, rows = ((50 * rng.standard_normal((n, *page_shape))).astype(kind) for n in (num_pages, 6))
    ids = np.array([7, 0, num_pages, 10, -1, 3], np.int32)
    is_valid = (ids >= 0) & (ids < num_pages)
    got = np.asarray(jax.jit(functions.gather_pages)(jnp.asarray(pool), jnp.asarray(ids)))
    assert got.shape == rows.shape and got.dtype == kind
    np.testing.assert_array_equal(got[is_valid].view(np.uint8), pool[ids[is_valid]].view(np.uint8))
    scatter = jax.jit(functions.scatter_pages, donate_argnums=0)
    after = np.asarray(scatter(jnp.asarray(pool), jnp.asarray(ids), jnp.asarray(rows)))
    expected = pool.copy()
    expected[ids[is_valid]] = rows[is_valid]
    np.testing.assert_array_equal(after.view(np.uint8), expected.view(np.uint8))
