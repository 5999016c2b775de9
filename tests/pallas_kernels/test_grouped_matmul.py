"""Products of runs of rows with a matrix each: every backend against float64, interpreted."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from jaxserve.pallas_kernels.cpu import build
from jaxserve.pallas_kernels.grouped_matmul.api import (
    BACKENDS,
    backends_for,
    get_grouped_matmul,
)
from jaxserve.pallas_kernels.grouped_matmul.runs import cut
from jaxserve.pallas_kernels.paged_attention.api import Machine

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""By the dtype of the result: sums of some hundred terms; bfloat16 has 8 bits."""

SIZES = {
    "uneven runs": (70, 1, 0, 33, 2),
    "empty runs at both ends": (0, 0, 40, 0, 0),
    "one run": (64,),
    "one row each": (1,) * 9,
    "rows after the last run": (3, 5),
    "no rows in any run": (0, 0, 0),
}


def load(name: str) -> Any:
    if name == "cpu_native" and not build.load().available:
        pytest.skip(f"no native CPU kernels: {build.load().detail}")
    module = importlib.import_module(f"jaxserve.pallas_kernels.grouped_matmul.{name}")
    if name in ("triton", "tpu"):
        return partial(module.grouped_matmul, interpret=True)
    return module.grouped_matmul


def check(function: Any, sizes: tuple[int, ...], dtype: str, out_dtype: str, **shape: int) -> None:
    """The function's result for these runs and some rows after them."""
    rng = np.random.default_rng(len(sizes))
    num_in, num_out = shape.get("num_in", 72), shape.get("num_out", 40)
    num_rows = sum(sizes) + (7 if len(sizes) < 5 else 0)
    x_mi = rng.standard_normal((num_rows, num_in)).astype(DTYPES[dtype])
    w_eoi = (rng.standard_normal((len(sizes), num_out, num_in)) / num_in**0.5).astype(DTYPES[dtype])
    for run, size in enumerate(sizes):
        if size == 0 and run < len(sizes) - 1:
            w_eoi[run] = np.nan  # nothing comes of a matrix that no row asks for
    expected_mo, begin = np.zeros((num_rows, num_out)), 0
    for run, size in enumerate(sizes):
        rows = slice(begin, begin + size)
        if size:
            expected_mo[rows] = x_mi[rows].astype(np.float64) @ w_eoi[run].astype(np.float64).T
        begin += size
    x_mi[begin:] = np.nan  # what no run holds may be anything, and comes out as zeros
    run = jax.jit(partial(function, out_dtype=jnp.dtype(out_dtype)))
    y_mo = run(jnp.asarray(x_mi), jnp.asarray(w_eoi), jnp.asarray(sizes, jnp.int32))
    assert y_mo.shape == expected_mo.shape and y_mo.dtype == jnp.dtype(out_dtype)
    most = TOLERANCE[out_dtype]
    np.testing.assert_allclose(np.asarray(y_mo, np.float64), expected_mo, most, most)


@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "bfloat16 float32"])
@pytest.mark.parametrize("runs", SIZES)
@pytest.mark.parametrize("name", BACKENDS)
def test_runs_meet_their_own_matrix(name: str, runs: str, dtypes: str):
    check(load(name), SIZES[runs], *dtypes.split())


@pytest.mark.parametrize("name", BACKENDS)
def test_sides_that_are_no_power_of_two(name: str):
    check(load(name), (20, 0, 9), "float32", "float32", num_in=200, num_out=136)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("tile_rows", [1, 16, 64])
def test_tiles_cover_each_row_once_and_span_no_two_runs(sizes, tile_rows):
    num_rows = sum(sizes) + 5
    tiles = cut(jnp.asarray(sizes, jnp.int32), num_rows, tile_rows)
    run_of_row = np.repeat(np.arange(len(sizes) + 1), [*sizes, 5])
    covered = []
    for run, begin, end in zip(*map(np.asarray, tiles), strict=True):
        assert end - begin <= tile_rows
        assert (run_of_row[begin:end] == run).all()
        covered += range(begin, end)
    assert covered == list(range(num_rows))


def test_each_machine_ends_with_the_reference():
    assert backends_for(Machine("gpu", "9.0")) == ("triton", "reference")
    assert backends_for(Machine("tpu")) == ("tpu", "reference")
    assert backends_for(Machine("cpu", native_cpu=True)) == ("cpu_native", "reference")
    assert backends_for(Machine("cpu")) == ("reference",)


def test_a_dtype_that_kernels_do_not_know_goes_to_the_reference():
    grouped_matmul = get_grouped_matmul(Machine("cpu", native_cpu=True))
    x_mi, sizes_e = jnp.ones((3, 8), jnp.float16), jnp.asarray([3], jnp.int32)
    y_mo = grouped_matmul(x_mi, jnp.ones((1, 4, 8), jnp.float16), sizes_e, jnp.float32)
    np.testing.assert_array_equal(y_mo, np.full((3, 4), 8.0))


def test_shapes_that_do_not_fit_are_the_callers_mistake():
    grouped_matmul = get_grouped_matmul(Machine("cpu"))
    x_mi, w_eoi, sizes_e = jnp.ones((3, 8)), jnp.ones((2, 4, 9)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=r"rows are \(3, 8\), matrices \(2, 4, 9\)"):
        grouped_matmul(x_mi, w_eoi, sizes_e, jnp.float32)
