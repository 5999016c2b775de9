"""Builds the `attend` callable that models call: between layers, and pages with their kernels.

The cache that a model carries from layer to layer is the KV pool in its kernel view, the pages of
each KV group. Under tensor parallelism each device keeps its own KV heads and attends with its own
query heads; where the heads do not divide, every device does all of them. Latent pages have no
heads to split: every device keeps them all, and attends with its own query heads.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxserve.batch import Batch, SlotState
from jaxserve.kv.pool import KVPool, kernel_view
from jaxserve.models.config import DecoderConfig
from jaxserve.pallas_kernels.paged_attention.api import Backend
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows
from jaxserve.sharding import TENSOR_AXIS
from jaxserve.types import KVGroup, LayerCache

Cache = tuple[KVPages, ...]
Attend = Callable[[Cache, int, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Cache]]


def open_cache(pool: KVPool) -> Cache:
    """The pool as models carry it."""
    return tuple(KVPages(kernel_view(group)) for group in pool.groups)


def close_cache(cache: Cache, pool: KVPool) -> KVPool:
    """The pool again, in the shape it is kept in between steps."""
    shaped = (
        pages.rows_rkph.reshape(old.shape) for pages, old in zip(cache, pool.groups, strict=True)
    )
    return KVPool(tuple(shaped))


def build_attend(
    *,
    batch: Batch,
    state: SlotState,
    kv_groups: tuple[KVGroup, ...],
    page_size: int,
    has_prefills: bool,
    model: DecoderConfig,
    backend: Backend,
    mesh: Mesh | None,
) -> Attend:
    """The callable for one step."""
    place = {layer: (g, i) for g in kv_groups for i, layer in enumerate(g.layers)}
    tables = [state.page_tables[g.index][batch.row_slot] for g in kv_groups]
    token_is_real = jnp.arange(batch.position.shape[0]) < batch.row_len.sum()
    offset_t = batch.position % page_size
    page_of_group = [
        jnp.where(token_is_real, table[batch.token_row, batch.position // page_size], -1)
        for table in tables
    ]
    rows_of_group = [
        RaggedRows(
            num_decodes=batch.num_decodes,
            num_rows=batch.num_rows,
            q_start=batch.row_start,
            q_len=batch.row_len,
            kv_len=batch.row_kv_len,
            page_table=table,
            has_prefills=has_prefills,
        )
        for table in tables
    ]

    def attend(
        cache: Cache, layer: int, q_tqh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        group, index = place[layer]
        spec = AttentionSpec(
            scale=model.layers[layer].scale,
            num_layers=len(group.layers),
            layer=index,
            window=group.cache.window,
            soft_cap=model.layers[layer].logit_soft_cap,
            needs_lse=False,
            latent_dim=group.cache.latent_dim,
        )
        run = partial(_write_and_attend, backend=backend, spec=spec)
        if mesh is not None:
            run = _per_device(run, mesh, group.cache, num_q=q_tqh.shape[1])
        out_tqh, pages = run(
            cache[group.index],
            q_tqh,
            k_tkh,
            v_tkh,
            page_of_group[group.index],
            offset_t,
            rows_of_group[group.index],
        )
        return out_tqh, (*cache[: group.index], pages, *cache[group.index + 1 :])

    return attend


def _write_and_attend(
    pages: KVPages,
    q_tqh: jax.Array,
    k_tkh: jax.Array,
    v_tkh: jax.Array | None,
    page_t: jax.Array,
    offset_t: jax.Array,
    rows: RaggedRows,
    *,
    backend: Backend,
    spec: AttentionSpec,
) -> tuple[jax.Array, KVPages]:
    with jax.named_scope("write_kv"):
        pages = backend.write_kv(pages, k_tkh, v_tkh, page_t, offset_t, spec)
    with jax.named_scope("attention"):
        return backend.ragged_paged_attention(q_tqh, pages, rows, spec).out_tqh, pages


def head_axis(mesh: Mesh, num_heads: int) -> str | None:
    """The mesh axis that heads are split over, or None if they do not divide."""
    return TENSOR_AXIS if num_heads % mesh.shape[TENSOR_AXIS] == 0 else None


def _per_device(
    run: Callable[..., tuple[jax.Array, KVPages]],
    mesh: Mesh,
    cache: LayerCache,
    num_q: int,
) -> Callable[..., tuple[jax.Array, KVPages]]:
    replicated = PartitionSpec()
    kv = q = PartitionSpec(None, head_axis(mesh, cache.num_kv_heads))
    if cache.latent_dim is not None:
        kv, q = replicated, PartitionSpec(None, head_axis(mesh, num_q))
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(kv, q, kv, kv, replicated, replicated, replicated),
        out_specs=(q, kv),
        check_vma=False,
    )
