"""The XLA reference against float64, over ragged batches and every feature."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.merge import merge
from tests.pallas_kernels.cases import DTYPES, Case
from tests.pallas_kernels.checks import check_attention, check_gather_scatter, check_write_kv

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
    "sinks": dict(has_sinks=True),
    "int8 pages and a window": dict(quantised="int8", window=19),
    "float8 pages and sinks": dict(quantised="float8_e4m3fn", has_sinks=True),
}


def small_case(batch: str, feature: str, dtype: str = "float32") -> Case:
    """Heads of a size that no kernel is made for."""
    shape = {"heads": (6, 2), "head_dim": 20, "layers": (3, 1), "scale": 0.3, "dtype": dtype}
    return Case(**shape, **BATCHES[batch], **FEATURES[feature])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("batch", BATCHES)
def test_matches_float64(batch: str, feature: str):
    check_attention(reference, small_case(batch, feature))


@pytest.mark.parametrize("page_size", [1, 4, 16, 48, 256])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1)])
def test_any_page_size_and_grouping(page_size: int, heads: tuple[int, int]):
    lengths = {"decode_lens": (3, 201), "prefills": ((40, 60),)}
    case = Case(page_size, heads=heads, head_dim=8, page_size=page_size, scale=0.25, **lengths)
    check_attention(reference, case)


@pytest.mark.parametrize("quantised", [None, "float8_e4m3fn"])
def test_raw_bits_are_read_like_the_numbers_that_they_stand_for(quantised: str | None):
    case = Case(
        heads=(4, 2),
        head_dim=16,
        layers=(2, 1),
        dtype="bfloat16",
        quantised=quantised,
        decode_lens=(40,),
        prefills=((30, 70),),
    )
    found = check_attention(reference, case)
    raw = replace(case, is_raw=True)
    assert raw.pages.rows_rkph.dtype == (np.uint16 if quantised is None else np.uint8)
    same = check_attention(reference, raw)
    np.testing.assert_array_equal(np.asarray(found.out_tqh), np.asarray(same.out_tqh))


def test_without_need_of_it_no_log_sum_exp_is_computed():
    case = small_case("mixed", "plain")
    arrays = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    attend = jax.jit(reference.ragged_paged_attention, static_argnums=3)
    with_lse = attend(*arrays, case.spec)
    without = attend(*arrays, replace(case.spec, needs_lse=False))
    assert without.lse_tq is None
    np.testing.assert_array_equal(without.out_tqh, with_lse.out_tqh)


def test_parts_of_the_keys_merge_to_the_whole_with_the_sink_in_one_of_them():
    whole = Case(page_size=16, head_dim=16, has_sinks=True, decode_lens=(200, 77, 48))
    found = check_attention(reference, whole)
    q, pages, rows, sinks = jax.tree.map(
        jnp.asarray, (whole.q_tqh, whole.pages, whole.rows, whole.sinks_q)
    )
    head = 2  # pages of the first part
    first = replace(rows, kv_len=jnp.full_like(rows.kv_len, head * 16))
    rest = replace(
        rows, kv_len=rows.kv_len - head * 16, page_table=jnp.roll(rows.page_table, -head, axis=1)
    )
    attend = jax.jit(reference.ragged_paged_attention, static_argnums=3)
    parts = [attend(q, pages, first, whole.spec), attend(q, pages, rest, whole.spec, sinks_q=sinks)]
    merged = merge(parts)
    np.testing.assert_allclose(merged.out_tqh, found.out_tqh, atol=1e-5)
    np.testing.assert_allclose(np.asarray(merged.lse_tq), np.asarray(found.lse_tq), atol=1e-5)


@pytest.mark.parametrize("quantised", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_write_kv_touches_only_the_given_places(num_tokens, dtype, quantised):
    check_write_kv(reference, dtype=dtype, quantised=quantised, num_tokens=num_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_pages_are_gathered_and_scattered(dtype: str):
    check_gather_scatter(reference, dtype)


def test_a_single_page_is_scattered_or_dropped():
    pool, row = jnp.zeros((3, 2)), jnp.ones((1, 2))
    scatter = jax.jit(reference.scatter_pages)
    np.testing.assert_array_equal(scatter(pool, jnp.array([1]), row)[:, 0], [0, 1, 0])
    for out_of_range in (-1, 3):
        np.testing.assert_array_equal(scatter(pool, jnp.array([out_of_range]), row), pool)
