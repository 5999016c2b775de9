"""Attention over latent pages: every backend that takes them against float64; others refuse."""

import os
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.api import Bound, Machine, bind, get_backend
from jaxserve.pallas_kernels.paged_attention.merge import merge
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages
from tests.pallas_kernels.cases import Case, latent_grid
from tests.pallas_kernels.checks import check_attention, check_gather_scatter, check_write_kv
from tests.pallas_kernels.test_backends import load

IN_FULL = os.environ.get("KERNELS_IN_FULL") == "1"
COUNTS = {"reference": (5, 40), "triton": (8, 60), "tpu": (2, 20)}
"""Cases in the default suite, and with KERNELS_IN_FULL=1."""


def cases(name: str) -> list[Case]:
    """Those that the backend takes: TPUs have no float16, and want latents of whole lanes."""
    count = COUNTS[name][IN_FULL]
    if name != "tpu":
        return latent_grid(count)
    found = latent_grid(4 * count, dtype=("float32", "bfloat16"))
    return [case for case in found if (case.latent_dim or 0) % 128 == 0][:count]


CASES = [pytest.param(name, case, id=f"{name}: {case}") for name in COUNTS for case in cases(name)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_latent_attention_matches_float64(name: str, case: Case):
    check_attention(load(name), replace(case))


@pytest.mark.parametrize("quantised", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", list(COUNTS))
def test_new_latents_reach_their_places(name: str, quantised: str | None):
    for num_tokens, dtype in ((1, "float32"), (40, "bfloat16")):
        check_write_kv(
            load(name),
            dtype=dtype,
            quantised=quantised,
            num_tokens=num_tokens,
            num_kv=1,
            head_dim=80,
            latent_dim=64,
        )


def test_whole_latent_pages_are_moved():
    check_gather_scatter(load("reference"), page_shape=(3, 1, 1, 16, 576))


def test_parts_over_disjoint_pages_merge_to_the_whole():
    """The same queries over the first pages and over the rest, each without causality."""
    case = Case(
        heads=(4, 1),
        head_dim=48,
        latent_dim=32,
        page_size=16,
        decode_lens=(64, 48),
        dtype="float32",
    )
    whole = check_attention(load("reference"), case)
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    q_tqh, pages, rows = args
    first = replace(rows, kv_len=jnp.asarray([32, 16], jnp.int32))
    table = jnp.stack([jnp.roll(rows.page_table[0], -2), jnp.roll(rows.page_table[1], -1)])
    rest = replace(rows, kv_len=jnp.asarray([32, 32], jnp.int32), page_table=table)
    attend = partial(reference.ragged_paged_attention, q_tqh, pages, spec=case.spec)
    found = merge([attend(rows=first), attend(rows=rest)])
    np.testing.assert_allclose(found.out_tqh[:2], whole.out_tqh[:2], rtol=1e-5, atol=1e-5)
    assert found.lse_tq is not None and whole.lse_tq is not None
    np.testing.assert_allclose(found.lse_tq[:2], whole.lse_tq[:2], rtol=1e-5)


@pytest.mark.parametrize(
    "machine", [Machine("gpu", "9.0"), Machine("tpu"), Machine("cpu", native_cpu=True)]
)
def test_kernels_without_latent_pages_leave_them_to_others(machine: Machine):
    case = Case(heads=(4, 1), head_dim=64, latent_dim=48, decode_lens=(20,), dtype="bfloat16")

    def attend(q_tqh, pages, rows):
        return backend.ragged_paged_attention(q_tqh, pages, rows, case.spec)

    backend = get_backend("auto", machine)
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    assert jax.eval_shape(attend, *args).out_tqh.shape == (1, 4, 48)


@pytest.mark.parametrize("change", [{"latent_dim": 100}, {"latent_dim": 0}])
def test_a_latent_that_is_no_part_of_the_key_is_the_callers_mistake(change):
    case = Case(heads=(4, 1), head_dim=64, latent_dim=48, decode_lens=(20,))
    backend: Bound = bind(get_backend("reference", Machine("cpu")))
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    with pytest.raises(ValueError, match="latent_dim is"):
        backend.ragged_paged_attention(*args, replace(case.spec, **change))


def test_values_are_written_with_keys_and_only_with_them():
    pages = KVPages(jnp.zeros((2, 1, 16, 32)))
    k_tkh, zero_t = jnp.zeros((3, 1, 32)), jnp.zeros(3, jnp.int32)
    with pytest.raises(AssertionError):
        reference.write_kv(pages, k_tkh, None, zero_t, zero_t, AttentionSpec(1.0, 1, 0))
