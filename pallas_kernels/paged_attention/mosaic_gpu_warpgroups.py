"""What the three warpgroups of a prefill program do (see `mosaic_gpu_prefill`).

A program takes turns; in a turn, it goes with one block of query tokens and some of the query heads
of one KV head through all tiles of keys that these see. Tiles lie in a ring, slot = step % stages,
where steps count on over all turns:

    copying      wait until free, copy (8 bits: copy, widen), ready
    computing    wait until ready, scores, softmax, product with values, free

The computing warpgroups alternate: a barrier makes one issue its products while the other is at
its softmax. Every arrival at a barrier is waited for: a barrier that is a phase ahead of a waiting
thread looks like one that has not moved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_tiles as tiles
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_tiles import (
    KEYS,
    VALUES,
    WARPGROUP_ROWS,
    KeyRange,
    Machine,
    PageTiles,
    Softmax,
)
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec

COMPUTING = 2
"""Warpgroups that compute; the one after them copies."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Static sizes of a prefill launch.

    Attributes:
        stages: tiles of keys, and as many of values, in shared memory.
        narrow_stages: the same of tiles of 8 bits, before they are widened; 0 if pages are not
            quantised.
        takes_turns: the computing warpgroups alternate between softmax and tensor cores.
        num_programs: thread blocks; one fills a multiprocessor.
    """

    page_tiles: PageTiles
    stages: int
    narrow_stages: int
    takes_turns: bool
    num_programs: int

    @property
    def is_quantised(self) -> bool:
        return self.narrow_stages > 0

    @property
    def scale_stages(self) -> int:
        """Vectors of scales: they come with the narrow tiles and are used with the wide ones."""
        return self.narrow_stages + self.stages if self.is_quantised else 0

    # Three warpgroups start with 168 registers a thread, the most that 65,536 allow in steps of 8.
    # Then the one that copies gives up what the others need.
    @property
    def copying_registers(self) -> int:
        return 104 if self.is_quantised else 40

    @property
    def computing_registers(self) -> int:
        return (3 * 168 - self.copying_registers) // COMPUTING


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Which query rows a warpgroup has: `heads` of one KV head, times `tokens`, head-major.

    Attributes:
        splits_tokens: the two warpgroups have the same heads and different tokens; otherwise the
            same tokens and different heads, which is better: both then see the same keys.
        chunks: turns that together have all query heads of a KV head.
    """

    heads: int
    splits_tokens: bool
    chunks: int

    @property
    def tokens(self) -> int:
        return WARPGROUP_ROWS // self.heads

    @property
    def block_tokens(self) -> int:
        return self.tokens * (COMPUTING if self.splits_tokens else 1)

    @property
    def turn_heads(self) -> int:
        return self.heads * (1 if self.splits_tokens else COMPUTING)


class Block(NamedTuple):
    """A run of query tokens of one row, as the plan has it."""

    place: jax.Array  # where its results go
    row: jax.Array
    kv_len: jax.Array
    token: jax.Array  # first query token in the step
    position: jax.Array  # of that token in its row
    begin: jax.Array  # first tile
    end: jax.Array  # end tile
    num_blocks: jax.Array  # in use, the same for all

    @property
    def num_tiles(self) -> jax.Array:
        return self.end - self.begin


class Turn(NamedTuple):
    """A block of queries with some of the heads, as one program comes to it."""

    number: jax.Array  # over all programs
    block: Block  # of no tiles if there is nothing left
    chunk: jax.Array  # of query heads: KV head * chunks + part of it
    keys: KeyRange  # that some query sees, apart from causality
    step: jax.Array  # tiles that this program has been through before


class Scratch(NamedTuple):
    """Shared memory and barriers of a program, or their types."""

    q: Any  # the same memory as it is copied, and swizzled: [2, 64, H]
    wide: Any  # keys and values [stages, tile, H], ready to be multiplied
    narrow: Any  # ... of 8 bits, or nothing
    vectors: Any  # [scales of keys, of values, and one for each warpgroup; tile]
    q_ready: Any
    ready: Any  # of keys and of values: the wide tile is there
    narrow_ready: Any
    free: Any  # of keys and of values: both warpgroups have used the wide tile
    swap: Any  # the computing warpgroups change places
    zeroed: Any  # values that nobody may see are zero now; of each slot: see `_zero_unseen`


def scratch_types(
    dtype: Any, stored: Any, head_dim: int, launch: Launch, shape: RowTiles, *, has_sinks: bool
) -> Scratch:
    """Types of the scratch; on the device, the two forms of `q` still have to be united."""
    page_tiles, stages = launch.page_tiles, launch.stages
    tile_tokens = page_tiles.tile_tokens
    q_shape = (COMPUTING, WARPGROUP_ROWS, head_dim)
    narrow, narrow_ready = (), ()
    ready = tiles.copy_barriers(page_tiles, stages, has_scales=False)
    if launch.is_quantised:
        narrow = tiles.narrow_pair((launch.narrow_stages, tile_tokens, head_dim), stored)
        narrow_ready = tiles.copy_barriers(page_tiles, launch.narrow_stages, has_scales=True)
        ready = (plgpu.Barrier(num_barriers=stages),) * 2
    num_vectors = 2 * launch.scale_stages + COMPUTING
    return Scratch(
        q=(plgpu.SMEM(q_shape, dtype), tiles.smem_tile(q_shape, dtype)),
        wide=tiles.tile_pair((stages, tile_tokens, head_dim), dtype),
        narrow=narrow,
        vectors=plgpu.SMEM((num_vectors, tile_tokens), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=shape.heads + has_sinks, num_barriers=COMPUTING),
        ready=ready,
        narrow_ready=narrow_ready,
        free=(plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),) * 2,
        swap=plgpu.Barrier(num_arrivals=COMPUTING),
        zeroed=plgpu.Barrier(num_barriers=stages),
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which turns a program takes: with the next block each time, to and fro over the programs.

    Blocks are sorted by their tiles, so that after an even number of rounds all programs have
    done about as much.
    """

    spec: AttentionSpec
    launch: Launch
    block_ref: Any
    num_chunks: int

    def for_each(self, action: Callable[[Turn], None]) -> jax.Array:
        """Do `action` for each of this program's turns; how many tiles there were."""
        program, num_programs = lax.axis_index("program"), self.launch.num_programs
        num_turns = self.block_ref[0, len(Block._fields) - 1] * self.num_chunks

        def one_round(index: jax.Array, step: jax.Array) -> jax.Array:
            is_fro = lax.rem(index, jnp.int32(2)) == 1
            place = jnp.where(is_fro, num_programs - 1 - program, program) + index * num_programs
            turn = self.turn(jnp.minimum(place, num_turns - 1), step)
            is_used = place < num_turns
            block = turn.block._replace(end=jnp.where(is_used, turn.block.end, turn.block.begin))
            turn = turn._replace(block=block)
            action(turn)
            return step + turn.block.num_tiles

        rounds = lax.div(num_turns + (num_programs - 1), jnp.int32(num_programs))
        return lax.fori_loop(0, rounds, one_round, jnp.int32(0))

    def turn(self, index: jax.Array, step: jax.Array) -> Turn:
        """The turn of that number, over all programs."""
        at = lax.div(index, jnp.int32(self.num_chunks))
        block = Block(*(self.block_ref[at, field] for field in range(len(Block._fields))))
        first_key = jnp.int32(0)
        if self.spec.window is not None:
            first_key = jnp.maximum(block.position - self.spec.window + 1, 0)
        chunk = lax.rem(index, jnp.int32(self.num_chunks))
        return Turn(index, block, chunk, KeyRange(first_key, block.kv_len), step)


class Queries(NamedTuple):
    """Which query rows of a turn a warpgroup has, and where its results go."""

    token: jax.Array  # in the step
    position: jax.Array  # of that token in its row
    first_head: jax.Array
    split: jax.Array  # 1 for the second half of a block's tokens


@dataclass(frozen=True, slots=True)
class Computer:
    """A computing warpgroup."""

    spec: AttentionSpec
    launch: Launch
    machine: Machine
    shape: RowTiles
    smem: Scratch
    warpgroup: jax.Array

    def queries(self, turn: Turn) -> Queries:
        token, position = turn.block.token, turn.block.position
        first_head = turn.chunk * self.shape.turn_heads
        if not self.shape.splits_tokens:
            first_head += self.warpgroup * self.shape.heads
            return Queries(token, position, first_head, jnp.int32(0))
        ahead = self.warpgroup * self.shape.tokens
        return Queries(token + ahead, position + ahead, first_head, self.warpgroup)

    def take_queries(self, queries: Queries, q_ref: Any, sink_ref: Any) -> None:
        """Bring this warpgroup's query rows to where wgmma reads them, and their sinks.

        A copy can swizzle only what begins at a multiple of 8 tokens, and a row begins anywhere.
        """
        plain, swizzled = self.smem.q
        tokens, q_ready = self.shape.tokens, self.smem.q_ready.at[self.warpgroup]
        for head in range(self.shape.heads):
            source = q_ref.at[pl.ds(queries.token, tokens), queries.first_head + head]
            place = plain.at[self.warpgroup, pl.ds(head * tokens, tokens)]
            plgpu.copy_gmem_to_smem(source, place, q_ready)
        if sink_ref is not None:
            plgpu.copy_gmem_to_smem(sink_ref, self._vector(), q_ready)
        plgpu.barrier_wait(q_ready)
        q_mh = self.machine.load_plain_tile(plain.at[self.warpgroup])
        swizzled.at[self.warpgroup][...] = q_mh
        plgpu.commit_smem()

    def attend(self, turn: Turn, queries: Queries) -> Softmax:
        """Go through all tiles; only those that some query does not see whole are masked."""
        tile_tokens, window = jnp.int32(self.launch.page_tiles.tile_tokens), self.spec.window
        block = turn.block
        whole_begin, whole_end = block.begin, lax.div(block.position + 1, tile_tokens)
        if window is not None:
            first_of_last = jnp.maximum(block.position + self.shape.block_tokens - window, 0)
            whole_begin = lax.div(first_of_last + tile_tokens - 1, tile_tokens)
            whole_begin = jnp.clip(whole_begin, block.begin, block.end)
        whole_end = jnp.clip(whole_end, whole_begin, block.end)

        def whole_tile(tile: jax.Array, state: Softmax) -> Softmax:
            return self._one_tile(turn, queries, tile, state, is_cut=False)

        def cut_tile(tile: jax.Array, state: Softmax) -> Softmax:
            return self._one_tile(turn, queries, tile, state, is_cut=True)

        state = tiles.empty_softmax(self.machine, self.smem.q[1].shape[-1])
        pl.when(self.warpgroup == 1)(self._swap)
        if window is not None:
            state = lax.fori_loop(block.begin, whole_begin, cut_tile, state)
        state = lax.fori_loop(whole_begin, whole_end, whole_tile, state)
        state = lax.fori_loop(whole_end, block.end, cut_tile, state)
        pl.when(self.warpgroup == 0)(self._swap)
        return state

    def give_results(
        self, state: Softmax, queries: Queries, out_ref: Any, lse_ref: Any, *, has_sinks: bool
    ) -> None:
        """Write outputs [splits, tokens, Q, H] and lse [64]."""
        vector = self._vector()
        if has_sinks:
            state = tiles.with_sink(state, self.machine.load_rows(vector))
        done = tiles.finish(state)
        out_smem, tokens = self.smem.q[1].at[self.warpgroup], self.shape.tokens
        out_smem[...] = done.out_mh.astype(out_smem.dtype)
        vector[...] = done.lse_m
        plgpu.commit_smem()
        for head in range(self.shape.heads):
            place = out_smem.at[pl.ds(head * tokens, tokens)]
            head_ref = out_ref.at[queries.split, :, queries.first_head + head]
            plgpu.copy_smem_to_gmem(place, head_ref)
        plgpu.copy_smem_to_gmem(vector, lse_ref)
        plgpu.wait_smem_to_gmem(0)

    def _vector(self) -> Any:
        """[64] in shared memory: the rows' sinks, later their lse."""
        row = 2 * self.launch.scale_stages + self.warpgroup
        return self.smem.vectors.at[row, pl.ds(0, WARPGROUP_ROWS)]

    def _swap(self) -> None:
        """Wait until the other warpgroup comes here, too."""
        self._offer_swap()
        self._await_swap()

    def _offer_swap(self) -> None:
        if self.launch.takes_turns:
            plgpu.barrier_arrive(self.smem.swap)

    def _await_swap(self) -> None:
        if self.launch.takes_turns:
            plgpu.barrier_wait(self.smem.swap)

    def _one_tile(
        self, turn: Turn, queries: Queries, tile: jax.Array, state: Softmax, *, is_cut: bool
    ) -> Softmax:
        machine, smem = self.machine, self.smem
        step = turn.step + (tile - turn.block.begin)
        slot = lax.rem(step, jnp.int32(self.launch.stages))
        q_smem, v_smem = smem.q[1].at[self.warpgroup], smem.wide[VALUES].at[slot]
        plgpu.barrier_wait(smem.ready[KEYS].at[slot])
        score_mt = machine.scores(q_smem, smem.wide[KEYS].at[slot], self._swap)
        plgpu.barrier_arrive(smem.free[KEYS].at[slot])
        score_mt = tiles.capped_base2(self._scaled(score_mt, KEYS, step), self.spec)
        sees_mt = self._sees(turn, queries, tile, score_mt) if is_cut else None
        if sees_mt is not None:
            score_mt = jnp.where(sees_mt, score_mt, -jnp.inf)
        weight_mt, state = tiles.weigh(state, score_mt, may_be_masked=is_cut)
        if self.launch.is_quantised:
            # The scales are there before the values are widened, but only this barrier says so.
            plgpu.barrier_wait(smem.ready[VALUES].at[slot])
            weight_mt = self._scaled(weight_mt, VALUES, step)
            if sees_mt is not None:  # The scales of what is not seen may be NaN.
                weight_mt = jnp.where(sees_mt, weight_mt, jnp.zeros_like(weight_mt))
        weight_mt, state = machine.settled((weight_mt.astype(q_smem.dtype), state))
        self._offer_swap()
        if not self.launch.is_quantised:
            plgpu.barrier_wait(smem.ready[VALUES].at[slot])
        self._await_swap()
        if is_cut and not self.launch.is_quantised:
            self._zero_unseen(turn, v_smem, tile, smem.zeroed.at[slot])
        acc_mh = machine.accumulate(state.acc_mh, weight_mt, v_smem)
        plgpu.barrier_arrive(smem.free[VALUES].at[slot])
        return state._replace(acc_mh=acc_mh)

    def _scaled(self, x_mt: jax.Array, part: int, step: jax.Array) -> jax.Array:
        stages = self.launch.scale_stages
        if not stages:
            return x_mt
        row = part * stages + lax.rem(step, jnp.int32(stages))
        return tiles.scaled(self.machine, x_mt, self.smem.vectors.at[row])

    def _sees(self, turn: Turn, queries: Queries, tile: jax.Array, like: jax.Array) -> jax.Array:
        """Which keys of a tile which query rows see."""
        first = tile * like.shape[1]
        column_mt = self.machine.iota(like.shape, 1)
        token_m = self.machine.row_iota(like.shape[0]) & (self.shape.tokens - 1)
        position_m = (queries.position - first) + token_m
        last_m = jnp.minimum(position_m, turn.block.kv_len - 1 - first)
        sees_mt = column_mt <= tiles.broadcast_rows(last_m, like)
        if self.spec.window is not None:
            sees_mt &= column_mt > tiles.broadcast_rows(position_m - self.spec.window, like)
        return sees_mt

    def _zero_unseen(self, turn: Turn, v_smem: Any, tile: jax.Array, zeroed: Any) -> None:
        """The first warpgroup zeroes what nobody may see, before either multiplies.

        Without turns it may be as many tiles ahead as there are slots, so each slot has a barrier
        of its own: it is filled again only when the second warpgroup has been through, too.
        """
        first = tile * v_smem.shape[0]

        @pl.when(turn.keys.cuts(first, v_smem.shape[0]))
        def _some_unseen() -> None:
            @pl.when(self.warpgroup == 0)
            def _zero() -> None:
                self.machine.zero_rows_outside(v_smem, first, turn.keys)
                plgpu.barrier_arrive(zeroed)

            pl.when(self.warpgroup != 0)(lambda: plgpu.barrier_wait(zeroed))


@dataclass(frozen=True, slots=True)
class Copier:
    """The copying warpgroup: it keeps the ring full."""

    launch: Launch
    machine: Machine
    smem: Scratch
    pool_refs: Any
    table_ref: Any
    layer: jax.Array
    chunks: int  # turns for all query heads of a KV head

    def copy_tiles(self, turn: Turn) -> None:
        """Bring all tiles of a turn, each as soon as its slot is free."""
        launch = self.launch
        for ahead in range(launch.narrow_stages):
            self._fetch_narrow(turn, jnp.int32(ahead))

        def one_tile(index: jax.Array, _: None) -> None:
            step = turn.step + index
            slot = lax.rem(step, jnp.int32(launch.stages))
            for part in (KEYS, VALUES):
                free = self.smem.free[part].at[slot]
                pl.when(step >= launch.stages)(lambda free=free: plgpu.barrier_wait(free))
                if launch.is_quantised:
                    self._widen(turn, index, slot, part)
                else:
                    self._fetch(turn, index, slot, part)
            if launch.is_quantised:
                self._fetch_narrow(turn, index + launch.narrow_stages)

        lax.fori_loop(0, turn.block.num_tiles, one_tile, None)

    def drain(self, num_steps: jax.Array) -> None:
        """Wait until the last tiles have been used."""

        def one_slot(step: jax.Array, _: None) -> None:
            slot = lax.rem(step, jnp.int32(self.launch.stages))
            for part in (KEYS, VALUES):
                plgpu.barrier_wait(self.smem.free[part].at[slot])

        lax.fori_loop(jnp.maximum(num_steps - self.launch.stages, 0), num_steps, one_slot, None)

    def _fetch(self, turn: Turn, index: jax.Array, slot: jax.Array, part: int) -> None:
        """Start the copies of keys or values that are multiplied as they are."""
        ring = self._ring((self.smem.wide,), self.smem.ready)
        source = self._source(turn, index)
        self.machine.from_one_warp(lambda: ring.fetch(source, (slot,), (part,)))

    def _fetch_narrow(self, turn: Turn, index: jax.Array) -> None:
        """Start the copies of a tile of 8 bits and its scales, if there is one more."""
        launch, step = self.launch, turn.step + index
        depths = (launch.narrow_stages, launch.scale_stages)
        slots = tuple(lax.rem(step, jnp.int32(depth)) for depth in depths)
        scales = tuple(
            self.smem.vectors.at[pl.ds(part * launch.scale_stages, launch.scale_stages)]
            for part in (KEYS, VALUES)
        )
        ring = self._ring((self.smem.narrow, scales), self.smem.narrow_ready)

        @pl.when(index < turn.block.num_tiles)
        def _is_a_tile() -> None:
            source = self._source(turn, index)
            self.machine.from_one_warp(lambda: ring.fetch(source, slots))

    def _widen(self, turn: Turn, index: jax.Array, slot: jax.Array, part: int) -> None:
        """Put a tile of 8 bits where it is multiplied; zero the values that nobody may see."""
        narrow_slot = lax.rem(turn.step + index, jnp.int32(self.launch.narrow_stages))
        narrow = self._ring((self.smem.narrow,), self.smem.narrow_ready)
        wide_smem = self.smem.wide[part].at[slot]
        self.machine.widen_tile(narrow.wait(part, narrow_slot), wide_smem)
        if part == VALUES:
            size = self.launch.page_tiles.tile_tokens
            first = (turn.block.begin + index) * size
            pl.when(turn.keys.cuts(first, size))(
                lambda: self.machine.zero_rows_outside(wide_smem, first, turn.keys)
            )
        plgpu.barrier_arrive(self.smem.ready[part].at[slot])

    def _ring(self, smem_refs: Any, ready: Any) -> tiles.Ring:
        return tiles.Ring(self.launch.page_tiles, self.machine, self.pool_refs, smem_refs, ready)

    def _source(self, turn: Turn, index: jax.Array) -> tiles.Source:
        kv_head = lax.div(turn.chunk, jnp.int32(self.chunks))
        tile = turn.block.begin + index
        return tiles.Source(self.table_ref, self.layer, turn.block.row, kv_head, tile, turn.keys)
