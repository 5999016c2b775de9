"""Writes of new keys and values, and moves of whole pages, in Pallas for TPU.

XLA scatters and gathers in place only in layouts of its own choice: for head dimensions 64 and 256,
and for the scales of pages below 128 tokens, it copies the whole pool into another layout and back
(seen in the code compiled for v5e and v6e).

HBM is tiled, and nothing smaller than a tile can be copied: the new key of a token is one of many
tokens of its tile, its scale one of the lanes. So a tile is read, changed and written back. Tokens
are sorted by place first: those of one tile are then neighbours, a *run*, and no two runs touch the
same tile. `DEPTH` runs are under way at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.paged_attention.page_moves import to_storage
from jaxserve.pallas_kernels.paged_attention.quant import quantise
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages

DEPTH = 8
LANES = 128
MAX_COPIES = 16
"""Copies of whole pages under way at a time."""


def write_kv(
    pages: KVPages,
    k_tkh: Float[Array, "T K H"],
    v_tkh: Float[Array, "T K H"] | None,
    page_t: Int[Array, " T"],
    offset_t: Int[Array, " T"],
    spec: AttentionSpec,
    *,
    interpret: Any = False,
) -> KVPages:
    """See `page_moves.write_kv`."""
    row_t = jnp.where(page_t < 0, -1, spec.first_row(page_t))
    return _write(pages, k_tkh, v_tkh, row_t, offset_t, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _write(
    pages: KVPages,
    k_tkh: jax.Array,
    v_tkh: jax.Array | None,
    row_t: jax.Array,
    offset_t: jax.Array,
    *,
    interpret: Any,
) -> KVPages:
    pool, scales = pages.rows_rkph, pages.scales_rkp
    order = jnp.lexsort((offset_t, row_t))  # those to drop come first
    row_t, offset_t = row_t[order], offset_t[order]
    new = [k_tkh] if v_tkh is None else [k_tkh, v_tkh]
    kv_t2kh = jnp.stack(new, axis=1)[order]
    if scales is None:
        stored = to_storage(kv_t2kh, pool.dtype)
    else:
        stored, scale_t2k = quantise(kv_t2kh, pool.dtype)
        by_page = _find_runs(row_t, offset_t, page_tokens=pool.shape[2])
        scales = _write_scales(scales, scale_t2k.transpose(1, 2, 0), by_page, interpret)
    tile_tokens = min(32 // pool.dtype.itemsize, pool.shape[2])
    runs = _find_runs(row_t, offset_t, page_tokens=tile_tokens)
    return KVPages(_write_tokens(pool, stored, runs, tile_tokens, interpret), scales)


class _Runs(NamedTuple):
    """Runs of sorted tokens, int32. T tokens; the last entries of `first` are of no run.

    Attributes:
        first: [T + 1]: token with which each run begins; behind the last run, where that ends.
        row, offset: [T]: of each token, in the pool and in the page.
        num_runs: [1].
    """

    first: jax.Array
    row: jax.Array
    offset: jax.Array
    num_runs: jax.Array


def _find_runs(row_t: jax.Array, offset_t: jax.Array, *, page_tokens: int) -> _Runs:
    """Runs of tokens in the same `page_tokens` of the same page; negative rows are in none."""
    num_tokens = row_t.shape[0]
    place = offset_t // page_tokens
    is_same = (row_t[1:] == row_t[:-1]) & (place[1:] == place[:-1])
    begins = (row_t >= 0) & jnp.append(True, ~is_same)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    first = jnp.sort(jnp.where(begins, token, num_tokens))
    return _Runs(
        jnp.append(first, num_tokens).astype(jnp.int32),
        row_t.astype(jnp.int32),
        offset_t.astype(jnp.int32),
        begins.sum(dtype=jnp.int32)[None],
    )


def _write_tokens(
    pool_rkph: jax.Array, new_t2kh: jax.Array, runs: _Runs, tile_tokens: int, interpret: Any
) -> jax.Array:
    num_tokens, parts, num_kv, head_dim = new_t2kh.shape
    # A slab of tokens is read for each run, however short. The axis of 1 is what a token is
    # repeated along over the tokens of a tile.
    new = jnp.pad(new_t2kh, ((0, tile_tokens), *((0, 0),) * 3))[:, :, :, None]

    def kernel(first, row, offset, count, new_ref, _, pool_ref, slabs, tiles, loads, stores):
        def tile_of(run: Any) -> Any:
            token = first[run]
            start = pl.multiple_of(offset[token] // tile_tokens * tile_tokens, tile_tokens)
            return pool_ref.at[pl.ds(row[token], parts), :, pl.ds(start, tile_tokens)]

        def load(run: Any, slot: Any) -> list[Any]:
            slab = new_ref.at[pl.ds(first[run], tile_tokens)]
            return [
                pltpu.make_async_copy(slab, slabs.at[slot], loads.at[slot]),
                pltpu.make_async_copy(tile_of(run), tiles.at[slot], loads.at[slot]),
            ]

        def store(run: Any, slot: Any) -> list[Any]:
            return [pltpu.make_async_copy(tiles.at[slot], tile_of(run), stores.at[slot])]

        def change(run: Any, slot: Any) -> None:
            shape = (parts, num_kv, tile_tokens, head_dim)
            place = lax.broadcasted_iota(jnp.int32, shape, 2)

            def one_token(token: Any, tile: Any) -> Any:
                is_here = place == lax.rem(offset[token], tile_tokens)
                return jnp.where(is_here, slabs[slot, token - first[run]], tile)

            tile = lax.fori_loop(first[run], first[run + 1], one_token, tiles[slot])
            tiles[slot] = tile

        _pipeline(count[0], load, change, store)

    return pl.pallas_call(
        kernel,
        name="write_kv",
        out_shape=jax.ShapeDtypeStruct(pool_rkph.shape, pool_rkph.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((DEPTH, tile_tokens, parts, num_kv, 1, head_dim), pool_rkph.dtype),
                pltpu.VMEM((DEPTH, parts, num_kv, tile_tokens, head_dim), pool_rkph.dtype),
                pltpu.SemaphoreType.DMA((DEPTH,)),
                pltpu.SemaphoreType.DMA((DEPTH,)),
            ],
        ),
        input_output_aliases={len(runs) + 1: 0},
        interpret=interpret,
    )(*runs, new, pool_rkph)


def _write_scales(
    scales_rkp: jax.Array, new_2kt: jax.Array, runs: _Runs, interpret: Any
) -> jax.Array:
    _, num_kv, page_size = scales_rkp.shape
    parts, _, num_tokens = new_2kt.shape
    new_2kt = jnp.pad(new_2kt, ((0, 0), (0, 0), (0, -num_tokens % LANES)))

    def kernel(first, row, offset, count, new_ref, _, scales_ref, pages, loads, stores):
        def page_of(run: Any) -> Any:
            return scales_ref.at[pl.ds(row[first[run]], parts)]

        def load(run: Any, slot: Any) -> list[Any]:
            return [pltpu.make_async_copy(page_of(run), pages.at[slot], loads.at[slot])]

        def store(run: Any, slot: Any) -> list[Any]:
            return [pltpu.make_async_copy(pages.at[slot], page_of(run), stores.at[slot])]

        def change(run: Any, slot: Any) -> None:
            place = lax.broadcasted_iota(jnp.int32, (parts, num_kv, page_size), 2)
            lane = lax.broadcasted_iota(jnp.int32, (parts, num_kv, LANES), 2)

            def one_token(token: Any, page: Any) -> Any:
                block = pl.multiple_of(token // LANES * LANES, LANES)
                some = new_ref[:, :, pl.ds(block, LANES)]
                # One lane of many: nothing can be loaded from a lane that is not known.
                scale = jnp.where(lane == token - block, some, 0.0).sum(axis=2, keepdims=True)
                return jnp.where(place == offset[token], scale, page)

            page = lax.fori_loop(first[run], first[run + 1], one_token, pages[slot])
            pages[slot] = page

        _pipeline(count[0], load, change, store)

    return pl.pallas_call(
        kernel,
        name="write_scales",
        out_shape=jax.ShapeDtypeStruct(scales_rkp.shape, scales_rkp.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((DEPTH, parts, num_kv, page_size), jnp.float32),
                pltpu.SemaphoreType.DMA((DEPTH,)),
                pltpu.SemaphoreType.DMA((DEPTH,)),
            ],
        ),
        input_output_aliases={len(runs) + 1: 0},
        interpret=interpret,
    )(*runs, new_2kt, scales_rkp)


def _pipeline(
    count: Any,
    load: Callable[[Any, Any], list[Any]],
    change: Callable[[Any, Any], None],
    store: Callable[[Any, Any], list[Any]],
) -> None:
    """Load, change and store each run, several at a time; `load(run, slot)` gives its copies."""
    ahead = DEPTH // 2

    def start_loads(run: Any) -> None:
        @pl.when(run < count)
        def _():
            for copy in load(run, lax.rem(run, DEPTH)):
                copy.start()

    def wait_stores(run: Any) -> None:
        @pl.when((run >= 0) & (run < count))
        def _():
            for copy in store(run, lax.rem(run, DEPTH)):
                copy.wait()

    for run in range(ahead):
        start_loads(run)

    def one_run(run: Any, _: Any) -> Any:
        slot = lax.rem(run, DEPTH)
        wait_stores(run + ahead - DEPTH)  # the last user of the slot that is loaded next
        start_loads(run + ahead)
        for copy in load(run, slot):
            copy.wait()
        change(run, slot)
        for copy in store(run, slot):
            copy.start()
        return 0

    lax.fori_loop(0, count, one_run, 0)
    for back in range(DEPTH - ahead, 0, -1):
        wait_stores(count - back)


def gather_pages(
    pool_n: Shaped[Array, "N ..."], ids_b: Int[Array, " B"], *, interpret: Any = False
) -> Shaped[Array, "B ..."]:
    """See `page_moves.gather_pages`."""
    num_ids, num_pages = ids_b.shape[0], pool_n.shape[0]

    def kernel(ids, pool_ref, out_ref, sems):
        def copy(index: Any) -> Any:
            page = jnp.clip(ids[index], 0, num_pages - 1)
            sem = sems.at[lax.rem(index, MAX_COPIES)]
            return pltpu.make_async_copy(pool_ref.at[page], out_ref.at[index], sem)

        _move(num_ids, copy, lambda index: True)

    return _move_pages(
        kernel, "gather_pages", (num_ids, *pool_n.shape[1:]), ids_b, (pool_n,), {}, interpret
    )


def scatter_pages(
    pool_n: Shaped[Array, "N ..."],
    ids_b: Int[Array, " B"],
    rows_b: Shaped[Array, "B ..."],
    *,
    interpret: Any = False,
) -> Shaped[Array, "N ..."]:
    """See `page_moves.scatter_pages`."""
    num_ids, num_pages = ids_b.shape[0], pool_n.shape[0]

    def kernel(ids, rows_ref, _, pool_ref, sems):
        def copy(index: Any) -> Any:
            sem = sems.at[lax.rem(index, MAX_COPIES)]
            return pltpu.make_async_copy(rows_ref.at[index], pool_ref.at[ids[index]], sem)

        _move(num_ids, copy, lambda index: (ids[index] >= 0) & (ids[index] < num_pages))

    return _move_pages(
        kernel, "scatter_pages", pool_n.shape, ids_b, (rows_b, pool_n), {2: 0}, interpret
    )


def _move(count: int, copy: Callable[[Any], Any], is_wanted: Callable[[Any], Any]) -> None:
    """`MAX_COPIES` copies at a time; those that are not wanted are left out."""

    def start(index: Any) -> None:
        pl.when(is_wanted(index))(lambda: copy(index).start())

    def wait(index: Any) -> None:
        pl.when(is_wanted(index))(lambda: copy(index).wait())

    def one(index: Any, _: Any) -> Any:
        @pl.when(index >= MAX_COPIES)
        def _():
            wait(index - MAX_COPIES)

        start(index)
        return 0

    lax.fori_loop(0, count, one, 0)
    lax.fori_loop(max(0, count - MAX_COPIES), count, lambda index, _: wait(index) or 0, 0)


def _move_pages(
    kernel: Callable[..., None],
    name: str,
    shape: tuple[int, ...],
    ids_b: jax.Array,
    arrays: tuple[jax.Array, ...],
    aliases: "dict[int, int]",
    interpret: Any,
) -> jax.Array:
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=jax.ShapeDtypeStruct(shape, arrays[-1].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA((MAX_COPIES,))],
        ),
        input_output_aliases=aliases,
        interpret=interpret,
    )(ids_b.astype(jnp.int32), *arrays)
