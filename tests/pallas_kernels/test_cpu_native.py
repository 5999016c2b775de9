"""The C++ CPU kernels against float64, for every instruction set that this machine has."""

import ctypes
import hashlib
import logging
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import layers
from jaxserve.models.config import RopeSpec
from jaxserve.pallas_kernels.cpu import build, ops
from jaxserve.pallas_kernels.paged_attention import api, cpu_native, page_moves
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.checks import check_attention
from tests.pallas_kernels.test_reference import BATCHES, FEATURES, small_case

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
DEPTHS = (1, 7, 16, 33, 200)
OUTPUTS = (1, 3, 4, 70)
NATIVE_FEATURES = ("plain", "window", "soft cap", "window of one chunk and soft cap")


@pytest.fixture(params=build.INSTRUCTIONS[1:])
def instructions(request):
    """Each instruction set in turn; the best one again afterwards."""
    native = build.load()
    if not native.available:
        pytest.skip(f"no native CPU kernels: {native.detail}")
    library = ctypes.CDLL(str(build.library_path()))
    if build.use_instructions(library, build.INSTRUCTIONS.index(request.param)) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    build.use_instructions(library)


@pytest.fixture
def best():
    native = build.load()
    if not native.available:
        pytest.skip(f"no native CPU kernels: {native.detail}")


def operands(dtype):
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.standard_normal((17, d)), dtype) for d in DEPTHS]
    ws = [tuple(jnp.asarray(rng.standard_normal((o, d)), dtype) for o in OUTPUTS) for d in DEPTHS]
    return xs, ws


@partial(jax.jit, static_argnums=2)
def all_products(xs, ws, out_dtype):
    return [ops.products(x, w, jnp.dtype(out_dtype)) for x, w in zip(xs, ws, strict=True)]


# Relative to the sum of magnitudes: float32 summation, and what rounding the result to 8 bits adds.
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "tolerance"),
    [("float32", "float32", 5e-7), ("bfloat16", "float32", 5e-7), ("bfloat16", "bfloat16", 4e-3)],
)
def test_products_match_float64_and_do_not_depend_on_the_batch(
    instructions, dtype, out_dtype, tolerance
):
    xs, ws = operands(dtype)
    whole = [[np.asarray(y, np.float32) for y in ys] for ys in all_products(xs, ws, out_dtype)]
    for x, w_of_x, y_of_x in zip(xs, ws, whole, strict=True):
        for w, y in zip(w_of_x, y_of_x, strict=True):
            x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
            error = np.abs(y - x64 @ w64.T) / (np.abs(x64) @ np.abs(w64).T)
            assert error.max() <= tolerance
    for num_rows in range(1, 17):
        for begin in (0, 17 - num_rows):
            part = [x[begin : begin + num_rows] for x in xs]
            for ys, y_of_x in zip(all_products(part, ws, out_dtype), whole, strict=True):
                for y, expected in zip(ys, y_of_x, strict=True):
                    y = np.asarray(y, np.float32)
                    np.testing.assert_array_equal(y, expected[begin : begin + num_rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_cut_into_parts_keep_the_bits_of_a_row_alone(instructions, dtype):
    rng = np.random.default_rng(2)
    for depth in (1024, 1025, 2078, 4102):  # one part, two or more, the last of a lane or more
        x, w = (jnp.asarray(rng.standard_normal((n, depth)), dtype) for n in (64, 9))
        (alone,) = zip(*(ops.products(x[i : i + 1], (w,), x.dtype) for i in range(64)), strict=True)
        expected = np.concatenate([np.asarray(y, np.float32) for y in alone])
        for num_rows in (8, 13, 24, 39, 64):
            (y,) = ops.products(x[:num_rows], (w,), x.dtype)
            np.testing.assert_array_equal(np.asarray(y, np.float32), expected[:num_rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("depth", "num_outputs"), [(6, 5), (64, 130), (77, 64), (4102, 40)])
def test_products_of_many_rows_match_float64(instructions, depth, num_outputs, dtype):
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal((n, depth)), dtype) for n in (700, num_outputs))
    y, same = (np.asarray(y) for y in ops.products(x, (w, w), jnp.dtype(jnp.float32)))
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    assert (np.abs(y - x64 @ w64.T) / (np.abs(x64) @ np.abs(w64).T)).max() <= 5e-7
    np.testing.assert_array_equal(y, same)
    for num_rows in (65, 67, 70, 129):
        (part,) = ops.products(x[-num_rows:], (w,), jnp.dtype(jnp.float32))
        np.testing.assert_array_equal(np.asarray(part), y[-num_rows:])
    (half,) = ops.products(x, (w,), x.dtype)
    np.testing.assert_array_equal(np.asarray(half), np.asarray(jnp.asarray(y).astype(dtype)))


@pytest.mark.parametrize("depth", [40, 4102])  # the latter in parts, kept in between
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 8e-3)])
def test_the_gated_hidden_layer_matches_float64(instructions, dtype, tolerance, activation, depth):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((130, depth)) * 2 * (40 / depth) ** 0.5, dtype)
    up, gate = (jnp.asarray(rng.standard_normal((70, depth)), dtype) for _ in range(2))
    for num_rows in (1, 5, 130):
        rows = x[:num_rows]
        y = np.asarray(ops.gated(rows, up, gate, is_gelu=activation == "gelu_tanh"), np.float32)
        u, g = (np.asarray(p, np.float64) for p in ops.products(rows, (up, gate), x.dtype))
        # Both are g * sigmoid(z), since tanh(z) = 2 * sigmoid(2 * z) - 1: exact in the tails, too.
        z = g if activation == "silu" else (8 / np.pi) ** 0.5 * (g + 0.044715 * g**3)
        expected = g * u * np.exp(-np.logaddexp(0, -z))
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("num_pairs", "head_dim"), [(3, 6), (16, 32), (20, 64), (64, 128)])
def test_rotation_matches_its_formula(instructions, num_pairs, head_dim):
    spec = RopeSpec(tuple(0.5**i for i in range(num_pairs)))
    rng = np.random.default_rng(3)
    table = layers.rotation(spec, jnp.arange(100, dtype=jnp.int32))
    xs = tuple(jnp.asarray(rng.standard_normal((100, n, head_dim)), jnp.float32) for n in (3, 1))
    for y, expected in zip(ops.rotate(xs, table), layers.rotate(xs, table, spec), strict=True):
        np.testing.assert_allclose(np.asarray(y), np.asarray(expected), atol=1e-6)
    halves = tuple(x.astype(jnp.bfloat16) for x in xs)
    for y, expected in zip(
        ops.rotate(halves, table), layers.rotate(halves, table, spec), strict=True
    ):
        np.testing.assert_allclose(
            *(np.asarray(v, np.float32) for v in (y, expected)), rtol=8e-3, atol=1e-5
        )


def test_what_the_kernel_does_not_do_goes_to_the_fallback(best):
    calls = []

    def fallback(x_td, weights, out_dtype):
        calls.append(x_td.shape[0])
        return tuple(jnp.zeros((x_td.shape[0], w.shape[0]), out_dtype) for w in weights)

    products = ops.products_or(fallback)
    assert products is ops.products_or(fallback)  # a static argument: another would trace again
    w = jnp.ones((3, 8), jnp.float16)
    products(w[:2], (w,), jnp.dtype(jnp.float16))
    many, w = jnp.ones((ops.MAX_ROWS + 1, 7), jnp.bfloat16), jnp.ones((3, 7), jnp.bfloat16)
    products(many, (w,), jnp.dtype(jnp.float32))
    assert calls == [2, ops.MAX_ROWS + 1]
    (y,) = products(many[1:], (w,), jnp.dtype(jnp.float32))
    assert calls[2:] == [] and (np.asarray(y) == 7).all()


@pytest.mark.parametrize(
    ("instructions", "dtype", "shape", "is_native"),
    [
        ("avx2", "float32", (64, 8), False),
        ("avx2", "bfloat16", (64, 8), False),
        ("avx512", "float32", (64, 7), True),
        ("avx512", "bfloat16", (64, 8), True),
        ("avx512", "bfloat16", (64, 7), False),  # bfloat16 is packed in pairs
        ("avx512", "bfloat16", (63, 8), False),  # most of a panel would be padding
        ("avx512 beside AMX", "bfloat16", (64, 8), False),
        ("avx512_bf16", "bfloat16", (64, 8), True),
        ("avx512_bf16", "float32", (64, 8), False),
    ],
)
def test_many_rows_go_to_what_is_faster_on_the_machine(
    monkeypatch, instructions, dtype, shape, is_native
):
    monkeypatch.setattr(build, "load", lambda: build.Native(True, instructions))
    w = jnp.ones(shape, dtype)
    assert ops._is_better(jnp.ones((ops.MAX_ROWS + 1, shape[1]), dtype), (w,)) == is_native
    assert ops._is_better(jnp.ones((ops.MAX_ROWS, shape[1]), dtype), (w,))


@pytest.mark.parametrize("num_rows", [4, 70])
def test_results_are_rounded_to_bfloat16_as_jax_rounds(instructions, num_rows):
    """Products with one: what is rounded is known to the last bit, ties and infinity too."""
    high_bits = np.array([0x3F800000, 0x3F810000, 0x3F800000, 0x7F7F0000, 0x7F800000, 0xFF800000])
    high = high_bits.astype(np.uint32).view(np.float32)
    low = np.array([2**-8, 2**-8, 2**-8 + 2**-15, 2.0**119, 0, 0], np.float32)
    w = jnp.asarray(np.stack([high, low], 1)[np.arange(66) % 6]).astype(jnp.bfloat16)
    x = jnp.ones((num_rows, 2), jnp.bfloat16)
    (rounded,) = ops.products(x, (w,), jnp.dtype(jnp.bfloat16))
    (exact,) = ops.products(x, (w,), jnp.dtype(jnp.float32))
    expected = np.asarray(exact.astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), expected)


@partial(jax.jit, static_argnums=3)
def compiled(q, pages, rows, spec):
    spec = replace(spec, needs_lse=False)
    return cpu_native.ragged_paged_attention(q, pages, rows, spec).out_tqh


def attend(case: Case, dtype: str = "float32") -> np.ndarray:
    q, pool, rows = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages.rows_rkph, case.rows))
    if dtype == "bfloat16":
        pool = page_moves.to_storage(pool.astype(dtype), np.dtype(np.uint16))
    out = np.asarray(compiled(q.astype(dtype), KVPages(pool), rows, case.spec), np.float32)
    assert np.isfinite(out).all()
    return out[: case.num_tokens]


@pytest.mark.parametrize("feature", NATIVE_FEATURES)
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_matches_float64(instructions, batch: str, feature: str):
    case = small_case(batch, feature)
    expected = case.expected.out_tqh
    np.testing.assert_allclose(attend(case), expected, atol=2e-6)
    np.testing.assert_allclose(attend(case, "bfloat16"), expected, atol=0.04)


@pytest.mark.parametrize("feature", FEATURES)
def test_what_the_attention_kernel_leaves_out_is_done_by_the_reference(best, feature: str):
    check_attention(cpu_native, small_case("mixed and padded", feature))
    check_attention(cpu_native, small_case("mixed", feature, "float16"))


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
@pytest.mark.parametrize("heads", [(1, 1, 8), (14, 2, 72), (5, 1, 128)])
def test_any_page_size_and_grouping(instructions, page_size: int, heads: tuple[int, int, int]):
    num_q, num_kv, head_dim = heads
    case = Case(
        heads=(num_q, num_kv),
        head_dim=head_dim,
        page_size=page_size,
        layers=(2, 0),
        decode_lens=(3, 700, 129),
        scale=head_dim**-0.5,
    )
    np.testing.assert_allclose(attend(case), case.expected.out_tqh, atol=2e-6)


def decode_case(dtype: str):
    """A step of long and short rows, as arguments of `decode`."""
    case = Case(
        heads=(4, 2),
        head_dim=32,
        dtype=dtype,
        window=900,
        decode_lens=(1500, 1, 300, 257, 1040),
    )
    q, pool, rows = jax.tree.map(jnp.asarray, (case.q_tqh, case.pages.rows_rkph, case.rows))
    if dtype == "bfloat16":
        pool = page_moves.to_storage(pool, np.dtype(np.uint16))
    return [q, pool, rows.page_table, rows.kv_len]


def decode(q, pool, table, lens):
    num_rows = q.shape[0]
    count = jnp.ones(num_rows, jnp.int32)
    start = jnp.arange(num_rows, dtype=jnp.int32)
    rows = RaggedRows(
        num_decodes=jnp.int32(num_rows),
        num_rows=jnp.int32(num_rows),
        q_start=start,
        q_len=count,
        kv_len=lens,
        page_table=table,
        has_prefills=False,
    )
    spec = AttentionSpec(scale=0.2, num_layers=1, layer=0, window=900)
    return np.asarray(ops.attention(q, pool, rows, spec), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_a_row_is_the_same_alone_and_in_a_batch(best, dtype):
    q, pool, table, lens = decode_case(dtype)
    whole = decode(q, pool, table, lens)
    for row in range(q.shape[0]):
        one = slice(row, row + 1)
        alone = decode(q[one], pool, table[one], lens[one])
        np.testing.assert_array_equal(alone[0], whole[row])


def digest() -> str:
    """Of the bits of some products and of one attention."""
    build.load()
    found = hashlib.sha256()
    for dtype in ("float32", "bfloat16"):
        rng = np.random.default_rng(0)
        x, w = (jnp.asarray(rng.standard_normal((n, 1000)), dtype) for n in (5, 2000))
        found.update(np.asarray(ops.products(x, (w, w[:77]), x.dtype)[0]).tobytes())
        found.update(decode(*decode_case(dtype)).tobytes())
    return found.hexdigest()


def test_one_thread_gives_the_same_bits_as_several(best):
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tests.pallas_kernels.test_cpu_native import digest; print(digest())"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == digest(), run.stderr


@pytest.fixture
def fresh_load():
    """`load` forgets, before and after: what it finds may differ from what the process has."""
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def test_without_a_compiler_the_engine_serves_on_xla(fresh_load, monkeypatch, caplog):
    from tests.parity.harness import drain, greedy, make_engine, tokens

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.INFO, logger="jaxserve"):
        engine = make_engine(TINY / "llama31-v0")
    said = [r.getMessage() for r in caplog.records if "native" in r.getMessage()]
    assert any("no C++ compiler" in message for message in said)
    expected = np.load(TINY / "llama31-v0" / "expected.npz")
    try:
        engine.add(greedy("a", expected["input_ids"], 4))
        assert tokens(drain(engine)["a"]) == expected["greedy"][:4].tolist()
    finally:
        engine.close()
    with pytest.raises(ValueError, match="cpu_native"):
        api.get_backend("cpu_native", api.this_machine(native_cpu=False))


def test_a_compiler_that_fails_is_a_reason_and_not_an_error(fresh_load, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'cannot do that' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert build.load() == build.Native(False, "c++ failed: cannot do that")


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is built elsewhere")
def test_a_cache_folder_that_others_can_write_to_is_refused(fresh_load, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "jaxserve" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    native = build.load()
    assert not native.available and not os.listdir(folder)
