"""Every backend against float64, over the generated grid; kernels in interpret mode, on CPU.

What a backend may refuse is written down here, and nothing else may be refused. With
KERNELS_IN_FULL=1 (`make test-kernels`) the grids are several times as large.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import ATTENTION_BACKENDS
from jaxserve.pallas_kernels.cpu import build
from jaxserve.pallas_kernels.paged_attention.api import Bound, bind
from tests.pallas_kernels.cases import Case, grid
from tests.pallas_kernels.checks import check_attention, check_gather_scatter, check_write_kv

PACKAGE = "jaxserve.pallas_kernels.paged_attention"
IN_FULL = os.environ.get("KERNELS_IN_FULL") == "1"


def never(case: Case) -> bool:
    return False


@dataclass(frozen=True)
class Plan:
    """What a backend is asked.

    Attributes:
        count: cases in the default suite, as many as take about fifteen seconds.
        full_count: the same, with KERNELS_IN_FULL=1.
        may_refuse: the cases that are not for it; the grid here has none of them.
        limits: for `grid`.
        needs_lse: what the backend is told.
    """

    count: int
    full_count: int
    may_refuse: Callable[[Case], bool] = never
    limits: dict[str, Any] = field(default_factory=dict)
    needs_lse: bool = True

    @property
    def cases(self) -> list[Case]:
        return grid(self.full_count if IN_FULL else self.count, **self.limits)


PLANS = {
    # Its tiles are 256 queries long.
    "reference": Plan(10, 100, limits={"max_q": 400}),
    # The rest of its cases go to the reference.
    "cpu_native": Plan(
        8,
        60,
        limits={
            "dtype": ("float32", "bfloat16"),
            "quantised": (None,),
            "has_sinks": (False,),
            "max_q": 400,
        },
        needs_lse=False,
    ),
    "triton": Plan(9, 100),
    "mosaic_gpu": Plan(
        5,
        60,
        may_refuse=lambda case: case.dtype == "float32",
        limits={"dtype": ("bfloat16", "float16")},
    ),
    "tpu": Plan(
        7,
        80,
        may_refuse=lambda case: case.dtype == "float16",
        limits={"dtype": ("float32", "bfloat16")},
    ),
}
PRESENT = [name for name in PLANS if find_spec(f"{PACKAGE}.{name}")]
CASES = [
    pytest.param(name, case, id=f"{name}: {case}") for name in PRESENT for case in PLANS[name].cases
]


def load(name: str, **options: Any) -> Bound:
    if name == "cpu_native" and not build.load().available:
        pytest.skip(f"no native CPU kernels: {build.load().detail}")
    module: Any = importlib.import_module(f"{PACKAGE}.{name}")
    return bind(module, **({"interpret": True} | options))


def test_every_backend_that_can_be_chosen_has_a_plan():
    assert set(PLANS) == set(ATTENTION_BACKENDS) - {"auto"}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_attention_matches_float64(name: str, case: Case):
    # A copy: its arrays are not kept until the end of the session.
    check_attention(load(name), replace(case), needs_lse=PLANS[name].needs_lse)


@pytest.mark.parametrize("name", PRESENT)
def test_little_is_refused_and_before_it_runs(name: str):
    """Tracing for the device says it, from shapes, dtypes and the spec alone."""
    attention = load(name, interpret=False).ragged_paged_attention
    for case in grid(200 if IN_FULL else 12, seed=1):
        args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
        sinks = None if case.sinks_q is None else jnp.asarray(case.sinks_q)
        try:
            jax.eval_shape(partial(attention, spec=case.spec, sinks_q=sinks), *args)
        except NotImplementedError as error:
            assert PLANS[name].may_refuse(case), f"{case} was refused: {error}"
            assert str(error), "a refusal tells its reason"


WRITTEN = [
    (dtype, quantised)
    for dtype in ("bfloat16", "float32", "float16")
    for quantised in (None, "int8", "float8_e4m3fn")
    if IN_FULL or quantised is None or dtype == "bfloat16"
]


@pytest.mark.parametrize(("dtype", "quantised"), WRITTEN)
@pytest.mark.parametrize("name", PRESENT)
def test_new_tokens_reach_their_places(name: str, dtype: str, quantised: str | None):
    for index, (page_size, num_tokens, head_dim) in enumerate(((16, 1, 64), (32, 40, 128))):
        check_write_kv(
            load(name),
            dtype=dtype,
            quantised=quantised,
            num_tokens=num_tokens,
            head_dim=head_dim,
            page_size=page_size,
            seed=index,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", PRESENT)
def test_whole_pages_and_their_scales_are_moved(name: str, dtype: str):
    check_gather_scatter(load(name), dtype)
    check_gather_scatter(load(name), dtype, page_shape=(3, 2, 4, 32))
