"""Part `kernels`: attention, the write of new tokens, and moves of pages, each beside its limit.

The jobs are those that `make kernels-aot` compiles, under the same names, so that a table can join
what was counted there and what was timed here (`docs/make_performance.py`). Each result says how
far it is from the plain XLA reference on the same arrays.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from bench.attention_workloads import MAIN, MOVES, PAGES_MOVED, Workload
from bench.gpu.inputs import Inputs, make_inputs, random_array
from bench.gpu.report import Context
from bench.gpu.timing import time_loop
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.api import Bound, bind
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tuning import device_kind, load_tuning
from jaxserve.pallas_kernels.paged_attention.specs import KVPages

PACKAGE = "jaxserve.pallas_kernels.paged_attention"
BACKENDS = ("mosaic_gpu", "triton")
MAX_POOL_BYTES = 12 << 30

_SMALL: Any = {"heads": (2, 1), "head_dim": 64, "page_size": 16, "num_layers": 2}
TINY = (
    Workload("tiny decode", decodes=(40,), **_SMALL),
    Workload("tiny mixed", decodes=(40,), prefills=((9, 20),), **_SMALL),
)
TINY_PIECES = {"decode_blocks": 1, "prefill_programs": 1}
"""Of a Mosaic launch that is interpreted, which takes a second for each block."""


def run(context: Context) -> None:
    for work in _attention_works(context):
        # The interpreter takes its time for Mosaic: there, one job shows that it works.
        is_slow = context.is_tiny and work is not TINY[0]
        time_attention(context, work, BACKENDS[1:] if is_slow else BACKENDS)
    for work in TINY[:1] if context.is_tiny else MOVES:
        _time_moves(context, work)


def load(name: str, *, is_tiny: bool, **options: Any) -> Bound:
    """A backend; interpreted where the run is tiny."""
    module: Any = import_module(f"{PACKAGE}.{name}")
    if is_tiny:
        options["interpret"] = True
        if name == "mosaic_gpu":
            tuning = options.get("tuning") or load_tuning(device_kind())
            options["tuning"] = replace(tuning, **TINY_PIECES)
    return bind(module, **options)


def _attention_works(context: Context) -> Iterator[Workload]:
    if context.is_tiny:
        yield from TINY
        return
    # What the project is judged by comes first.
    first = [work for work in MAIN if work.name in ("decode 64x8192", "prefill 8192")]
    yield from first
    yield from (work for work in MAIN if work not in first)


def time_attention(
    context: Context, work: Workload, backends: "tuple[str, ...]" = BACKENDS
) -> None:
    """A line for each backend."""
    about = {"job": f"attention {work}", **facts(work)}
    inputs: Inputs | None = None
    with context.attempt(about | {"backend": "inputs"}):
        inputs = make_inputs(work, MAX_POOL_BYTES)
    if inputs is None:
        return
    expected: Any = None
    with context.attempt(about | {"backend": "reference"}):
        expected = jax.block_until_ready(_attend(reference, inputs))
    for name in backends:
        with context.attempt(about | {"backend": name}):
            backend = load(name, is_tiny=context.is_tiny)
            error = None
            if expected is not None:
                error = relative_error(_attend(backend, inputs), expected)
            timing = time_attention_loop(context, backend, inputs)
            context.line(
                **about,
                backend=name,
                error=error,
                **beside_limit(context, timing.median_s, work.bytes_moved, work.flops),
                **timing.facts(),
            )


def time_attention_loop(context: Context, backend: Any, inputs: Inputs) -> Any:
    """Time calls that follow each other, each with other pages."""
    work = inputs.work

    def body(index: jax.Array, _: jax.Array, operands: Any) -> jax.Array:
        q_tqh, pages, rows, sinks_q = operands
        rows = inputs.rows_of(rows, index)
        return backend.ragged_paged_attention(
            q_tqh, pages, rows, work.spec, sinks_q=sinks_q
        ).out_tqh

    operands = (inputs.q_tqh, inputs.pages, inputs.rows, inputs.sinks_q)
    expected_s = 1.5 * context.limits.seconds(work.bytes_moved, work.flops) or 1e-3
    return time_loop(
        body,
        jnp.zeros_like(inputs.q_tqh),
        operands,
        expected_s=expected_s,
        is_tiny=context.is_tiny,
    )


def _attend(backend: Any, inputs: Inputs) -> jax.Array:
    attend = partial(backend.ragged_paged_attention, spec=inputs.work.spec)
    run = jax.jit(lambda q, pages, rows, sinks: attend(q, pages, rows, sinks_q=sinks).out_tqh)
    return run(inputs.q_tqh, inputs.pages, inputs.rows, inputs.sinks_q)


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    """Norm of the difference over the norm; 2**-8 is what rounding to bfloat16 may cost."""

    @jax.jit
    def norms(found: jax.Array, expected: jax.Array) -> jax.Array:
        a, b = found.astype(jnp.float32), expected.astype(jnp.float32)
        return jnp.sqrt(jnp.sum((a - b) ** 2)) / jnp.sqrt(jnp.sum(b**2))

    return float(f"{float(norms(found, expected)):.3g}")


def _time_moves(context: Context, work: Workload) -> None:
    """The write of a step's tokens by each backend, and gather and scatter, which they share."""
    whole, inputs = work, make_inputs(work, MAX_POOL_BYTES)
    work = inputs.work
    about = facts(work)
    num_kv, num_tokens = work.heads[1], work.num_tokens
    abstract = work.abstract_tokens(num_kv)
    kv_tkh = jax.random.normal(jax.random.key(1), abstract.shape, abstract.dtype)
    some_pages = jax.random.permutation(jax.random.key(2), work.num_pages).astype(jnp.int32)
    page_t = some_pages[jnp.arange(num_tokens) // work.page_size]
    offset_t = jnp.arange(num_tokens, dtype=jnp.int32) % work.page_size
    pages = inputs.pages
    new_bytes = 2 * num_tokens * num_kv * work.head_dim * kv_tkh.dtype.itemsize
    written = new_bytes + num_tokens * work.token_bytes
    for name in ("mosaic_gpu", "reference"):
        backend = load(name, is_tiny=context.is_tiny)

        def write(index: jax.Array, pages: KVPages, operands: Any, backend: Any = backend) -> Any:
            kv_tkh, page_t, offset_t = operands
            page_t = (page_t + index.astype(jnp.int32)) % work.num_pages
            return backend.write_kv(pages, kv_tkh, kv_tkh, page_t, offset_t, work.spec)

        job = {"job": f"write_kv {work}", "backend": name, **about}
        with context.attempt(job):
            timing = time_loop(
                write,
                jax.tree.map(jnp.copy, pages),
                (kv_tkh, page_t, offset_t),
                expected_s=5e-6,
                is_tiny=context.is_tiny,
            )
            found = beside_limit(context, timing.median_s, written)
            context.line(**job, **found, **timing.facts())
    if num_tokens == 64 or context.is_tiny:
        _time_page_moves(context, whole)


def _time_page_moves(context: Context, work: Workload) -> None:
    """On pages of all layers, as they are moved between tiers."""
    count = 2 if context.is_tiny else PAGES_MOVED
    num_pages = 8 * count
    num_kv, width = work.heads[1], work.head_dim
    shape = (num_pages, work.num_layers, 2, num_kv, work.page_size, width)
    pool = random_array(jax.random.key(4), jax.ShapeDtypeStruct(shape, work.kv_dtype))
    order = jax.random.permutation(jax.random.key(3), num_pages)
    ids = order[:count].astype(jnp.int32)
    moved = jnp.copy(pool[:count])
    num_bytes = 2 * moved.size * moved.dtype.itemsize
    label = str(work).removeprefix("64 tokens")

    def places(ids: jax.Array, index: jax.Array) -> jax.Array:
        return (ids + index.astype(jnp.int32)) % num_pages

    def gather(index: jax.Array, carry: jax.Array, operands: Any) -> jax.Array:
        pool, ids = operands
        return reference.gather_pages(pool, places(ids, index))

    def scatter(index: jax.Array, pool: jax.Array, operands: Any) -> jax.Array:
        ids, moved = operands
        return reference.scatter_pages(pool, places(ids, index), moved)

    measures = {
        "gather_pages": (gather, lambda: jnp.zeros_like(moved), (pool, ids)),
        "scatter_pages": (scatter, lambda: jnp.copy(pool), (ids, moved)),
    }
    for operation, (body, carry, operands) in measures.items():
        job = {"job": f"{operation} {count}{label}", "backend": "xla", **facts(work)}
        with context.attempt(job):
            timing = time_loop(
                body, carry(), operands, expected_s=num_bytes / 2e12, is_tiny=context.is_tiny
            )
            found = beside_limit(context, timing.median_s, num_bytes)
            context.line(**job, **found, **timing.facts())


def beside_limit(
    context: Context, seconds: float, num_bytes: int, flops: int = 0
) -> dict[str, Any]:
    """What was moved and computed, how fast, and the fraction of the machine's measured limit."""
    least_s = context.limits.seconds(num_bytes, flops)
    return {
        "bytes": num_bytes,
        "flops": flops,
        "limit_us": round(least_s * 1e6, 2) if least_s else None,
        "fraction": round(least_s / seconds, 4) if least_s else None,
        "gb_s": round(num_bytes / seconds / 1e9, 1),
        "tflop_s": round(flops / seconds / 1e12, 1),
    }


def facts(work: Workload) -> dict[str, Any]:
    return {
        "heads": list(work.heads),
        "head_dim": work.head_dim,
        "page_size": work.page_size,
        "dtype": work.dtype,
        "kv_dtype": work.kv_dtype.name,
    }
