"""The attention kernels of the `tpu` backend: one loop over chunks of keys, two launches.

A *tile* is what one program attends with: the query of a decode row, or a run of a prefill row's
queries. A *chunk* is how many keys it takes at a time: some pages, copied from HBM while the chunk
before is computed. The chunks of all tiles form one sequence,

    tile 0: c0 c1 c2 | tile 1: c3 | tile 2: (no keys) | tile 3: c4 c5 ...

in which chunk number n lies in buffer n % 2, so that the copies run ahead over the ends of tiles,
too. A TPU core runs its programs one after the other: there is nothing to win by splitting a row's
keys over programs, as GPUs do for decode. A tile's row of the page table comes into scalar memory
while the tile before is computed: the whole table may be too large for it.

The rows of a tile's queries are in head-major order, row g*B + b is query b of head g of its group;
B is a power of two, so that the query of a row is found without a division.

Knows nothing of how tiles are chosen.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NEG_INF = -1e30
LANES = 128
Q_ALIGNMENT = 16
"""Tiles of queries begin at multiples of this: the rows of a 16-bit vector register's tile."""
VMEM_LIMIT_BYTES = 64 << 20  # of 128 MiB on v5e and v6e


class Tiles(NamedTuple):
    """What programs attend to: int32, one entry a tile; those without chunks are padding.

    Attributes:
        row: of the page table.
        position: of the first query.
        end: keys [.., end) are seen by some query.
        first_chunk, num_chunks: of the row.
        number: of the first chunk in the sequence over all tiles.
        next_tile: that has chunks; itself if there is none.
        ordinal: among the tiles that have chunks.
        q_start: place of its queries.
    """

    row: jax.Array
    position: jax.Array
    end: jax.Array
    first_chunk: jax.Array
    num_chunks: jax.Array
    number: jax.Array
    next_tile: jax.Array
    ordinal: jax.Array
    q_start: jax.Array


@dataclass(frozen=True)
class Shape:
    """Everything static about a launch.

    Attributes:
        num_tile_rows: rows of a tile's queries, padding included.
        tile_queries: queries of a tile, a power of two.
        head_block: KV heads that a program does.
        chunk_pages: pages of a chunk.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    latent_dim: int | None
    page_size: int
    num_tile_rows: int
    tile_queries: int
    head_block: int
    chunk_pages: int
    compute: Any
    scale: float
    window: int | None
    soft_cap: float | None
    is_quantised: bool
    has_sinks: bool
    needs_lse: bool
    interpret: Any

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_pages * self.page_size

    @property
    def parts(self) -> int:
        """Vectors of a token and head: key and value, or a latent that is both."""
        return 2 if self.latent_dim is None else 1

    @property
    def value_dim(self) -> int:
        return self.latent_dim or self.head_dim

    @property
    def num_head_blocks(self) -> int:
        return self.num_kv_heads // self.head_block


def make_tiles(
    shape: Shape,
    row_b: jax.Array,
    position_b: jax.Array,
    num_queries_b: jax.Array,
    q_start_b: jax.Array,
) -> Tiles:
    """Tiles and the sequence of their chunks; a tile without queries has none."""
    chunk = shape.chunk_tokens
    end = jnp.where(num_queries_b > 0, position_b + num_queries_b, 0)
    first = jnp.zeros_like(end)
    if shape.window is not None:
        first = jnp.maximum(position_b - shape.window + 1, 0) // chunk
    count = jnp.where(end > 0, -(-end // chunk) - first, 0)
    index = jnp.arange(end.shape[0], dtype=jnp.int32)
    # The nearest tile from here on that has chunks, and of that the one after this one.
    here = jnp.where(count > 0, index, end.shape[0])
    from_here = lax.cummin(here, reverse=True)
    after = jnp.append(from_here[1:], end.shape[0])
    fields = (row_b, position_b, end, first, count, jnp.cumsum(count) - count)
    next_tile = jnp.where(after < end.shape[0], after, index)
    ordinal = jnp.cumsum(count > 0) - 1
    return Tiles(*(x.astype(jnp.int32) for x in (*fields, next_tile, ordinal, q_start_b)))


class _Refs(NamedTuple):
    """What both kernels read and keep; `scales` and their buffers only if pages are quantised."""

    layer: Any  # SMEM [1]
    tiles: Any  # SMEM [fields, tiles]
    table: Any  # HBM [R, M / 128, 128]: pages
    pool: Any  # HBM [rows, K, P, H]
    scales: Any  # HBM [rows, K, P]
    kv: Any  # VMEM [2, pages, parts, K', P, H]
    kv_scales: Any  # VMEM [2, pages, parts, K', P]
    pages: Any  # SMEM [2, M / 128, 128]: of the table, this tile's row and the next one's
    sems: Any  # DMA [2]
    page_sems: Any  # DMA [2]
    max: Any  # VMEM [K', rows, 128], all lanes equal
    sum: Any  # VMEM [K', rows, 128], all lanes equal
    acc: Any  # VMEM [K', rows, value_dim]


def _field(refs: _Refs, name: str, tile: Any) -> Any:
    return refs.tiles[Tiles._fields.index(name), tile]


def _copies(shape: Shape, refs: _Refs, tile: Any, heads: Any, chunk: Any, slot: Any, act: Any):
    """`act` on the copy of each page of a chunk that holds a key which the tile sees."""
    first = chunk * shape.chunk_pages
    begin = first
    if shape.window is not None:
        earliest = jnp.maximum(_field(refs, "position", tile) - shape.window + 1, 0)
        begin = jnp.maximum(first, earliest // shape.page_size)
    end = jnp.minimum(
        first + shape.chunk_pages, pl.cdiv(_field(refs, "end", tile), shape.page_size)
    )
    pages = refs.pages.at[lax.rem(_field(refs, "ordinal", tile), 2)]
    block = pl.ds(heads * shape.head_block, shape.head_block)

    def one_page(page, _):
        id_in_pool = pages[page // LANES, lax.rem(page, LANES)]
        # Keys, and values in the row after them; or latents.
        parts = shape.parts
        both = pl.ds((id_in_pool * shape.num_layers + refs.layer[0]) * parts, parts)
        to, sem = page - first, refs.sems.at[slot]
        act(pltpu.make_async_copy(refs.pool.at[both, block], refs.kv.at[slot, to], sem))
        if shape.is_quantised:
            source = refs.scales.at[both, block]
            act(pltpu.make_async_copy(source, refs.kv_scales.at[slot, to], sem))
        return 0

    lax.fori_loop(begin, end, one_page, 0)


def _page_row(refs: _Refs, tile: Any) -> Any:
    """The copy of a tile's row of the page table."""
    slot = lax.rem(_field(refs, "ordinal", tile), 2)
    source = refs.table.at[_field(refs, "row", tile)]
    return pltpu.make_async_copy(source, refs.pages.at[slot], refs.page_sems.at[slot])


def _attend(shape: Shape, refs: _Refs, tile: Any, heads: Any, load_q: Any) -> None:
    """Attend with a tile's queries, `load_q(head)` [rows, H], to all its chunks."""
    count = _field(refs, "num_chunks", tile)
    first_chunk = _field(refs, "first_chunk", tile)
    number = _field(refs, "number", tile) * shape.num_head_blocks + heads * count
    is_last_block = heads == shape.num_head_blocks - 1
    next_tile = jnp.where(is_last_block, _field(refs, "next_tile", tile), tile)
    next_heads = jnp.where(is_last_block, 0, heads + 1)
    there_is_more = ~is_last_block | (next_tile != tile)
    start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())

    @pl.when((count > 0) & (number == 0))
    def _():
        _page_row(refs, tile).start()
        _page_row(refs, tile).wait()
        _copies(shape, refs, tile, heads, first_chunk, 0, start)

    @pl.when((count > 0) & (heads == 0) & (_field(refs, "next_tile", tile) != tile))
    def _():
        _page_row(refs, _field(refs, "next_tile", tile)).start()

    def one_chunk(index, _):
        slot = lax.rem(number + index, 2)
        is_last = index == count - 1
        ahead_tile = jnp.where(is_last, next_tile, tile)
        ahead_heads = jnp.where(is_last, next_heads, heads)
        ahead_chunk = jnp.where(
            is_last, _field(refs, "first_chunk", next_tile), first_chunk + index + 1
        )

        @pl.when(is_last & is_last_block & there_is_more)
        def _():
            _page_row(refs, next_tile).wait()

        @pl.when(~is_last | there_is_more)
        def _():
            _copies(shape, refs, ahead_tile, ahead_heads, ahead_chunk, 1 - slot, start)

        chunk = first_chunk + index
        _copies(shape, refs, tile, heads, chunk, slot, wait)
        _attend_chunk(shape, refs, tile, chunk, slot, load_q)
        return 0

    lax.fori_loop(0, count, one_chunk, 0)


def _attend_chunk(shape: Shape, refs: _Refs, tile: Any, chunk: Any, slot: Any, load_q: Any) -> None:
    position, end = _field(refs, "position", tile), _field(refs, "end", tile)
    begin = jnp.int32(0)
    if shape.window is not None:
        begin = jnp.maximum(position - shape.window + 1, 0)
    first = chunk * shape.chunk_tokens
    last = first + shape.chunk_tokens

    # Keys that no query of the tile sees hold anything: a weight of 0 does not hold back their NaN.
    @pl.when((first < begin) | (last > end))
    def _():
        pages = (shape.chunk_pages, shape.head_block, shape.page_size, shape.head_dim)
        k_position = first + _token_of(pages, page_axis=0, token_axis=2)
        values = refs.kv[slot, :, shape.parts - 1]
        is_held = (k_position >= begin) & (k_position < end)
        refs.kv[slot, :, shape.parts - 1] = jnp.where(is_held, values, jnp.zeros_like(values))

    score_shape = (shape.num_tile_rows, shape.chunk_tokens)
    row = lax.broadcasted_iota(jnp.int32, score_shape, 0)
    q_position = position + (row & (shape.tile_queries - 1))
    k_position = first + lax.broadcasted_iota(jnp.int32, score_shape, 1)
    is_seen = (k_position <= q_position) & (k_position < end)
    if shape.window is not None:
        is_seen &= k_position > q_position - shape.window
    is_held = None
    if shape.is_quantised:
        k_position = first + lax.broadcasted_iota(jnp.int32, (1, shape.chunk_tokens), 1)
        is_held = (k_position >= begin) & (k_position < end)
    for head in range(shape.head_block):
        _attend_head(shape, refs, slot, head, load_q(head), is_seen, is_held)


def _attend_head(
    shape: Shape, refs: _Refs, slot: Any, head: int, q: Any, is_seen: Any, is_held: Any
) -> None:
    """One step of the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022)."""
    precision = lax.Precision.HIGHEST if shape.compute == jnp.float32 else lax.Precision.DEFAULT
    k = _load(shape, refs.kv[slot, :, 0, head])
    if shape.latent_dim is not None:
        v = k[:, : shape.latent_dim]
    else:
        v = _load(shape, refs.kv[slot, :, 1, head])
    scores = lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
    )
    scores *= jnp.float32(shape.scale)
    if shape.is_quantised:
        scores *= _scales_of(shape, refs.kv_scales[slot, :, 0, head])
    if shape.soft_cap is not None:
        scores = shape.soft_cap * jnp.tanh(scores * jnp.float32(1 / shape.soft_cap))
    scores = jnp.where(is_seen, scores, NEG_INF)
    old_max = refs.max[head]
    new_max = jnp.maximum(old_max, scores.max(axis=1, keepdims=True))
    # The floor lies above NEG_INF: what is not seen has weight 0 also where nothing is seen yet.
    weights = jnp.exp(scores - jnp.maximum(new_max[:, :1], 0.1 * NEG_INF))
    fade = jnp.exp(old_max - new_max)
    refs.sum[head] = refs.sum[head] * fade + weights.sum(axis=1, keepdims=True)
    refs.max[head] = new_max
    if shape.is_quantised:
        scale = _scales_of(shape, refs.kv_scales[slot, :, shape.parts - 1, head])
        weights *= jnp.where(is_held, scale, 0.0)
    refs.acc[head] = refs.acc[head] * fade[:, :1] + lax.dot_general(
        weights.astype(shape.compute),
        v,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision,
    )


def _load(shape: Shape, stored: Any) -> Any:
    """[pages, P, H] as stored to [tokens, H] to compute with."""
    if stored.dtype == jnp.uint8:
        stored = pltpu.bitcast(stored, jnp.float8_e4m3fn)
    elif stored.dtype == jnp.uint16:
        stored = pltpu.bitcast(stored, shape.compute)
    return stored.astype(shape.compute).reshape(shape.chunk_tokens, shape.head_dim)


def _scales_of(shape: Shape, scales: Any) -> Any:
    """[pages, P] to [1, tokens]."""
    return scales.reshape(1, shape.chunk_tokens)


def _token_of(shape: tuple[int, ...], *, page_axis: int, token_axis: int) -> Any:
    """The token's place in a chunk, for each element of an array over its pages and tokens."""
    page = lax.broadcasted_iota(jnp.int32, shape, page_axis)
    return page * shape[token_axis] + lax.broadcasted_iota(jnp.int32, shape, token_axis)


def _begin(shape: Shape, refs: _Refs, sinks_ref: Any) -> None:
    """A sink is a key of that score, whose value is zero."""
    refs.acc[...] = jnp.zeros_like(refs.acc)
    if shape.has_sinks:
        refs.max[...] = sinks_ref[...]
        refs.sum[...] = jnp.ones_like(refs.sum)
    else:
        refs.max[...] = jnp.full_like(refs.max, NEG_INF)
        refs.sum[...] = jnp.zeros_like(refs.sum)


def _finish(refs: _Refs, out_ref: Any, lse_ref: Any) -> None:
    """Into blocks of whatever shape, [K', rows, ...] in order; `lse_ref` may be None."""
    total = refs.sum[...]
    is_any = total > 0
    total = jnp.where(is_any, total, 1.0)
    out = refs.acc[...] / total[:, :, :1]
    out_ref[...] = out.astype(out_ref.dtype).reshape(out_ref.shape)
    if lse_ref is not None:
        lse = jnp.where(is_any, refs.max[...] + jnp.log(total), -jnp.inf)
        lse_ref[...] = lse.reshape(lse_ref.shape)


class _Operands(NamedTuple):
    """Inputs and outputs of a launch as its kernel sees them."""

    q: Any
    sinks: Any  # VMEM [K', rows, 128], all lanes equal
    out: Any
    lse: Any


def _unpack(refs: tuple[Any, ...], shape: Shape) -> tuple[_Operands, _Refs, tuple[Any, ...]]:
    """By name, in the order of `_launch`; the last are scratch of one kernel only."""
    rest = iter(refs)
    layer, tiles, table, q, pool = (next(rest) for _ in range(5))
    scales = next(rest) if shape.is_quantised else None
    sinks = next(rest) if shape.has_sinks else None
    out = next(rest)
    lse = next(rest) if shape.needs_lse else None
    kv = next(rest)
    kv_scales = next(rest) if shape.is_quantised else None
    buffers = [next(rest) for _ in range(6)]
    state = _Refs(layer, tiles, table, pool, scales, kv, kv_scales, *buffers)
    return _Operands(q, sinks, out, lse), state, tuple(rest)


def _decode_kernel(*refs: Any, shape: Shape) -> None:
    io, state, _ = _unpack(refs, shape)
    tile, heads = pl.program_id(0), pl.program_id(1)
    _begin(shape, state, io.sinks)
    _attend(shape, state, tile, heads, lambda head: io.q[0, head])
    _finish(state, io.out, io.lse)


def _prefill_kernel(*refs: Any, shape: Shape) -> None:
    """Queries come and results go by copies of its own: tiles begin at any 16th query.

    A tile's tail may reach over the end of its row; what lands behind that is overwritten by the
    tile that comes after, so a result is written when the one before has arrived.
    """
    io, state, (q_buffer, out_buffer, lse_buffer, q_sems, out_sem) = _unpack(refs, shape)
    tile, heads = pl.program_id(0), pl.program_id(1)
    number = tile * shape.num_head_blocks + heads
    is_last = number == pl.num_programs(0) * shape.num_head_blocks - 1
    slot = lax.rem(number, 2)

    def part(ref: Any, tile: Any, heads: Any) -> Any:
        block = pl.ds(heads * shape.head_block, shape.head_block)
        start = pl.multiple_of(_field(state, "q_start", tile), Q_ALIGNMENT)
        return ref.at[block, :, pl.ds(start, shape.tile_queries)]

    def load(tile: Any, heads: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(part(io.q, tile, heads), q_buffer.at[slot], q_sems.at[slot])

    def stores() -> list[Any]:
        copies = [pltpu.make_async_copy(out_buffer, part(io.out, tile, heads), out_sem)]
        if shape.needs_lse:
            copies.append(pltpu.make_async_copy(lse_buffer, part(io.lse, tile, heads), out_sem))
        return copies

    @pl.when(number == 0)
    def _():
        load(tile, heads, slot).start()

    @pl.when(~is_last)
    def _():
        is_last_block = heads == shape.num_head_blocks - 1
        after = jnp.where(is_last_block, tile + 1, tile)
        load(after, jnp.where(is_last_block, 0, heads + 1), 1 - slot).start()

    load(tile, heads, slot).wait()
    _begin(shape, state, io.sinks)
    rows = (shape.num_tile_rows, shape.head_dim)
    _attend(shape, state, tile, heads, lambda head: q_buffer[slot, head].reshape(rows))

    @pl.when(number > 0)
    def _():
        for copy in stores():
            copy.wait()

    _finish(state, out_buffer, lse_buffer if shape.needs_lse else None)
    for copy in stores():
        copy.start()

    @pl.when(is_last)
    def _():
        for copy in stores():
            copy.wait()


class Inputs(NamedTuple):
    """Arrays of a launch.

    Attributes:
        layer: [1].
        table_rml: pages, [R, M / 128, 128].
        q: queries; decode [R, K, rows, H], prefill [K, G, slots, H].
        sinks_kxl: [K, rows, 128], all lanes equal.
    """

    layer: jax.Array
    table_rml: jax.Array
    tiles: Tiles
    num_tiles: jax.Array
    q: jax.Array
    pool_rkph: jax.Array
    scales_rkp: jax.Array | None
    sinks_kxl: jax.Array | None


def launch_decode(shape: Shape, inputs: Inputs) -> tuple[jax.Array, jax.Array | None]:
    """One program a row. Rows that are no tile hold anything afterwards.

    Returns:
        Outputs of the width of values, and log-sum-exps [R, K, rows, 128] with equal lanes.
    """
    block = (1, shape.head_block, shape.num_tile_rows)

    def spec(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((*block, width), lambda tile, heads, *_: (tile, heads, 0, 0))

    return _launch(
        shape,
        inputs,
        functools.partial(_decode_kernel, shape=shape),
        "paged_attention_decode",
        q_spec=spec(shape.head_dim),
        out_specs=[spec(shape.value_dim), spec(LANES)],
        scratch=[],
    )


def launch_prefill(shape: Shape, inputs: Inputs) -> tuple[jax.Array, jax.Array | None]:
    """One program a tile of queries. Slots of no tile hold anything afterwards.

    Returns:
        Outputs of the width of values, and log-sum-exps [K, G, slots, 128] with equal lanes.
    """
    num_groups = shape.num_tile_rows // shape.tile_queries
    tile = (shape.head_block, num_groups, shape.tile_queries)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return _launch(
        shape,
        inputs,
        functools.partial(_prefill_kernel, shape=shape),
        "paged_attention_prefill",
        q_spec=anywhere,
        out_specs=[anywhere, anywhere],
        scratch=[
            pltpu.VMEM((2, *tile, shape.head_dim), inputs.q.dtype),
            pltpu.VMEM((*tile, shape.value_dim), inputs.q.dtype),
            pltpu.VMEM((*tile, LANES) if shape.needs_lse else (8, LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA(()),
        ],
    )


def _launch(
    shape: Shape,
    inputs: Inputs,
    kernel: Any,
    name: str,
    *,
    q_spec: pl.BlockSpec,
    out_specs: list[pl.BlockSpec],
    scratch: list[Any],
) -> tuple[jax.Array, jax.Array | None]:
    heads, rows = shape.head_block, shape.num_tile_rows
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    arrays = [inputs.table_rml, inputs.q, inputs.pool_rkph]
    in_specs = [anywhere, q_spec, anywhere]
    page = (2, shape.chunk_pages, shape.parts, heads, shape.page_size)
    buffers: list[Any] = [pltpu.VMEM((*page, shape.head_dim), inputs.pool_rkph.dtype)]
    if inputs.scales_rkp is not None:
        arrays.append(inputs.scales_rkp)
        in_specs.append(anywhere)
        buffers.append(pltpu.VMEM(page, jnp.float32))
    if inputs.sinks_kxl is not None:
        arrays.append(inputs.sinks_kxl)
        in_specs.append(pl.BlockSpec((heads, rows, LANES), lambda tile, heads, *_: (heads, 0, 0)))
    out_shape = [jax.ShapeDtypeStruct((*inputs.q.shape[:-1], shape.value_dim), inputs.q.dtype)]
    if shape.needs_lse:
        out_shape.append(jax.ShapeDtypeStruct((*inputs.q.shape[:-1], LANES), jnp.float32))
    out, *lse = pl.pallas_call(
        kernel,
        name=name,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(inputs.num_tiles, shape.num_head_blocks),
            in_specs=in_specs,
            out_specs=out_specs[: len(out_shape)],
            scratch_shapes=[
                *buffers,
                pltpu.SMEM((2, *inputs.table_rml.shape[1:]), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, shape.value_dim), jnp.float32),
                *scratch,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            # Copies run ahead from program to program, so these have an order.
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        interpret=shape.interpret,
    )(inputs.layer, jnp.stack(inputs.tiles), *arrays)
    return out, lse[0] if lse else None
