"""What the Mosaic GPU launches share: tiles in shared memory, page copies, products, softmax.

A launch works on tiles of `tile_tokens` keys of one KV head. A tile may be several pages, or a part
of one; each piece of a page is one TMA copy, and all copies of a tile arrive at one barrier. Past
the last page that a row needs, the last one is copied again: it lies in the L2 cache, and what it
holds is masked.

Scores are kept in base 2 (the hardware has exp2 only), and -inf marks what is not seen. A weight of
zero does not hold back a NaN, so values that nobody may see are zeroed before they are multiplied.

On the CPU the launches are interpreted. The interpreter knows copies, barriers and threads, but
neither layouts nor transposed references nor products of registers: `Machine` holds all that
differs, and what differs between jax 0.10 and 0.11. Knows nothing of splits, queries or rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages

IS_OLD_JAX = jax.__version_info__ < (0, 11)
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
KEYS, VALUES = 0, 1
WARPGROUP_ROWS = 64
"""Rows of a wgmma: one warpgroup's tile of queries."""


class Softmax(NamedTuple):
    """State of a softmax under way, for the rows of one warpgroup."""

    acc_mh: jax.Array  # [64, H] float32
    max_m: jax.Array  # [64] float32, base 2
    sum_m: jax.Array  # [64] float32


@dataclass(frozen=True, slots=True)
class PageTiles:
    """How pages become tiles of keys.

    Attributes:
        tile_tokens: keys of a tile.
        page_size: tokens of a page; neither need divide the other.
    """

    tile_tokens: int
    page_size: int
    spec: AttentionSpec

    @property
    def copy_tokens(self) -> int:
        """Tokens of one copy: it crosses neither a page's border nor a tile's."""
        return math.gcd(self.tile_tokens, self.page_size)

    @property
    def copies(self) -> int:
        """Copies of a tile of keys; as many again of the values."""
        return self.tile_tokens // self.copy_tokens

    def split(self, pages: KVPages) -> "list[jax.Array]":
        """The pool, and its scales if it is quantised, with pages cut into what one copy takes."""
        size = self.copy_tokens
        pool_rkph = pages.rows_rkph
        num_rows, num_kv, page_size, head_dim = pool_rkph.shape
        parts = page_size // size
        found = [pool_rkph.reshape(num_rows, num_kv, parts, size, head_dim)]
        if pages.scales_rkp is not None:
            found.append(pages.scales_rkp.reshape(num_rows, num_kv, parts, size))
        return found

    def places(self, source: "Source") -> "list[Place]":
        """Where the copies of a tile come from."""
        found = []
        for index in range(self.copies):
            token = source.tile * self.tile_tokens + index * self.copy_tokens
            held = jnp.minimum(token, source.keys.end - 1)
            page = source.table_ref[source.row, lax.div(held, jnp.int32(self.page_size))]
            pool_row = self.spec.first_row(page, source.layer)
            in_page = lax.rem(token, jnp.int32(self.page_size))
            found.append(Place(pool_row, lax.div(in_page, jnp.int32(self.copy_tokens))))
        return found


def place_among(end_r: jax.Array, value_n: jax.Array) -> jax.Array:
    """How many of the ascending `end_r` are at most each value: of a part, whose it is.

    All are compared, in one launch: a binary search would be a loop of five for each bit.
    """
    found_n = jnp.searchsorted(end_r, value_n, side="right", method="compare_all")
    return found_n.astype(jnp.int32)


class Place(NamedTuple):
    """What one copy takes of `split` pages."""

    pool_row: jax.Array  # of the keys; the values are in the next one
    piece: jax.Array  # of the page


class Source(NamedTuple):
    """Which tile of which row, in which layer."""

    table_ref: Any
    layer: jax.Array
    row: jax.Array
    kv_head: jax.Array
    tile: jax.Array
    keys: "KeyRange"


class KeyRange(NamedTuple):
    """Tokens of a row that some query of the tile may see: [begin, end)."""

    begin: jax.Array
    end: jax.Array

    def holds(self, token: jax.Array) -> jax.Array:
        return (token >= self.begin) & (token < self.end)

    def cuts(self, first: jax.Array, size: int) -> jax.Array:
        """Whether some of the tokens [first, first + size) are not in the range."""
        return (first < self.begin) | (first + size > self.end)


@dataclass(frozen=True, slots=True)
class Machine:
    """Mosaic as it is on the device, or as the interpreter knows it."""

    is_interpreted: bool

    def compiler_params(self) -> Any:
        # exp2 and the division at the end in their fast forms. Row sums and maxima stay within
        # four lanes, so the scratch that reductions across warps would need is not set aside:
        # with it two blocks would not fit on a multiprocessor. Semantics as in jax 0.11: the older
        # default refuses copies that are no multiple of 128 bytes (a page's scales).
        return plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        )

    def kernel(self, body: Callable[..., None], **options: Any) -> Callable[..., Any]:
        """`plgpu.kernel`, interpreted if need be."""
        if self.is_interpreted:
            options["interpret"] = interpret_params()
        return plgpu.kernel(body, compiler_params=self.compiler_params(), **options)

    def row_vector(self, value: float, rows: int) -> jax.Array:
        """[rows] float32, one number for each row of a product."""
        x = jnp.full((rows,), value, jnp.float32)
        return x if self.is_interpreted else plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))

    def zeros(self, rows: int, columns: int) -> jax.Array:
        """A float32 accumulator."""
        x = jnp.zeros((rows, columns), jnp.float32)
        return x if self.is_interpreted else plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    def iota(self, shape: tuple[int, ...], dimension: int, layout: Any = None) -> jax.Array:
        """Row or column numbers, laid out like a product unless told."""
        x = lax.broadcasted_iota(jnp.int32, shape, dimension)
        return x if self.is_interpreted else plgpu.layout_cast(x, layout or plgpu.Layout.WGMMA)

    def row_iota(self, rows: int) -> jax.Array:
        """Row numbers, one for each row of a product."""
        x = lax.broadcasted_iota(jnp.int32, (rows,), 0)
        return x if self.is_interpreted else plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))

    def load(self, ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
        if self.is_interpreted:
            return ref[...]
        at = ((),) if IS_OLD_JAX else ()
        return plgpu.load(ref, *at, layout=layout, optimized=optimized)

    def load_plain_tile(self, ref: Any) -> jax.Array:
        """A tile that is not swizzled, laid out as wgmma wants its rows; with bank conflicts."""
        return self.load(ref, plgpu.Layout.WGMMA, optimized=False)

    def load_columns(self, ref: Any) -> jax.Array:
        """A vector from shared memory, one number for each column of a product."""
        return self.load(ref, plgpu.Layout.WGMMA.reduce(0))

    def load_rows(self, ref: Any) -> jax.Array:
        """A vector from shared memory, one number for each row of a product."""
        return self.load(ref, plgpu.Layout.WGMMA.reduce(1))

    def widen_tile(self, narrow: Any, wide: Any) -> None:
        """Copy a tile of 8 bits into one of 16, a piece at a time to save registers."""
        rows, columns = WARPGROUP_ROWS, tile_swizzle(narrow.shape, narrow.dtype)
        for row in range(0, narrow.shape[0], rows):
            for column in range(0, narrow.shape[1], columns):
                part = (pl.ds(row, rows), pl.ds(column, columns))
                x = self.load(narrow.at[part], plgpu.Layout.WGMMA_UPCAST_2X)
                wide.at[part][...] = widen(x, wide.dtype)
        plgpu.commit_smem()

    def zero_rows_outside(self, ref: Any, first: jax.Array, keys: "KeyRange") -> None:
        """Zero those rows of a tile whose tokens (first, first + 1, ...) are not in the range.

        Some columns at a time, to save registers.
        """
        rows, columns = ref.shape
        swizzle = tile_swizzle(ref.shape, ref.dtype, contracted_rows=rows)
        step = swizzle // jnp.dtype(ref.dtype).itemsize
        layout = plgpu.Layout.SMEM_GMEM_COPY((rows, step), ref.dtype, swizzle)
        token = self.iota((rows, step), 0, layout)
        for column in range(0, columns, step):
            part = (slice(None), pl.ds(column, step))
            x = self.load(ref.at[part], layout)
            ref.at[part][...] = jnp.where(keys.holds(first + token), x, jnp.zeros_like(x))
        plgpu.commit_smem()

    def scores(
        self, q_smem: Any, k_smem: Any, meanwhile: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """q [M, H] times k [T, H] transposed: [M, T]; `meanwhile` runs beside the tensor cores."""
        if self.is_interpreted:
            meanwhile()
            return jnp.dot(q_smem[...], k_smem[...].T, preferred_element_type=jnp.float32)

        def product(acc_ref: Any) -> jax.Array:
            plgpu.wgmma(acc_ref, q_smem, _transposed(k_smem))
            meanwhile()
            return acc_ref[...]

        shape = (q_smem.shape[0], k_smem.shape[0])
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def accumulate(
        self,
        acc_mh: jax.Array,
        weight_mt: jax.Array,
        v_smem: Any,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> jax.Array:
        """acc + weight [M, T] times v [T, H]."""
        if self.is_interpreted:
            meanwhile()
            return acc_mh + jnp.dot(weight_mt, v_smem[...], preferred_element_type=jnp.float32)

        def product(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, weight_mt, v_smem)
            meanwhile()

        done: Any = pl.run_state(product)(plgpu.ACC.init(acc_mh))
        return done

    def settled(self, x: Any) -> Any:
        """`x`, computed before what comes next."""
        return x if self.is_interpreted else lax.optimization_barrier(x)

    def opaque(self, x: jax.Array) -> jax.Array:
        """A scalar from which the compiler computes anew what it has computed from `x` before."""
        return x if self.is_interpreted or IS_OLD_JAX else lax.optimization_barrier(x)

    def from_one_warp(self, action: Callable[[], None]) -> None:
        """Run `action` (copies) in one warp, once all warps of the group have come here."""
        if self.is_interpreted:
            action()
            return

        @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
        def _in_each_warp() -> None:
            pl.when(lax.axis_index("warp") == COPYING_WARP)(action)


COPYING_WARP = 3
"""Decode has at most 16 real query rows more often than not: the last warp has none of them."""


def interpret_params() -> Any:
    """`plgpu.InterpretGPUParams`, exported since jax 0.11; fresh shared memory is NaN."""
    found = getattr(plgpu, "InterpretGPUParams", None)
    if found is None:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as found
    return found(uninitialized_memory="nan")


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if IS_OLD_JAX else ref.transpose((1, 0))


def tile_swizzle(shape: tuple[int, ...], dtype: Any, *, contracted_rows: int | None = None) -> int:
    """Bytes of the widest swizzle of a tile [..., rows, columns]: it has to divide the columns.

    Where the rows are contracted in a product whose other factor is in registers (weights times
    values), it may not be wider than the rows.

    Raises:
        NotImplementedError: there is none.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for swizzle in (128, 64, 32):
        columns = swizzle // itemsize
        if shape[-1] % columns == 0 and (contracted_rows or columns) % columns == 0:
            return swizzle
    raise NotImplementedError(
        f"rows of {shape[-1]} {jnp.dtype(dtype).name} are no multiple of 32 bytes"
    )


def smem_tile(shape: tuple[int, ...], dtype: Any, *, contracted_rows: int | None = None) -> Any:
    """A tile [..., rows, columns] in shared memory, swizzled so that accesses have no conflicts."""
    swizzle = tile_swizzle(shape, dtype, contracted_rows=contracted_rows)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def empty_softmax(machine: Machine, head_dim: int) -> Softmax:
    rows = WARPGROUP_ROWS
    return Softmax(
        machine.zeros(rows, head_dim),
        machine.row_vector(-math.inf, rows),
        machine.row_vector(0.0, rows),
    )


def capped_base2(score_mt: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Scaled and soft-capped scores times log2(e).

    tanh(x) is 1 - 2 / (1 + exp(2x)): tanh.approx errs by 5e-4, times the cap.
    """
    if spec.soft_cap is None:
        return score_mt * (spec.scale * LOG2_E)
    power = jnp.exp2(score_mt * (2.0 * spec.scale * LOG2_E / spec.soft_cap))
    cap = spec.soft_cap * LOG2_E
    return cap - (2.0 * cap) / (power + 1.0)


def broadcast_rows(x_m: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x_m, like.shape, (0,))


def broadcast_columns(x_t: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x_t, like.shape, (1,))


class Weights(NamedTuple):
    """A tile's weights, and the state up to before its values are added."""

    weight_mt: jax.Array  # float32
    state: Softmax


def weigh(state: Softmax, score_mt: jax.Array, *, may_be_masked: bool) -> Weights:
    """Online softmax over one more tile (FlashAttention-2, Dao 2023); scores in base 2.

    A row that has seen nothing yet has a maximum of -inf, and -inf minus -inf is NaN: where that
    can be, the maximum is replaced by 0 in the differences.
    """
    max_m = jnp.maximum(state.max_m, score_mt.max(axis=1))
    base_m = max_m
    if may_be_masked:
        base_m = jnp.where(max_m == -math.inf, jnp.zeros_like(max_m), max_m)
    fade_m = jnp.exp2(state.max_m - base_m)
    weight_mt = jnp.exp2(score_mt - broadcast_rows(base_m, score_mt))
    acc_mh = state.acc_mh * broadcast_rows(fade_m, state.acc_mh)
    sum_m = state.sum_m * fade_m + weight_mt.sum(axis=1)
    return Weights(weight_mt, Softmax(acc_mh, max_m, sum_m))


def with_sink(state: Softmax, sink_m: jax.Array) -> Softmax:
    """The state after one more logit, which has no value."""
    sink_m = sink_m * LOG2_E
    max_m = jnp.maximum(state.max_m, sink_m)
    fade_m = jnp.exp2(state.max_m - max_m)
    sum_m = state.sum_m * fade_m + jnp.exp2(sink_m - max_m)
    return Softmax(state.acc_mh * broadcast_rows(fade_m, state.acc_mh), max_m, sum_m)


class Finished(NamedTuple):
    """A finished softmax."""

    out_mh: jax.Array  # float32
    lse_m: jax.Array  # natural logarithm


def finish(state: Softmax) -> Finished:
    """Outputs and log-sum-exp; zeros and -inf where nothing was seen."""
    is_seen_m = state.sum_m > 0.0
    sum_m = jnp.where(is_seen_m, state.sum_m, jnp.ones_like(state.sum_m))
    out_mh = state.acc_mh * broadcast_rows(1.0 / sum_m, state.acc_mh)
    return Finished(out_mh, state.max_m * LN_2 + jnp.log(sum_m))


def tile_pair(shape: tuple[int, ...], dtype: Any) -> "tuple[Any, Any]":
    """Shared memory [..., tile, H] for keys and for values, ready to be multiplied."""
    return smem_tile(shape, dtype), smem_tile(shape, dtype, contracted_rows=shape[-2])


def narrow_pair(shape: tuple[int, ...], dtype: Any) -> "tuple[Any, Any]":
    """Shared memory [..., tile, H] for keys and values of 8 bits."""
    return smem_tile(shape, dtype), smem_tile(shape, dtype)


def copy_barriers(page_tiles: PageTiles, stages: int, *, has_scales: bool) -> "tuple[Any, Any]":
    """For keys and for values: a slot's barrier is passed once all copies of its tile are there."""
    arrivals = page_tiles.copies * (2 if has_scales else 1)
    barrier = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    return barrier, barrier


@dataclass(frozen=True, slots=True)
class Ring:
    """Tiles of keys and values on their way through shared memory.

    Args:
        pool_refs: the pool, and the scales if it is quantised, as `PageTiles.split` cuts them.
        smem_refs: a pair [stages, tile, H] of keys and values, and one [any, tile] of scales.
        ready: `copy_barriers`.
    """

    page_tiles: PageTiles
    machine: Machine
    pool_refs: Any
    smem_refs: "tuple[tuple[Any, Any], ...]"
    ready: Any

    def fetch(
        self,
        source: "Source",
        slots: "tuple[Any, ...]",
        parts: "tuple[int, ...]" = (KEYS, VALUES),
    ) -> None:
        """Start the copies of a tile.

        Args:
            slots: where to: of the tiles, and of the scales if there are some.
        """
        size = self.page_tiles.copy_tokens
        for index, place in enumerate(self.page_tiles.places(source)):
            tokens = pl.ds(index * size, size)
            for part in parts:
                ready = self.ready[part].at[slots[0]]
                for pool_ref, pair, slot in zip(self.pool_refs, self.smem_refs, slots, strict=True):
                    piece_ref = pool_ref.at[place.pool_row + part, source.kv_head, place.piece]
                    plgpu.copy_gmem_to_smem(piece_ref, pair[part].at[slot, tokens], ready)

    def wait(self, part: int, slot: Any) -> Any:
        """Wait for a slot's keys or values; where they are."""
        plgpu.barrier_wait(self.ready[part].at[slot])
        return self.smem_refs[0][part].at[slot]


def scaled(machine: Machine, x_mt: jax.Array, scale_smem: Any) -> jax.Array:
    """Scores or weights, each column times the scale of its key or value."""
    return x_mt * broadcast_columns(machine.load_columns(scale_smem), x_mt)


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """Numbers of 8 bits in 16; uint8 holds the bits of float8_e4m3fn.

    By way of float16: ptxas refuses the direct conversion of e4m3 to bfloat16 for sm_90a.
    """
    if x.dtype == jnp.uint8:
        x = lax.bitcast_convert_type(x, jnp.float8_e4m3fn)
    if x.dtype == jnp.float8_e4m3fn:
        x = x.astype(jnp.float16)
    return x.astype(dtype)
