"""Which backend does what, with stand-ins that refuse; and which calls make no sense to any."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import ATTENTION_BACKENDS
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.api import Machine, bind, get_backend, this_machine
from jaxserve.pallas_kernels.paged_attention.specs import Attended, KVPages
from tests.pallas_kernels.cases import Case

MACHINES = {
    "Hopper": (Machine("gpu", "9.0"), ("mosaic_gpu", "triton", "reference")),
    "Ampere": (Machine("gpu", "8.0"), ("triton", "reference")),
    "Blackwell": (Machine("gpu", "10.0"), ("triton", "reference")),
    "TPU": (Machine("tpu"), ("tpu", "reference")),
    "CPU with a compiler": (Machine("cpu", native_cpu=True), ("cpu_native", "reference")),
    "CPU": (Machine("cpu"), ("reference",)),
    "another": (Machine("METAL"), ("reference",)),
}
HOPPER = MACHINES["Hopper"][0]


@pytest.mark.parametrize("name", MACHINES)
def test_auto_takes_what_is_fastest_on_the_machine_and_ends_with_the_reference(name: str):
    machine, expected = MACHINES[name]
    assert get_backend("auto", machine).names == expected


def test_a_chain_can_begin_later_but_not_with_what_the_machine_lacks():
    assert get_backend("triton", HOPPER).names == ("triton", "reference")
    assert get_backend("reference", HOPPER).names == ("reference",)
    for name in ("mosaic_gpu", "cpu_native", "tpu", "nonsense"):
        with pytest.raises(ValueError, match=f"'{name}' is not available.*auto or.*triton"):
            get_backend(name, MACHINES["Ampere"][0])


def test_the_choices_of_the_setting_are_the_backends_of_all_machines():
    names = {name for _, names in MACHINES.values() for name in names}
    assert set(ATTENTION_BACKENDS) == {"auto", *names}


class Stand:
    """A backend that marks its answers and refuses some calls."""

    def __init__(self, mark: float, refuses=lambda q: None):
        self.mark, self.refuses, self.calls = mark, refuses, 0

    def ragged_paged_attention(self, q_tqh, pages, rows, spec, *, sinks_q=None):
        self.calls += 1
        if reason := self.refuses(q_tqh):
            raise NotImplementedError(reason)
        return Attended(jnp.full_like(q_tqh, self.mark), None)

    def write_kv(self, *args):
        raise NotImplementedError("it only reads")

    def gather_pages(self, pool_n, ids_b):
        return jnp.full(ids_b.shape, self.mark)

    def scatter_pages(self, pool_n, ids_b, rows_b):
        raise NotImplementedError("it only reads")


def chain_of(**stands):
    """A chain over stand-ins, in place of those backends."""

    def load(name):
        if name not in stands:
            raise ImportError(f"no module {name}")
        return stands[name]

    return get_backend("auto", HOPPER, load)


def attend(chain, head_dim: int = 64, **changes):
    case = Case(head_dim=head_dim, decode_lens=(5,), **changes)
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    return float(chain.ragged_paged_attention(*args, case.spec).out_tqh[0, 0, 0])


def test_a_refusal_holds_for_its_shape_only_and_is_logged_once(caplog):
    first = Stand(1.0, lambda q: "head dimension 96" if q.shape[-1] == 96 else None)
    chain = chain_of(mosaic_gpu=first, triton=Stand(2.0), reference=reference)
    with caplog.at_level(logging.INFO, logger="jaxserve"):
        assert [attend(chain, head_dim) for head_dim in (64, 96, 64, 96)] == [1.0, 2.0, 1.0, 2.0]
    assert first.calls == 4
    (record,) = caplog.records
    assert "mosaic_gpu" in record.getMessage() and "head dimension 96" in record.getMessage()


def test_each_operation_is_passed_on_by_itself(caplog):
    chain = chain_of(mosaic_gpu=Stand(1.0), triton=Stand(2.0), reference=reference)
    pool, ids, rows = jnp.zeros((3, 2)), jnp.array([1]), jnp.full((1, 2), 7.0)
    assert attend(chain) == 1.0
    assert chain.gather_pages(pool, ids).tolist() == [1.0]
    assert chain.scatter_pages(pool, ids, rows).tolist() == [[0, 0], [7, 7], [0, 0]]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("scatter_pages: it only reads" in m for m in messages)


def test_what_cannot_be_imported_is_passed_over_with_the_reason(caplog):
    chain = chain_of(triton=Stand(2.0), reference=reference)
    assert attend(chain) == attend(chain) == 2.0
    (record,) = caplog.records
    assert "mosaic_gpu" in record.getMessage() and "no module mosaic_gpu" in record.getMessage()


def test_nothing_is_imported_before_it_is_asked():
    asked = []

    def load(name):
        asked.append(name)
        return Stand(1.0)

    chain = get_backend("auto", HOPPER, load)
    assert asked == []
    assert attend(chain) == attend(chain) == 1.0
    assert asked == ["mosaic_gpu"]


def test_when_all_refuse_each_reason_is_told():
    refusing = Stand(0.0, lambda q: "not today")
    chain = chain_of(mosaic_gpu=refusing, triton=refusing)
    with pytest.raises(NotImplementedError, match="mosaic_gpu: .*today; triton: .*; reference: "):
        attend(chain)


def test_a_mistake_of_the_caller_is_not_passed_on():
    def mistaken(q):
        raise ValueError("that makes no sense")

    chain = chain_of(mosaic_gpu=Stand(1.0, mistaken), triton=Stand(2.0))
    with pytest.raises(ValueError, match="no sense"):
        attend(chain)


def test_options_reach_the_operations_that_take_them():
    def attention(q, *, interpret=False, tuning=None):
        return interpret, tuning

    def move(pool):
        return pool

    module: Any = SimpleNamespace(
        ragged_paged_attention=attention, write_kv=move, gather_pages=move, scatter_pages=move
    )
    bound = bind(module, interpret=True)
    assert bound.ragged_paged_attention(None) == (True, None) and bound.write_kv(3) == 3


def wrong_calls() -> Iterator[tuple[dict[str, Any], dict[str, Any], str | None]]:
    """Arguments that fit, and one change each that makes them senseless."""
    case = Case(head_dim=16, decode_lens=(5, 9), quantised="int8")
    q, pages, rows = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    good = {"q": q, "pages": pages, "rows": rows, "spec": case.spec, "sinks": None}
    pool, scales = pages.rows_rkph, pages.scales_rkp
    assert scales is not None
    yield good, {}, None
    yield good, {"q": q[0]}, r"expected \[T, Q, H\]"
    yield good, {"q": q[:, :, :8]}, "the same head dimension"
    yield good, {"q": q[:, :7]}, "a multiple of KV heads"
    yield good, {"pages": KVPages(pool[None], scales)}, "kernel view"
    yield good, {"pages": KVPages(pool)}, "int8 lack scales"
    yield good, {"pages": KVPages(pool.astype(jnp.float32), scales)}, "float32 have scales"
    yield good, {"pages": KVPages(pool, scales[:, :, :3])}, "scales are"
    yield good, {"pages": KVPages(pool, scales.astype(jnp.bfloat16))}, "scales are"
    yield good, {"spec": replace(case.spec, layer=1)}, "layer 1 of 1"
    yield good, {"spec": replace(case.spec, window=0)}, "window is 0"
    yield good, {"sinks": jnp.zeros(3)}, "sinks are"
    yield good, {"rows": replace(rows, page_table=rows.page_table[0])}, r"expected \[R, M\]"
    yield good, {"q": q[:1]}, "at most as many rows as tokens"


def test_calls_that_make_no_sense_are_refused_with_what_was_expected():
    chain = chain_of(mosaic_gpu=Stand(1.0))
    for good, change, message in wrong_calls():
        args = good | change
        call = (args["q"], args["pages"], args["rows"], args["spec"])
        if message is None:
            chain.ragged_paged_attention(*call, sinks_q=args["sinks"])
            continue
        with pytest.raises(ValueError, match=message):
            chain.ragged_paged_attention(*call, sinks_q=args["sinks"])


def test_a_start_on_cpu_does_not_import_pallas():
    code = (
        "import sys, jaxserve.engine\n"
        "from jaxserve.pallas_kernels.paged_attention.api import get_backend, this_machine\n"
        "import jax.numpy as jnp\n"
        "backend = get_backend('auto', this_machine())\n"
        "backend.gather_pages(jnp.zeros((2, 3)), jnp.array([1]))\n"
        "assert not [name for name in sys.modules if 'pallas' in name and 'jaxserve' not in name]"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_this_machine_is_the_one_that_tests_run_on():
    assert this_machine(native_cpu=True) == Machine(jax.default_backend(), native_cpu=True)
