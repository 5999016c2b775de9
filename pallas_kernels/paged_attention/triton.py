"""Paged attention in Pallas-Triton: the portable backend of NVIDIA GPUs (sm_80 and later).

Upstream has deprecated Pallas-Triton (jax 0.11: "will be removed in a future version"), so this is
kept thin: plain tiles, masked loads, no tricks that only this compiler would need. What is faster
on one kind of device belongs into a backend of its own (`mosaic_gpu`).

    triton_decode, triton_prefill   the two launches of attention
    triton_tile                     the inner loop of both
    triton_write                    the write of new keys and values
    triton_ptx, triton_tuning       instructions asked for by name; tile sizes

Whole pages are moved by XLA's gather and scatter: a page is one contiguous piece, and the link to
the host is an order of magnitude slower than either.

Refuses (NotImplementedError):
- head dims that are no multiple of 16, the shortest side of a tensor core product;
- pools of more than 2**31 slots (a slot is one token of one head of one pool row);
- 8-bit pools of more than 2 GiB and at most 4 GiB: jax (0.10, 0.11) addresses arrays of up to 4 GiB
  with signed 32-bit offsets.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention import page_moves, triton_write
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)
from jaxserve.pallas_kernels.paged_attention.triton_decode import decode
from jaxserve.pallas_kernels.paged_attention.triton_prefill import prefill
from jaxserve.pallas_kernels.paged_attention.triton_tile import MIN_SIDE, Statics
from jaxserve.pallas_kernels.paged_attention.triton_tuning import (
    Tile,
    Tuning,
    device_kind,
    find_tile,
    load_tuning,
)

gather_pages = page_moves.gather_pages
scatter_pages = page_moves.scatter_pages


def ragged_paged_attention(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    *,
    sinks_q: jax.Array | None = None,
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> Attended:
    """Causal attention of every row's queries to its pages; padding tokens get zeros.

    Args:
        sinks_q: an extra score of each head, of which only the weight counts; not scaled or capped.
        tuning: tile sizes; those of the machine's GPU if not given.

    Raises:
        NotImplementedError: see above.
    """
    _check(pages, q_tqh.shape[2], interpret)
    if spec.latent_dim is not None and spec.latent_dim % MIN_SIDE:
        raise NotImplementedError(f"a latent of {spec.latent_dim} is no multiple of {MIN_SIDE}")
    _hush()
    spec, layer = spec.split_layer()
    tuning = tuning or load_tuning(device_kind())
    return _attend(
        q_tqh, pages, rows, layer, sinks_q, spec=spec, interpret=interpret, tuning=tuning
    )


@partial(jax.jit, static_argnames=("spec", "interpret", "tuning"))
def _attend(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    layer: jax.Array,
    sinks_q: jax.Array | None,
    *,
    spec: AttentionSpec,
    interpret: bool,
    tuning: Tuning,
) -> Attended:
    """Both launches. The call is the same for all layers of a step, and so traced once."""
    num_tokens, num_q, head_dim = q_tqh.shape
    num_rows, table_width = rows.page_table.shape
    num_kv, page_size = pages.rows_rkph.shape[1:3]
    is_quantised = pages.scales_rkp is not None
    is_wide = q_tqh.dtype.itemsize > 2
    quantised_compute = jnp.float32 if is_wide else jnp.float16

    def tile_of(tiles: tuple[Tile, ...]) -> Tile:
        return find_tile(
            tiles,
            query_bytes=q_tqh.dtype.itemsize,
            is_quantised=is_quantised,
            head_dim=head_dim,
        )

    def statics(block_m: int, block_k: int, piece: int) -> Statics:
        return Statics(
            spec=spec,
            num_q=num_q,
            num_kv=num_kv,
            head_dim=head_dim,
            page_size=page_size,
            table_width=table_width,
            compute=jnp.dtype(quantised_compute) if is_quantised else q_tqh.dtype,
            is_quantised=is_quantised,
            block_m=block_m,
            block_k=block_k,
            piece=piece,
            interpret=interpret,
        )

    slots = KVPages(
        pages.rows_rkph.reshape(-1, head_dim),
        None if pages.scales_rkp is None else pages.scales_rkp.reshape(-1),
    )
    tile = tile_of(tuning.decode)
    block_m = min(tile.block_m, max(MIN_SIDE, _power_of_two(num_q // num_kv)))
    block_k = tile.block_k if block_m == MIN_SIDE else min(tile.block_k, 32)
    num_programs = num_rows * num_kv * -(-num_q // num_kv // block_m)
    attended = decode(
        q_tqh[:num_rows],
        slots,
        rows,
        layer,
        sinks_q,
        statics(block_m, block_k, tile.piece),
        num_splits=tuning.num_splits(num_programs, table_width * page_size),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    attended = _padded(attended, num_tokens - num_rows)
    if not rows.has_prefills:
        return attended
    tile = tile_of(tuning.prefill)
    block_m = min(tile.block_m, max(MIN_SIDE, _power_of_two(num_tokens * num_q // num_kv)))
    return prefill(
        q_tqh,
        slots,
        rows,
        layer,
        sinks_q,
        attended,
        statics(block_m, tile.block_k, tile.piece),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def write_kv(
    pages: KVPages,
    k_tkh: jax.Array,
    v_tkh: jax.Array | None,
    page_t: jax.Array,
    offset_t: jax.Array,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> KVPages:
    """Write one layer's keys and values, in place and quantised if the pages are.

    Args:
        page_t: tokens whose page is negative are dropped.
        offset_t: places within the page.

    Raises:
        NotImplementedError: see above.
    """
    _check(pages, k_tkh.shape[2], interpret)
    _hush()
    spec, layer = spec.split_layer()
    return _write(pages, k_tkh, v_tkh, page_t, offset_t, layer, spec=spec, interpret=interpret)


_write = partial(jax.jit, static_argnames=("spec", "interpret"))(triton_write.write_kv)


def _check(pages: KVPages, head_dim: int, interpret: bool) -> None:
    if head_dim % MIN_SIDE:
        raise NotImplementedError(f"head dim {head_dim} is no multiple of {MIN_SIDE}")
    pool = pages.rows_rkph
    num_slots = pool.size // head_dim
    if num_slots >= 2**31:
        raise NotImplementedError(f"the pool has {num_slots} slots; indices hold 2**31")
    if pool.dtype.itemsize == 1 and 2**31 < pool.size <= 2**32 and not interpret:
        raise NotImplementedError(
            f"a pool of {pool.size} bytes in 8 bits: jax addresses 2 to 4 GiB with 32 signed bits"
        )


def _power_of_two(number: int) -> int:
    """The least that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def _padded(attended: Attended, count: int) -> Attended:
    """With `count` more tokens, all zeros."""
    if count == 0:
        return attended
    lse_tq = attended.lse_tq
    return Attended(
        jnp.pad(attended.out_tqh, ((0, count), (0, 0), (0, 0))),
        None if lse_tq is None else jnp.pad(lse_tq, ((0, count), (0, 0))),
    )


def _hush() -> None:
    """Say nothing of the deprecation that the module docstring speaks of.

    The warning comes when a traced program is lowered, which is not this module's call to wrap.
    """
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
