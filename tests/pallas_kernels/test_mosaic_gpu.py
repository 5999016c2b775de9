"""What is Mosaic GPU's own: how rows are cut, what is refused, races, and lowering for an H200.

That it attends rightly is tested with the other backends, in `test_backends`.
"""

import inspect
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import source_info_util
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxserve.pallas_kernels.paged_attention import (
    mosaic_gpu,
    mosaic_gpu_decode,
    mosaic_gpu_prefill,
    mosaic_gpu_tiles,
)
from jaxserve.pallas_kernels.paged_attention.api import bind
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tuning import (
    DEFAULT_DEVICE,
    Tile,
    load_tuning,
)
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.checks import check_attention

TUNING = replace(
    load_tuning(DEFAULT_DEVICE), decode_blocks=6, min_piece_tokens=64, prefill_programs=1
)


def rows_of(kv_lens: list[int], q_lens: list[int], num_decodes: int) -> RaggedRows:
    kv_len, q_len = jnp.asarray(kv_lens, jnp.int32), jnp.asarray(q_lens, jnp.int32)
    return RaggedRows(
        num_decodes=jnp.int32(num_decodes),
        num_rows=jnp.int32(sum(q_len > 0 for q_len in q_lens)),
        q_start=jnp.cumsum(q_len) - q_len,
        q_len=q_len,
        kv_len=kv_len,
        page_table=jnp.zeros((len(kv_lens), 4), jnp.int32),
        has_prefills=num_decodes < len(kv_lens),
    )


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_cover_each_tile_of_the_decode_rows_once(seed: int, window: int | None):
    rng = np.random.default_rng(seed)
    kv_lens = [int(x) for x in rng.integers(1, 40, 8) ** rng.integers(1, 3, 8)]
    rows = rows_of(kv_lens, [1] * 6 + [0, 0], 6)
    spec = AttentionSpec(1.0, 1, 0, window)
    launch = mosaic_gpu_decode.Launch(
        mosaic_gpu_tiles.PageTiles(64, 16, spec),
        stages=3,
        target_pieces=12,
        min_piece_tiles=2,
        max_row_pieces=8,
    )
    pieces = mosaic_gpu_decode.cut(rows, spec, launch)
    covered = []
    for index, (row, kv_len, begin, end) in enumerate(np.asarray(pieces.piece_w4)):
        if begin < end:
            first, count = int(pieces.first_r[row]), int(pieces.count_r[row])
            assert kv_len == kv_lens[row] and first <= index < first + count
            covered += [(int(row), tile) for tile in range(begin, end)]
    expected = [
        (row, tile)
        for row, kv_len in enumerate(kv_lens[:6])
        for tile in range(max(0, kv_len - (window or kv_len)) // 64, -(-kv_len // 64))
    ]
    assert sorted(covered) == expected
    assert int(pieces.count_r.max()) <= launch.max_row_pieces


def test_one_long_row_is_cut_and_short_ones_are_left_whole():
    rows = rows_of([32_768, 256, 256, 256], [1] * 4, 4)
    spec = AttentionSpec(1.0, 1, 0)
    launch = mosaic_gpu_decode.Launch(
        mosaic_gpu_tiles.PageTiles(64, 16, spec), 3, 32, min_piece_tiles=4, max_row_pieces=32
    )
    count_r = np.asarray(mosaic_gpu_decode.cut(rows, spec, launch).count_r)
    assert count_r[0] >= 28 and list(count_r[1:]) == [1, 1, 1]


def test_blocks_cover_each_query_token_once_and_the_longest_come_first():
    q_lens, kv_lens = [1, 1, 70, 5, 128, 0], [9, 3, 300, 5, 1000, 0]
    rows = replace(rows_of(kv_lens, q_lens, 2), num_rows=jnp.int32(5))
    spec = AttentionSpec(1.0, 1, 0)
    blocks = mosaic_gpu_prefill.cut(rows, spec, num_tokens=220, tile=128, block_tokens=32)
    table = [mosaic_gpu_prefill.Block(*row) for row in np.asarray(blocks.block_b8)]
    num_tiles = [int(block.num_tiles) for block in table]
    assert num_tiles == sorted(num_tiles, reverse=True)
    of_place = {int(block.place): block for block in table if block.num_tiles > 0}
    assert len(of_place) == 3 + 1 + 4 == int(table[0].num_blocks)
    starts, is_prefill_t = np.asarray(rows.q_start), np.asarray(blocks.is_prefill_t)
    assert list(np.flatnonzero(is_prefill_t)) == list(range(2, 205))
    for token in np.flatnonzero(is_prefill_t):
        block = of_place[int(blocks.place_t[token]) // 32]
        within = int(blocks.place_t[token]) % 32
        assert block.token + within == token
        row = int(block.row)
        position = kv_lens[row] - q_lens[row] + token - starts[row]
        assert block.position + within == position < block.end * 128


def test_layers_share_one_kernel():
    """Each kernel takes its second to compile, in each bucket; 32 layers would take 32."""
    num_layers = 4
    case = Case(dtype="bfloat16", decode_lens=(30,), layers=(num_layers, 0))
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))

    def step(q_tqh: jax.Array, pages: KVPages, rows: RaggedRows) -> jax.Array:
        for layer in range(num_layers):
            spec = replace(case.spec, layer=layer)
            q_tqh = mosaic_gpu.ragged_paged_attention(q_tqh, pages, rows, spec).out_tqh
        return q_tqh

    text = lower_for_h200(step, *args)
    # The first layer's queries are an argument, which jax may take for another type.
    assert text.count("@mosaic_gpu_v2(") in (1, 2)


@pytest.mark.parametrize("group", range(1, 17))
def test_two_warpgroups_share_the_query_heads_without_a_rest(group: int):
    shape = mosaic_gpu_prefill.row_tiles(group)
    assert shape.turn_heads * shape.chunks == group
    assert shape.heads * shape.tokens == 64 and shape.tokens >= 8


def check(case: Case, tuning: Any = TUNING) -> None:
    check_attention(bind(mosaic_gpu, interpret=True, tuning=tuning), case)


def test_rows_may_be_cut_into_pieces_or_not():
    case = Case(dtype="bfloat16", decode_lens=(450, 3), has_sinks=True, soft_cap=5.0)
    check(replace(case), replace(TUNING, decode_blocks=20))
    check(replace(case), replace(TUNING, decode_blocks=1))


def test_pages_need_not_divide_tiles():
    check(Case(dtype="bfloat16", decode_lens=(200, 97), page_size=48, window=60))


def test_more_query_heads_share_a_kv_head_than_wgmma_has_rows():
    check(Case(dtype="bfloat16", decode_lens=(70, 5), heads=(80, 1), head_dim=64))


def test_programs_take_several_turns_with_one_ring(monkeypatch: pytest.MonkeyPatch):
    """17 turns over 2 programs, to and fro; the ring goes on where the turn before has left it.

    One warpgroup is late wherever it waits for the other, which is then as far ahead as it can be.
    """
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    wait, num_late = shared_memory.Barrier.wait, 0

    def wait_late(barrier: Any, *args: Any, **named: Any) -> None:
        nonlocal num_late
        places = [
            arg.source_info for arg in (*args, *named.values()) if hasattr(arg, "source_info")
        ]
        if any("_zero_unseen" in source_info_util.summarize(place) for place in places):
            num_late += 1
            time.sleep(0.05)
        wait(barrier, *args, **named)

    monkeypatch.setattr(shared_memory.Barrier, "wait", wait_late)
    tuning = replace(TUNING, prefill_programs=2, prefill_takes_turns=False)
    case = Case(
        dtype="float16", prefills=((140, 140), (1, 150)), heads=(6, 2), head_dim=64, window=130
    )
    check(case, tuning)
    assert num_late


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype="bfloat16", decode_lens=(300,), heads=(4, 1), quantised="int8", head_dim=64),
        Case(dtype="bfloat16", prefills=((9, 300),), heads=(4, 1), window=70, head_dim=64),
        Case(dtype="bfloat16", prefills=((9, 300),), heads=(4, 1), quantised="int8", head_dim=64),
    ],
    ids=str,
)
def test_no_copy_races_with_what_reads_or_writes_the_same_place(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    plain = mosaic_gpu_tiles.interpret_params()
    with_detector = partial(replace, plain, detect_races=True)
    monkeypatch.setattr(mosaic_gpu_tiles, "interpret_params", with_detector)
    jax.clear_caches()  # of what was traced without the detector
    check(case)
    jax.clear_caches()
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(dtype="float32"), "tf32"),
        (Case(dtype="bfloat16", head_dim=320), "the largest product of wgmma"),
        (Case(dtype="bfloat16", head_dim=40), "multiple of 32 bytes"),
        (Case(dtype="bfloat16", head_dim=80, quantised="int8"), "multiple of 32 bytes"),
        (Case(dtype="bfloat16", page_size=8), "page size 8"),
    ],
)
def test_what_the_hardware_cannot_is_refused_with_the_reason(case: Case, reason: str):
    case = replace(case, decode_lens=(5,))
    attend = partial(mosaic_gpu.ragged_paged_attention, spec=case.spec)
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(attend, *args)


def test_pages_of_raw_bits_are_refused():
    case = Case(dtype="bfloat16", decode_lens=(5,))
    q_tqh, pages, rows = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    pages = replace(pages, rows_rkph=pages.rows_rkph.view(jnp.uint16))
    attend = partial(mosaic_gpu.ragged_paged_attention, spec=case.spec)
    with pytest.raises(NotImplementedError, match="pages of uint16, and queries of bfloat16"):
        jax.eval_shape(attend, q_tqh, pages, rows)


def lower_for_h200(function: Callable[..., Any], *args: Any) -> str:
    """The program for the GPU, up to where ptxas would be needed."""
    known = inspect.signature(AbstractDevice.__init__).parameters
    options: dict[str, Any] = {"device_kind": "NVIDIA H200", "num_cores": 132}
    if "platform" in known:  # jax 0.11
        options["platform"] = "gpu"
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**options)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


EVERY_TILE = os.environ.get("KERNELS_IN_FULL") == "1"


@pytest.mark.parametrize(
    "tile",
    load_tuning(DEFAULT_DEVICE).prefill[:: 1 if EVERY_TILE else 2],
    ids=lambda tile: f"{'8 bits, ' if tile.is_quantised else ''}head dim {tile.max_head_dim}",
)
def test_both_launches_fit_an_h200_with_their_tuned_tiles(tile: Tile):
    """Mosaic lowers on any machine; it says so if shared memory does not suffice."""
    case = Case(
        dtype="bfloat16",
        head_dim=tile.max_head_dim,
        quantised="float8_e4m3fn" if tile.is_quantised else None,
        decode_lens=(3,),
        prefills=((3, 9),),
        window=20,
        soft_cap=5.0,
        has_sinks=True,
    )
    args = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages, case.rows))
    text = lower_for_h200(partial(mosaic_gpu.ragged_paged_attention, spec=case.spec), *args)
    assert "paged_decode" in text and "paged_prefill" in text
