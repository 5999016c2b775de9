"""What is compiled: every operation of every kernel backend, in the shapes of `bench`.

Each job says what it must move and compute, how large the pool is that it must not copy, and
whether the backend may refuse it. Knows nothing of how programs are compiled or judged.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from bench.attention_workloads import MAIN, MOVES, OTHERS, PAGES_MOVED, Workload
from jaxserve.pallas_kernels.paged_attention import page_moves
from jaxserve.pallas_kernels.paged_attention.specs import KVPages, RaggedRows

BACKENDS = {
    "h200": ("mosaic_gpu", "triton", "reference"),
    "v5e": ("tpu",),
    "v6e": ("tpu",),
}
"""What is compiled for each kind of device."""

OF_REFERENCE = ("decode 64x8192 P64", "prefill 8192 P64", "mixed P64", "decode 64x8192 int8 P64")
"""Attention that the plain XLA backend is compiled for; it takes what kernels refuse."""

SHARED = "xla"
"""The backend of moves of pages that have no kernel: the same for all backends."""

POOL_BYTES = {"h200": 96 << 30, "v5e": 4 << 30, "v6e": 8 << 30}
"""The largest pool, well within the device's memory."""


@dataclass(frozen=True)
class Job:
    """One function to compile.

    Attributes:
        args: hold things with a shape and a dtype.
        donate: which of `args` are pages that it changes in place.
        pool: the pages among `args`.
        bytes_moved, flops: the least that it can do with.
        may_refuse: NotImplementedError is an answer.
    """

    name: str
    backend: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    pool: Any
    bytes_moved: int
    flops: int = 0
    donate: tuple[int, ...] = ()
    may_refuse: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def jobs_for(target: str, backends: Collection[str]) -> Iterator[Job]:
    """All jobs of a device for those of its backends that are named."""
    for name in BACKENDS[target]:
        if name not in backends:
            continue
        backend = import_module(f"jaxserve.pallas_kernels.paged_attention.{name}")
        for work in MAIN:
            if name != "reference" or str(work) in OF_REFERENCE:
                yield _attention(name, backend, work.within(POOL_BYTES[target]), may_refuse=False)
        for work in OTHERS if name != "reference" else ():
            yield _attention(name, backend, work.within(POOL_BYTES[target]), may_refuse=True)
        for work in MOVES:
            work = work.within(POOL_BYTES[target])
            yield _write(name, backend, work)
            if work.num_tokens == 64:
                is_shared = backend.gather_pages is page_moves.gather_pages
                if not is_shared:
                    yield from _page_moves(name, backend, work)
                elif name == BACKENDS[target][0]:
                    yield from _page_moves(SHARED, backend, work)


def _attention(name: str, backend: Any, work: Workload, *, may_refuse: bool) -> Job:
    num_q = work.heads[0]

    def attend(q_tqh: jax.Array, pages: KVPages, rows: RaggedRows, sinks_q: jax.Array | None):
        return backend.ragged_paged_attention(q_tqh, pages, rows, work.spec, sinks_q=sinks_q)

    pages = work.abstract_pages()
    sinks_q = jax.ShapeDtypeStruct((num_q,), jnp.float32) if work.has_sinks else None
    return Job(
        name=f"attention {work}",
        backend=name,
        function=attend,
        args=(work.abstract_tokens(num_q), pages, work.abstract_rows(), sinks_q),
        pool=pages,
        bytes_moved=work.bytes_moved,
        flops=work.flops,
        may_refuse=may_refuse,
        facts=_facts(work),
    )


def _write(name: str, backend: Any, work: Workload) -> Job:
    """The write of new tokens."""
    pages, num_kv = work.abstract_pages(), work.heads[1]
    kv_tkh = work.abstract_tokens(num_kv)
    index_t = jax.ShapeDtypeStruct((work.num_tokens,), jnp.int32)

    def write(pages: KVPages, k_tkh: Any, v_tkh: Any, page_t: Any, offset_t: Any) -> KVPages:
        return backend.write_kv(pages, k_tkh, v_tkh, page_t, offset_t, work.spec)

    new_bytes = 2 * work.num_tokens * num_kv * work.head_dim * jnp.dtype(work.dtype).itemsize
    return Job(
        name=f"write_kv {work}",
        backend=name,
        function=write,
        args=(pages, kv_tkh, kv_tkh, index_t, index_t),
        pool=pages,
        bytes_moved=new_bytes + work.num_tokens * work.token_bytes,
        donate=(0,),
        facts=_facts(work),
    )


def _page_moves(name: str, backend: Any, work: Workload) -> Iterator[Job]:
    """Gather and scatter of whole pages."""
    pages = work.abstract_pages()
    shape = (work.num_pages, work.num_layers, 2, *pages.rows_rkph.shape[1:])
    pool = jax.ShapeDtypeStruct(shape, work.kv_dtype)
    moved = jax.ShapeDtypeStruct((PAGES_MOVED, *shape[1:]), work.kv_dtype)
    ids = jax.ShapeDtypeStruct((PAGES_MOVED,), jnp.int32)
    moved_bytes = 2 * moved.size * moved.dtype.itemsize
    for operation, args in (("gather_pages", (pool, ids)), ("scatter_pages", (pool, ids, moved))):
        yield Job(
            name=f"{operation} {PAGES_MOVED}{str(work).removeprefix('64 tokens')}",
            backend=name,
            function=getattr(backend, operation),
            args=args,
            pool=pool,
            bytes_moved=moved_bytes,
            donate=(0,) if operation == "scatter_pages" else (),
            facts=_facts(work),
        )


def _facts(work: Workload) -> dict[str, Any]:
    """The shape, for the table."""
    return {
        "heads": list(work.heads),
        "head_dim": work.head_dim,
        "page_size": work.page_size,
        "dtype": work.dtype,
        "kv_dtype": work.kv_dtype.name,
        "window": work.window,
        "soft_cap": work.soft_cap,
        "sinks": work.has_sinks,
    }
