"""Sizes of the Mosaic GPU launches, from tuned/mosaic_gpu.json.

Tiles of decode and prefill by what decides how much shared memory and how many registers they need:
whether pages are quantised, and the head dim (the first entry that is large enough). A kind of
device that is not listed gets the sizes of the H200.
"""

import functools
import importlib.resources
import json
from dataclasses import dataclass

import jax

DEFAULT_DEVICE = "NVIDIA H200"


@dataclass(frozen=True, slots=True)
class Tile:
    """One launch.

    Attributes:
        tile_tokens: keys of a tile.
        stages: tiles of keys, and as many of values, in shared memory.
        narrow_stages: of prefill with quantised pages: the same before they are widened.
    """

    is_quantised: bool
    max_head_dim: int
    tile_tokens: int
    stages: int
    narrow_stages: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """All launches on one kind of device.

    Attributes:
        decode_blocks: thread blocks that decode is cut into if the rows are long enough: a few
            for each place on a multiprocessor, so that the last ones end at about the same time.
        min_piece_tokens: a shorter piece of a row costs more to start than it saves.
        max_row_pieces: the merge reads this many places for each row, but for fewer rows more, up
            to as many as fill the device.
        prefill_programs: thread blocks of prefill: one for each multiprocessor.
        prefill_takes_turns: the computing warpgroups alternate between softmax and tensor cores.
    """

    decode_blocks: int
    min_piece_tokens: int
    max_row_pieces: int
    prefill_programs: int
    prefill_takes_turns: bool
    decode: tuple[Tile, ...]
    prefill: tuple[Tile, ...]


def find_tile(tiles: tuple[Tile, ...], *, is_quantised: bool, head_dim: int) -> Tile:
    """The first tile that is made for these.

    Raises:
        NotImplementedError: there is none.
    """
    for tile in tiles:
        if tile.is_quantised == is_quantised and head_dim <= tile.max_head_dim:
            return tile
    largest = max(tile.max_head_dim for tile in tiles)
    raise NotImplementedError(
        f"head dim {head_dim}: the largest product of wgmma is {largest} wide"
    )


def device_kind() -> str:
    """The GPU's name; that of the H200 where there is none, for which then is compiled."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else DEFAULT_DEVICE


@functools.cache
def load_tuning(kind: str) -> Tuning:
    """The sizes for that kind of device."""
    package = importlib.resources.files("jaxserve.pallas_kernels.paged_attention")
    devices = json.loads((package / "tuned" / "mosaic_gpu.json").read_text())
    found = devices.get(kind, devices[DEFAULT_DEVICE])
    return Tuning(
        decode_blocks=found["decode_blocks"],
        min_piece_tokens=found["min_piece_tokens"],
        max_row_pieces=found["max_row_pieces"],
        prefill_programs=found["prefill_programs"],
        prefill_takes_turns=found["prefill_takes_turns"],
        decode=tuple(Tile(**tile) for tile in found["decode"]),
        prefill=tuple(Tile(**tile) for tile in found["prefill"]),
    )
