"""The attention backends of GPUs, compiled for the one that is here, against float64.

The cases of `tests/pallas_kernels`, which interprets the same kernels on CPU. What only a device
can show: that copies, barriers and layouts are what the interpreter takes them for. Sizes that fill
the device come at the end: races show when many blocks run at once.
"""

import importlib
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention.api import Bound, bind
from tests.gpu.conftest import IS_TINY
from tests.pallas_kernels.cases import Case, grid
from tests.pallas_kernels.checks import check_attention, check_gather_scatter, check_write_kv

pytestmark = pytest.mark.gpu

PACKAGE = "jaxserve.pallas_kernels.paged_attention"
DTYPES: dict[str, tuple[str, ...]] = {
    "mosaic_gpu": ("bfloat16", "float16"),
    "triton": ("bfloat16", "float32", "float16"),
    "reference": ("bfloat16", "float32", "float16"),
}
NUM_QUICK = 1 if IS_TINY else 4
NUM_FULL = 2 if IS_TINY else 24


def load(name: str, interpret: bool) -> Bound:
    if name == "mosaic_gpu" and not interpret:
        capability = getattr(jax.devices()[0], "compute_capability", "")
        if capability != "9.0":
            pytest.skip(f"mosaic_gpu needs Hopper, compute capability 9.0; this is {capability}")
    module: Any = importlib.import_module(f"{PACKAGE}.{name}")
    return bind(module, **({"interpret": True} if interpret else {}))


def cases(count: int, seed: int) -> "list[Any]":
    """Pages of 16-bit floats are what they are on a GPU: no raw bits."""
    return [
        pytest.param(name, replace(case, is_raw=False), id=f"{name}: {case}")
        for name, dtypes in DTYPES.items()
        for case in grid(count, seed=seed, dtype=dtypes)
    ]


MAIN = (
    Case(dtype="bfloat16", decode_lens=(450, 3, 64), heads=(8, 2)),
    Case(dtype="bfloat16", prefills=((150, 300),), heads=(8, 2)),
    Case(dtype="bfloat16", decode_lens=(70,), prefills=((9, 40),), quantised="int8"),
    Case(dtype="bfloat16", decode_lens=(70,), prefills=((9, 40),), quantised="float8_e4m3fn"),
)


@pytest.mark.parametrize("case", MAIN[: NUM_QUICK * 2], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_quick_attention_of_the_main_kinds_matches_float64(name: str, case: Case, interpret: bool):
    check_attention(load(name, interpret), replace(case))


@pytest.mark.parametrize(("name", "case"), cases(NUM_FULL, seed=11))
def test_attention_matches_float64(name: str, case: Case, interpret: bool):
    check_attention(load(name, interpret), replace(case))


@pytest.mark.parametrize("quantised", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", DTYPES)
def test_new_tokens_reach_their_places(name: str, quantised: str | None, interpret: bool):
    for seed, (page_size, num_tokens) in enumerate(((16, 1), (32, 40))):
        check_write_kv(
            load(name, interpret),
            dtype="bfloat16",
            quantised=quantised,
            num_tokens=num_tokens,
            head_dim=128,
            page_size=page_size,
            seed=seed,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_whole_pages_are_moved(dtype: str, interpret: bool):
    check_gather_scatter(load("mosaic_gpu", interpret), dtype)


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_many_blocks_at_once_give_the_same_bits_every_time(name: str, kind: str, interpret: bool):
    """A result that changes between runs is a race."""
    if interpret:
        case = Case(dtype="bfloat16", decode_lens=(70, 3), heads=(4, 2), head_dim=64)
    elif kind == "decode":
        case = Case(dtype="bfloat16", decode_lens=(700, 1, 333) * 16, heads=(32, 8))
    else:
        case = Case(dtype="bfloat16", prefills=((600, 900), (257, 257)), heads=(32, 8))
    backend = load(name, interpret)
    first = np.asarray(check_attention(backend, replace(case)).out_tqh)
    for _ in range(1 if interpret else 5):
        again = np.asarray(check_attention(backend, replace(case)).out_tqh)
        np.testing.assert_array_equal(first.view(np.uint16), again.view(np.uint16))
