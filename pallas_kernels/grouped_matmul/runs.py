"""Cuts runs of rows into tiles, none of which spans two runs. XLA does it once for a layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Tiles(NamedTuple):
    """Tiles of rows, in order.

    Attributes:
        run_n: which run a tile is of; the number of runs for the rows after the last run, and for
            tiles that are not used.
        begin_n, end_n: rows of the tile, [begin, end); empty for tiles that are not used.
    """

    run_n: Int[Array, " N"]
    begin_n: Int[Array, " N"]
    end_n: Int[Array, " N"]


def cut(sizes_e: Int[Array, " E"], num_rows: int, tile_rows: int) -> Tiles:
    """Tiles of at most `tile_rows` rows that cover all rows; as many as could be needed."""
    rest = num_rows - sizes_e.sum(dtype=jnp.int32)
    size_r = jnp.concatenate([sizes_e, rest[None]])  # the rows after the last run are one more
    end_r = jnp.cumsum(size_r, dtype=jnp.int32)
    tiles_r = (size_r + tile_rows - 1) // tile_rows
    last_r = jnp.cumsum(tiles_r, dtype=jnp.int32)
    num_tiles = max_tiles(sizes_e.shape[0], num_rows, tile_rows)
    tile_n = jnp.arange(num_tiles, dtype=jnp.int32)
    run_n = (last_r[None, :] <= tile_n[:, None]).sum(axis=1, dtype=jnp.int32)
    is_used_n = run_n < size_r.shape[0]
    run_n = jnp.minimum(run_n, size_r.shape[0] - 1)
    within_n = (tile_n - (last_r - tiles_r)[run_n]) * tile_rows
    begin_n = jnp.where(is_used_n, (end_r - size_r)[run_n] + within_n, num_rows)
    end_n = jnp.where(is_used_n, jnp.minimum(begin_n + tile_rows, end_r[run_n]), num_rows)
    return Tiles(run_n, begin_n, end_n)


def max_tiles(num_runs: int, num_rows: int, tile_rows: int) -> int:
    """No sizes of runs make more tiles than this."""
    # A run of one row is a tile; each further tile of a run takes a full one before it.
    num_short = min(num_runs + 1, num_rows)
    return num_short + (num_rows - num_short) // tile_rows


def is_in_runs(sizes_e: jax.Array, num_rows: int) -> jax.Array:
    """[M, 1] bool: rows that belong to a run."""
    return (jnp.arange(num_rows, dtype=jnp.int32) < sizes_e.sum(dtype=jnp.int32))[:, None]
