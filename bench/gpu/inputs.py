"""Arrays for a `Workload`: random pages, and page tables that change from one call to the next.

A call that reads the pages of the call before would find them in the L2 cache; so each of several
sets of pages is used in turn, until they are larger than the cache together.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.attention_workloads import Workload
from jaxserve.pallas_kernels.paged_attention.specs import KVPages, RaggedRows

CACHE_BYTES = 256 << 20
"""Several times the largest L2 cache."""

MAX_SETS = 64
MAX_LAYERS = 2
"""Of the pool: pages of a layer then do not lie side by side, as in a real one."""


@dataclass(frozen=True)
class Inputs:
    """What a backend takes; `rows` point to the first set of pages."""

    work: Workload
    q_tqh: jax.Array
    pages: KVPages
    rows: RaggedRows
    sinks_q: jax.Array | None
    num_sets: int
    pages_of_set: int

    def rows_of(self, rows: RaggedRows, index: jax.Array) -> RaggedRows:
        """The rows with the pages of another set, by the index of a call."""
        shift = (index % self.num_sets) * self.pages_of_set
        return replace(rows, page_table=rows.page_table + shift.astype(jnp.int32))


def make_inputs(work: Workload, max_pool_bytes: int, seed: int = 0) -> Inputs:
    """Random arrays on the device; fewer layers, if the pool would not fit otherwise."""
    work = replace(work, spare_pages=0)
    layer_bytes = work.num_pages * work.page_size * work.token_bytes
    num_layers = max(1, min(work.num_layers, MAX_LAYERS, max_pool_bytes // layer_bytes))
    num_sets = max(1, min(MAX_SETS, CACHE_BYTES // layer_bytes, max_pool_bytes // layer_bytes))
    pages_of_set = work.num_pages
    work = replace(work, num_layers=num_layers, spare_pages=(num_sets - 1) * pages_of_set)
    key = iter(jax.random.split(jax.random.key(seed), 4))
    abstract = work.abstract_pages()
    scales = abstract.scales_rkp
    pages = KVPages(
        random_array(next(key), abstract.rows_rkph),
        None if scales is None else jax.random.uniform(next(key), scales.shape, maxval=0.02),
    )
    num_q = work.heads[0]
    sinks_q = jax.random.normal(next(key), (num_q,)) if work.has_sinks else None
    q_tqh = random_array(next(key), work.abstract_tokens(num_q))
    rows = make_rows(work, pages_of_set, seed)
    return Inputs(work, q_tqh, pages, rows, sinks_q, num_sets, pages_of_set)


def random_array(key: jax.Array, like: Any) -> jax.Array:
    def make(key: jax.Array) -> jax.Array:
        if like.dtype == jnp.int8:
            return jax.random.bits(key, like.shape, jnp.uint8).astype(jnp.int8)
        if like.dtype == jnp.float8_e4m3fn:
            # Bits of all numbers but the largest: no NaN, and no conversion of a whole pool.
            bits = jax.random.bits(key, like.shape, jnp.uint8) & jnp.uint8(0xBF)
            return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
        return jax.random.normal(key, like.shape, like.dtype)

    return jax.jit(make)(key)


def make_rows(work: Workload, num_pages: int, seed: int) -> RaggedRows:
    """The step's rows, their pages in random order."""
    q_len = np.array([q for q, _ in work.rows], np.int32)
    kv_len = np.array([kv for _, kv in work.rows], np.int32)
    width = work.abstract_rows().page_table.shape[1]
    order = np.random.default_rng(seed).permutation(num_pages)
    table, taken = np.zeros((len(work.rows), width), np.int32), 0
    for row, count in enumerate(-(-kv_len // work.page_size)):
        table[row, :count] = order[taken : taken + count]
        taken += count
    values: Any = jax.tree.map(
        jnp.asarray,
        {
            "num_decodes": np.int32(len(work.decodes)),
            "num_rows": np.int32(len(work.rows)),
            "q_start": np.cumsum(q_len, dtype=np.int32) - q_len,
            "q_len": q_len,
            "kv_len": kv_len,
            "page_table": table,
        },
    )
    return RaggedRows(**values, has_prefills=bool(work.prefills))
