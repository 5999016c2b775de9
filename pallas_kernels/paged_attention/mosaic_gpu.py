"""Paged attention in Pallas-Mosaic-GPU: for Hopper (sm_90a), with TMA copies and wgmma.

    mosaic_gpu_decode, mosaic_gpu_prefill   the two launches, and how rows are cut into blocks
    mosaic_gpu_warpgroups                   what the warpgroups of prefill do
    mosaic_gpu_tiles                        tiles, page copies, products and softmax of both
    mosaic_gpu_tuning                       tile sizes

New tokens are written by Pallas-Triton's kernel, one launch where XLA has up to six. Whole pages
are moved by XLA's gather and scatter: a page is one contiguous piece, and the link to the host is
an order of magnitude slower than either.

Refuses (NotImplementedError):
- float32 and other queries that are neither bfloat16 nor float16: wgmma would round them to tf32;
- pages that are neither of the queries' dtype nor quantised (raw uint16, which only CPUs hold);
- head dims over 256, the widest product of wgmma, and those whose rows in a page are no multiple of
  32 bytes, the narrowest swizzle (multiples of 16; with 8-bit pages of 32);
- page sizes that are no multiple of 16 (a copy is 8 tokens or more; 16 bytes of scales or more).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention import (
    mosaic_gpu_decode,
    mosaic_gpu_prefill,
    page_moves,
    triton,
)
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tiles import Machine, PageTiles
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tuning import (
    Tile,
    Tuning,
    device_kind,
    find_tile,
    load_tuning,
)
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)

write_kv = triton.write_kv
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
        tuning: sizes of the launches; those of the machine's GPU if not given.

    Raises:
        NotImplementedError: see above.
    """
    if spec.latent_dim is not None:
        raise NotImplementedError("latent pages: there is no kernel for them here yet")
    _check(q_tqh, pages)
    spec, layer = spec.split_layer()
    tuning = tuning or _default_tuning(interpret)
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
    num_tokens, _, head_dim = q_tqh.shape
    num_rows, page_size = rows.page_table.shape[0], pages.rows_rkph.shape[2]
    is_quantised = pages.scales_rkp is not None
    machine = Machine(interpret)

    def tile_of(tiles: tuple[Tile, ...]) -> Tile:
        return find_tile(tiles, is_quantised=is_quantised, head_dim=head_dim)

    def page_tiles(tile: Tile) -> PageTiles:
        return PageTiles(tile.tile_tokens, page_size, spec)

    tile = tile_of(tuning.decode)
    decode = _decode_launch(q_tqh, pages, rows, tuning, tile, page_tiles(tile))
    found = mosaic_gpu_decode.attend(q_tqh[:num_rows], pages, rows, spec, decode, machine, layer)
    if sinks_q is not None:
        found = _with_sinks(found, sinks_q)
    found = _padded(found, q_tqh.dtype, num_tokens - num_rows)
    if rows.has_prefills:
        tile = tile_of(tuning.prefill)
        prefill = mosaic_gpu_prefill.Launch(
            page_tiles(tile),
            tile.stages,
            tile.narrow_stages,
            tuning.prefill_takes_turns,
            tuning.prefill_programs,
        )
        rest = mosaic_gpu_prefill.attend(q_tqh, pages, rows, spec, prefill, machine, layer, sinks_q)
        is_decode_t = jnp.arange(num_tokens, dtype=jnp.int32) < rows.num_decodes
        found = _chosen(is_decode_t, found, rest)
    return found if spec.needs_lse else found._replace(lse_tq=None)


def _check(q_tqh: jax.Array, pages: KVPages) -> None:
    pool, is_quantised = pages.rows_rkph, pages.scales_rkp is not None
    page_size, head_dim = pool.shape[2:]
    if q_tqh.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries of {q_tqh.dtype}: wgmma would round them to tf32")
    if not is_quantised and pool.dtype != q_tqh.dtype:
        raise NotImplementedError(f"pages of {pool.dtype}, and queries of {q_tqh.dtype}")
    if head_dim * pool.dtype.itemsize % 32:
        raise NotImplementedError(
            f"head dim {head_dim} of {pool.dtype}: rows of a page are no multiple of 32 bytes"
        )
    if page_size % 16:
        raise NotImplementedError(f"page size {page_size} is no multiple of 16")


def _default_tuning(interpret: bool) -> Tuning:
    tuning = load_tuning(device_kind())
    if not interpret:
        return tuning
    # The interpreter compiles a program of several warpgroups anew for each thread block.
    return dataclasses.replace(tuning, decode_blocks=12, min_piece_tokens=64, prefill_programs=1)


def _decode_launch(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    tuning: Tuning,
    tile: Tile,
    page_tiles: PageTiles,
) -> mosaic_gpu_decode.Launch:
    num_rows, table_width = rows.page_table.shape
    num_chunks = mosaic_gpu_decode.head_chunks(q_tqh.shape[1], pages.rows_rkph.shape[1]).total
    target_pieces = -(-tuning.decode_blocks // num_chunks)
    # So that what the merge reads stays the same: few rows may be cut into many pieces.
    most_pieces = max(tuning.max_row_pieces, 4 * target_pieces // num_rows)
    longest_tokens = table_width * page_tiles.page_size
    return mosaic_gpu_decode.Launch(
        page_tiles,
        tile.stages,
        target_pieces,
        min_piece_tiles=max(1, tuning.min_piece_tokens // tile.tile_tokens),
        max_row_pieces=max(
            1, min(most_pieces, target_pieces, -(-longest_tokens // tuning.min_piece_tokens))
        ),
    )


def _with_sinks(found: Attended, sinks_q: jax.Array) -> Attended:
    """The same with one more logit, which has no value."""
    assert found.lse_tq is not None
    lse_tq = jnp.logaddexp(found.lse_tq, sinks_q.astype(jnp.float32)[None])
    weight_tq = jnp.exp(found.lse_tq - lse_tq)
    return Attended(found.out_tqh * weight_tq[..., None], lse_tq)


def _padded(found: Attended, dtype: jnp.dtype, count: int) -> Attended:
    """In that dtype, with `count` more tokens."""
    assert found.lse_tq is not None
    return Attended(
        jnp.pad(found.out_tqh.astype(dtype), ((0, count), (0, 0), (0, 0))),
        jnp.pad(found.lse_tq, ((0, count), (0, 0))),
    )


def _chosen(is_first_t: jax.Array, first: Attended, second: Attended) -> Attended:
    assert first.lse_tq is not None and second.lse_tq is not None
    return Attended(
        jnp.where(is_first_t[:, None, None], first.out_tqh, second.out_tqh),
        jnp.where(is_first_t[:, None], first.lse_tq, second.lse_tq),
    )
