"""What only the Pallas-Triton backend has: tiles, splits, tuned sizes, refusals, float16 products.

That it agrees with float64 over the whole grid of features is tested for all backends together.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.pallas_kernels.paged_attention import triton, triton_ptx
from jaxserve.pallas_kernels.paged_attention.api import bind
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages
from jaxserve.pallas_kernels.paged_attention.triton_tile import powers_of_two
from jaxserve.pallas_kernels.paged_attention.triton_tuning import (
    DEFAULT_DEVICE,
    Tuning,
    find_tile,
    load_tuning,
)
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.checks import check_attention

MIXED = Case(decode_lens=(300, 1, 64), prefills=((70, 200), (65, 65), (3, 90)), pad_rows=2)
TUNING = load_tuning(DEFAULT_DEVICE)


def resized(num_splits: int = 1, **sizes: int) -> Tuning:
    """All tiles with other sizes; as many splits for every launch."""
    tiles = (replace(tile, **sizes) for tile in TUNING.decode + TUNING.prefill)
    tiles = tuple(tiles)
    count = len(TUNING.decode)
    return replace(
        TUNING,
        num_sms=num_splits * 10**6,
        programs_per_sm=1,
        min_split_tokens=1 if num_splits == 1 else 16,
        decode=tiles[:count],
        prefill=tiles[count:],
    )


@pytest.mark.parametrize(
    ("block_m", "block_k", "page_size", "window"),
    [
        (16, 16, 64, None),
        (16, 64, 64, 33),
        (32, 128, 16, None),
        (64, 32, 256, 33),
        (128, 64, 48, None),
        (128, 64, 48, 33),
        (16, 32, 80, 33),
    ],
)
def test_any_tile_meets_any_page_size(block_m, block_k, page_size, window):
    case = replace(MIXED, head_dim=64, page_size=page_size, window=window, heads=(6, 2))
    backend = bind(triton, interpret=True, tuning=resized(block_m=block_m, block_k=block_k))
    check_attention(backend, case)


@pytest.mark.parametrize("quantised", [None, "int8"])
@pytest.mark.parametrize("block_k", [16, 64])
def test_rows_with_fewer_blocks_than_splits_leave_splits_empty(block_k, quantised):
    case = Case(
        decode_lens=(1, 15, 16, 17, 500), page_size=16, window=100, has_sinks=True,
        head_dim=64, quantised=quantised, dtype="bfloat16",
    )  # fmt: skip
    tuning = resized(num_splits=1, block_k=block_k)
    assert tuning.num_splits(10, 512) == 512
    check_attention(bind(triton, interpret=True, tuning=tuning), case)


def test_heads_of_one_kv_head_are_cut_into_tiles():
    """71 of them, as in Falcon-7B: three tiles of 32, in prefill tiles end within a token."""
    case = Case(
        heads=(71, 1), head_dim=64, decode_lens=(5, 140), prefills=((9, 30), (40, 40)), pad_rows=1
    )
    check_attention(bind(triton, interpret=True), case)


@pytest.mark.parametrize(
    ("head_dim", "piece"), [(16, 32), (80, 32), (80, 256), (112, 256), (192, 32), (192, 256)]
)
def test_head_dims_are_cut_into_powers_of_two(head_dim, piece):
    case = replace(MIXED, head_dim=head_dim, prefills=((30, 60),), page_size=32)
    check_attention(bind(triton, interpret=True, tuning=resized(piece=piece)), case)
    pieces = powers_of_two(head_dim, piece)
    assert [begin for begin, _ in pieces] == list(np.cumsum([0] + [n for _, n in pieces])[:-1])
    assert sum(size for _, size in pieces) == head_dim
    assert all(size & (size - 1) == 0 and size <= piece for _, size in pieces)


@pytest.mark.parametrize("factor", [1e6, 1e-6])
@pytest.mark.parametrize("quantised", ["int8", "float8_e4m3fn"])
def test_numbers_far_outside_float16_pass_through_its_products(quantised, factor):
    """Queries and values that much larger, keys that much smaller; and the other way round."""
    case = Case(
        quantised=quantised, dtype="bfloat16", decode_lens=(200, 40), prefills=((50, 130),),
        head_dim=64, page_size=32,
    )  # fmt: skip
    scales = np.asarray(case.pages.scales_rkp).copy()
    scales[0::2] /= np.float32(factor)
    scales[1::2] *= np.float32(factor)
    pages = jax.tree.map(jnp.asarray, KVPages(case.pages.rows_rkph, jnp.asarray(scales)))
    q_tqh = jnp.asarray(case.q_tqh.astype(np.float32) * factor, jnp.bfloat16)
    found = triton.ragged_paged_attention(q_tqh, pages, case.rows, case.spec, interpret=True)
    out_tqh = np.asarray(found.out_tqh, np.float64)[: case.num_tokens] / factor
    np.testing.assert_allclose(out_tqh, case.expected.out_tqh, atol=0.045, rtol=0.045)


def test_values_whose_scales_grow_along_a_row_keep_their_share():
    case = Case(
        quantised="int8", dtype="float16", decode_lens=(256,), head_dim=64, page_size=16, scale=0.0
    )
    spec = replace(case.spec, scale=0.0)  # all keys weigh the same
    rows = case.rows
    table = np.asarray(rows.page_table)[0, :16]
    scales = np.asarray(case.pages.scales_rkp).copy()
    stored = np.asarray(case.pages.rows_rkph).copy()
    scales[table * 2 + 1] = (10.0 ** np.arange(-12, 4))[:, None, None]
    stored[table * 2 + 1] = 100
    pages = KVPages(jnp.asarray(stored), jnp.asarray(scales))
    q_tqh = jnp.asarray(case.q_tqh)
    found = triton.ragged_paged_attention(q_tqh, pages, rows, spec, interpret=True)
    expected = 100 * 10.0 ** np.arange(-12, 4)
    np.testing.assert_allclose(np.asarray(found.out_tqh, np.float64), expected.mean(), rtol=2e-3)


def test_a_negative_scale_turns_the_order_of_scores_round():
    case = replace(MIXED, head_dim=64, scale=-0.2, soft_cap=None)
    assert case.spec.scale == -0.2
    check_attention(bind(triton, interpret=True), case)


def test_without_lse_nobody_writes_it():
    case = replace(MIXED, head_dim=64)
    spec = replace(case.spec, needs_lse=False)
    q_tqh, pages = jnp.asarray(case.q_tqh), jax.tree.map(jnp.asarray, case.pages)
    found = triton.ragged_paged_attention(q_tqh, pages, case.rows, spec, interpret=True)
    assert found.lse_tq is None
    out_tqh = np.asarray(found.out_tqh)[: case.num_tokens]
    np.testing.assert_allclose(out_tqh, case.expected.out_tqh, atol=1e-5, rtol=1e-5)


def test_padding_gets_zeros():
    case = replace(MIXED, head_dim=64, pad_tokens=9)
    found = check_attention(bind(triton, interpret=True), case)
    padding = np.asarray(found.out_tqh)[case.num_tokens :]
    assert padding.size and (padding == 0).all()


def test_splits_fill_the_device_where_the_keys_suffice():
    tuning = replace(TUNING, num_sms=100, programs_per_sm=4, min_split_tokens=256)
    assert tuning.num_splits(8, 128 * 1024) == 50
    assert tuning.num_splits(8, 4096) == 16
    assert tuning.num_splits(300, 4096) == 2
    assert tuning.num_splits(400, 128 * 1024) == 1
    assert tuning.num_splits(8, 100) == 1


def test_every_dtype_and_head_dim_has_tiles():
    for tiles in (TUNING.decode, TUNING.prefill):
        for query_bytes in (2, 4):
            for is_quantised in (False, True):
                for head_dim in (16, 64, 80, 128, 192, 256):
                    tile = find_tile(
                        tiles,
                        query_bytes=query_bytes,
                        is_quantised=is_quantised,
                        head_dim=head_dim,
                    )
                    assert tile.query_bytes == query_bytes and tile.max_head_dim >= head_dim
                    sides = (tile.block_m, tile.block_k, tile.piece)
                    assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
    assert load_tuning("a GPU that nobody has heard of") == TUNING


def refusal(case: Case, num_pages: int | None = None) -> str:
    """What tracing for the device says."""
    shape = list(case.pages.rows_rkph.shape)
    if num_pages is not None:
        shape[0] = num_pages * 2 * case.layers[0]
    pages = KVPages(
        jax.ShapeDtypeStruct(tuple(shape), case.pages.rows_rkph.dtype),  # pyright: ignore
        None if case.quantised is None else jax.ShapeDtypeStruct(tuple(shape[:3]), jnp.float32),  # pyright: ignore
    )

    def attend(q_tqh, pages, rows):
        return triton.ragged_paged_attention(q_tqh, pages, rows, case.spec)

    with pytest.raises(NotImplementedError) as caught:
        jax.eval_shape(attend, jnp.asarray(case.q_tqh), pages, case.rows)
    return str(caught.value)


def test_refusals_tell_their_reason():
    decode = Case(decode_lens=(20,))
    assert "head dim 20" in refusal(replace(decode, head_dim=20))
    assert "head dim 640" in refusal(replace(decode, head_dim=640))
    assert "2**31" in refusal(decode, num_pages=2**26)
    # 3 GiB in 8 bits: 2 KV heads, 16 tokens, 128 numbers, keys and values
    assert "32 signed bits" in refusal(replace(decode, quantised="int8"), num_pages=3 << 17)


def flat(jaxpr: Any) -> Iterator[Any]:
    """The operations of a program, those of the functions that it calls in their place."""
    for operation in jaxpr.eqns:
        if operation.primitive.name in ("jit", "pjit"):
            yield from flat(operation.params["jaxpr"].jaxpr)
        else:
            yield operation


def test_one_launch_writes_keys_values_and_scales():
    case = Case(quantised="int8", decode_lens=(20,))
    kv_tkh = jnp.zeros((4, 2, 128), jnp.float32)
    index_t = jnp.zeros(4, jnp.int32)
    pages = jax.tree.map(jnp.asarray, case.pages)

    def write(pages, k_tkh, v_tkh, page_t, offset_t):
        return triton.write_kv(pages, k_tkh, v_tkh, page_t, offset_t, case.spec)

    program = jax.make_jaxpr(write)(pages, kv_tkh, kv_tkh, index_t, index_t)
    operations = list(flat(program.jaxpr))
    launches = [e for e in operations if e.primitive.name == "pallas_call"]
    # The last one makes an array of the layer's number, a constant.
    free = {"pallas_call", "reshape", "broadcast_in_dim"}
    others = {e.primitive.name for e in operations} - free
    assert len(launches) == 1 and not others, others
    assert len(launches[0].params["input_output_aliases"]) == 2


def run_ptx(asm: str, word: int) -> list[int]:
    """Words that inline assembly makes of one: the four instructions of int8's conversion."""
    registers = {"$2": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(name: str) -> np.ndarray:
        return np.array([value(name)], np.uint32).view(np.float16)

    for line in re.findall(r"^([a-z0-9.]+) (.*);$", asm, re.M):
        operation, operands = line[0], [x.strip() for x in line[1].split(",")]
        match operation:
            case ".reg":
                continue
            case "mov.b32":
                result = value(operands[1])
            case "xor.b32":
                result = value(operands[1]) ^ value(operands[2])
            case "prmt.b32":
                whole = (value(operands[1]) | value(operands[2]) << 32).to_bytes(8, "little")
                picks = [value(operands[3]) >> 4 * i & 15 for i in range(4)]
                result = int.from_bytes(bytes(whole[i] for i in picks), "little")
            case "sub.f16x2":
                difference = halves(operands[1]) - halves(operands[2])
                [result] = difference.astype(np.float16).view(np.uint32).tolist()
            case _:
                raise AssertionError(f"no meaning is known for {operation}")
        registers[operands[0]] = result
    return [registers["$0"], registers["$1"]]


def test_int8_becomes_float16_by_its_bits():
    numbers = np.arange(-128, 128).astype(np.int8)
    for four in numbers.reshape(-1, 4):
        words = run_ptx(triton_ptx.WIDEN_INT8, int(four.view(np.uint32)[0]))
        found = np.array(words, np.uint32).view(np.float16)
        np.testing.assert_array_equal(found, four.astype(np.float16))


def test_named_instructions_mean_what_jnp_means_when_interpreted():
    def kernel(x_ref, small_ref, out_ref):
        x = x_ref[:]
        out_ref[0] = triton_ptx.exp2(x, interpret=True)
        two, one = jnp.full_like(x, 2.0), jnp.full_like(x, 1.0)
        out_ref[1] = triton_ptx.exp2_of_difference(x, two, one, interpret=True)
        out_ref[2] = triton_ptx.reciprocal(x, interpret=True)
        out_ref[3] = triton_ptx.nearest(x, interpret=True)
        out_ref[4] = triton_ptx.widened(small_ref[:], interpret=True).astype(jnp.float32)

    x = np.array([0.5, -1.5, 2.5, 7.25], np.float32)
    small = np.array([-128, -1, 5, 127], np.int8)
    found = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((5, 4), jnp.float32),
        compiler_params=pltriton.CompilerParams(),
        interpret=True,
    )(jnp.asarray(x), jnp.asarray(small))
    expected = [np.exp2(x), np.exp2(2 * x - 1), 1 / x, np.rint(x), small.astype(np.float32)]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)


def test_scores_are_masked_after_the_cap():
    """A key beyond the window must not come back as a score of -cap."""
    case = Case(decode_lens=(300,), window=1, soft_cap=1e-3, head_dim=64)
    check_attention(bind(triton, interpret=True), case)
    assert isinstance(case.spec, AttentionSpec)
