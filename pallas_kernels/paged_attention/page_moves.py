"""Reads and writes pages in plain XLA: new keys and values of a step, and whole pages.

XLA does all three in place: a scatter into a donated pool touches only what it writes, and a gather
of whole pages is one copy of contiguous memory for each. Knows nothing of attention.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.paged_attention.quant import quantise
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages

_DISTINCT = {"mode": "drop", "unique_indices": True}
"""Of a scatter to places that are all different. XLA for GPUs would otherwise write each 8- or
16-bit number by an atomic compare-and-swap of the word that it is in."""


def write_kv(
    pages: KVPages,
    k_tkh: Float[Array, "T K H"],
    v_tkh: Float[Array, "T K H"] | None,
    page_t: Int[Array, " T"],
    offset_t: Int[Array, " T"],
    spec: AttentionSpec,
) -> KVPages:
    """Write one layer's keys and values, quantised if the pages are.

    Args:
        k_tkh: the latents, if the pages are latent; then there are no `v_tkh`.
        page_t: tokens whose page is negative are dropped.
        offset_t: places within the page.
    """
    num_rows = pages.rows_rkph.shape[0]
    row_t = jnp.where(page_t < 0, _beyond(num_rows, page_t, spec.parts), spec.first_row(page_t))
    new = [(0, k_tkh)] if v_tkh is None else [(0, k_tkh), (1, v_tkh)]
    assert len(new) == spec.parts, "values come with pages of keys and values, and only with them"
    if row_t.shape[0] == 1:
        # XLA turns a scatter of one update into a slice update, and copies the pool for it.
        row_t = jnp.pad(row_t, (0, 1), constant_values=num_rows + 2)
        offset_t = jnp.pad(offset_t, (0, 1))
        new = [(part, jnp.pad(x, ((0, 1), (0, 0), (0, 0)))) for part, x in new]
    rows_rkph, scales_rkp = pages.rows_rkph, pages.scales_rkp
    for part, x_tkh in new:
        at_t = row_t + part if part else row_t
        if scales_rkp is None:
            stored_tkh = to_storage(x_tkh, rows_rkph.dtype)
        else:
            stored_tkh, scale_tk = quantise(x_tkh, rows_rkph.dtype)
            scales_rkp = scales_rkp.at[at_t, :, offset_t].set(scale_tk, **_DISTINCT)
        rows_rkph = rows_rkph.at[at_t, :, offset_t, :].set(stored_tkh, **_DISTINCT)
    return KVPages(rows_rkph, scales_rkp)


def gather_pages(pool_n: Shaped[Array, "N ..."], ids_b: Int[Array, " B"]) -> Shaped[Array, "B ..."]:
    """Copies of whole pages; an id out of range gives any page."""
    return pool_n.at[ids_b].get(mode="clip")


def scatter_pages(
    pool_n: Shaped[Array, "N ..."], ids_b: Int[Array, " B"], rows_b: Shaped[Array, "B ..."]
) -> Shaped[Array, "N ..."]:
    """The pool with whole pages replaced; what has an id out of range is dropped. Ids differ.

    In place if the caller donates the pool.
    """
    num_pages = pool_n.shape[0]
    if ids_b.shape[0] == 1:  # as in `write_kv`
        ids_b = jnp.pad(ids_b, (0, 1), constant_values=-1)
        rows_b = jnp.concatenate([rows_b, rows_b])
    is_page_b = (ids_b >= 0) & (ids_b < num_pages)
    ids_b = jnp.where(is_page_b, ids_b, _beyond(num_pages, ids_b, 1))
    return pool_n.at[ids_b].set(rows_b, **_DISTINCT)


def _beyond(end: int, like_b: jax.Array, step: int) -> jax.Array:
    """An index out of range for each of `like_b`, no two of them the same."""
    return end + step * jnp.arange(like_b.shape[0], dtype=like_b.dtype)


def to_storage(x: jax.Array, storage: jnp.dtype) -> jax.Array:
    """Cast to the pool's dtype; an unsigned one holds the raw bits (see kv.pool)."""
    return lax.bitcast_convert_type(x, storage) if storage == jnp.uint16 else x.astype(storage)


def from_storage(x: jax.Array, compute: jnp.dtype) -> jax.Array:
    """The inverse of `to_storage`."""
    return lax.bitcast_convert_type(x, compute) if x.dtype == jnp.uint16 else x.astype(compute)
