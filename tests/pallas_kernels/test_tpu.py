"""The TPU kernels on a simulated TPU: copies happen when they are waited for, races are looked for.

Memory that nobody wrote is NaN. Block sizes are small, so that there are many chunks and tiles.
That the backend agrees with float64 over the whole grid is tested for all backends together.
"""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.paged_attention import tpu
from jaxserve.pallas_kernels.paged_attention.api import Bound, bind
from tests.pallas_kernels.cases import Case, grid
from tests.pallas_kernels.checks import check_attention, check_gather_scatter, check_write_kv

INTERPRET = pltpu.InterpretParams(detect_races=True)
SMALL = tpu.Tuning(chunk_tokens=64, tile_rows=64)


@pytest.fixture(autouse=True)
def no_races():
    yield
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


def backend(tuning: tpu.Tuning = SMALL) -> Bound:
    return bind(tpu, interpret=INTERPRET, tuning=tuning)


GRID = grid(7, seed=3, max_kv=300, max_q=70, dtype=("bfloat16", "float32", "bfloat16"))


@pytest.mark.parametrize("case", GRID, ids=str)
def test_attention_agrees_with_float64(case: Case):
    check_attention(backend(), case)


@pytest.mark.parametrize(
    "case",
    [
        Case(seed=1, heads=(16, 16), decode_lens=(70, 200, 64), prefills=((40, 90),)),
        Case(seed=2, heads=(16, 16), quantised="int8", decode_lens=(70, 200), pad_rows=2),
    ],
    ids=str,
)
def test_heads_in_several_blocks(case: Case):
    check_attention(backend(), case)


def test_default_block_sizes():
    case = Case(
        seed=3, dtype="bfloat16", page_size=64, decode_lens=(1100, 3), prefills=((150, 700), (9, 9))
    )
    check_attention(backend(tpu.DEFAULT_TUNING), case)


def test_page_tables_wider_than_a_vector():
    case = Case(seed=4, heads=(2, 1), head_dim=64, decode_lens=(2100, 40, 2090), is_mixed=True)
    assert case.rows.page_table.shape[1] > 128
    check_attention(backend(tpu.DEFAULT_TUNING), case)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"dtype": "bfloat16", "num_tokens": 60, "head_dim": 128},
        {"dtype": "bfloat16", "quantised": "int8", "num_tokens": 41},
        {"dtype": "bfloat16", "quantised": "float8_e4m3fn", "page_size": 64, "num_kv": 1},
        {"num_tokens": 1},
        {"num_tokens": 150, "page_size": 32, "quantised": "int8", "layers": (1, 0)},
    ],
    ids=str,
)
def test_writes_change_nothing_but_their_tokens(facts):
    check_write_kv(backend(), **facts)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pages_move_whole(dtype):
    check_gather_scatter(backend(), dtype)


def test_layers_share_one_kernel():
    """Tracing and compiling 32 kernels for 32 layers would take minutes."""
    cases = [Case(layers=(3, layer), decode_lens=(20,)) for layer in (0, 2)]

    def attend(q_tqh, pages, rows):
        for case in cases:
            attended = backend().ragged_paged_attention(q_tqh, pages, rows, case.spec)
            q_tqh = attended.out_tqh
        return q_tqh

    pages = jax.tree.map(jnp.asarray, cases[0].pages)
    lowered = jax.jit(attend).lower(jnp.asarray(cases[0].q_tqh), pages, cases[0].rows)
    assert lowered.as_text().count("func.func private @_attend(") == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(dtype="float16", decode_lens=(9,)), "float16"),
        (Case(page_size=8, decode_lens=(9,)), "multiple of 16"),
    ],
)
def test_refuses_with_the_reason(case: Case, reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        check_attention(backend(), case)
