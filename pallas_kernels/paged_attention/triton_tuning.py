"""Sizes of the Pallas-Triton launches, from tuned/triton.json.

For each kind of device: how many programs it takes to fill it, and the tiles of decode and prefill
by what decides how many registers they need: bytes of a query's number, whether keys are
converted on the way, and the head dim (the first entry that is large enough). A kind of device that
is not listed gets the sizes of the H200.
"""

import functools
import importlib.resources
import json
import math
from dataclasses import dataclass

import jax

DEFAULT_DEVICE = "NVIDIA H200"


@dataclass(frozen=True, slots=True)
class Tile:
    """One launch.

    Attributes:
        block_m: most query rows of a tile.
        block_k: keys of a block.
        piece: longest piece of the head dim that is one product.
    """

    query_bytes: int
    is_quantised: bool
    max_head_dim: int
    block_m: int
    block_k: int
    piece: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """All launches on one kind of device.

    Attributes:
        programs_per_sm: decode programs that are wanted for each SM.
        min_split_tokens: the shortest run of keys worth a split of its own, in the longest row.
    """

    num_sms: int
    programs_per_sm: int
    min_split_tokens: int
    decode: tuple[Tile, ...]
    prefill: tuple[Tile, ...]

    def num_splits(self, num_programs: int, max_tokens: int) -> int:
        """Splits of each row's keys: enough to fill the device, if the keys suffice.

        Args:
            num_programs: of an unsplit launch.
            max_tokens: the longest row there can be.
        """
        wanted = math.ceil(self.num_sms * self.programs_per_sm / num_programs)
        return max(1, min(wanted, max_tokens // self.min_split_tokens))


def find_tile(
    tiles: tuple[Tile, ...], *, query_bytes: int, is_quantised: bool, head_dim: int
) -> Tile:
    """The first tile that is made for these.

    Raises:
        NotImplementedError: there is none.
    """
    for tile in tiles:
        if (tile.query_bytes, tile.is_quantised) == (query_bytes, is_quantised):
            if head_dim <= tile.max_head_dim:
                return tile
    raise NotImplementedError(
        f"head dim {head_dim} with {query_bytes}-byte queries: no tile sizes are known for it"
    )


def device_kind() -> str:
    """The GPU's name; that of the H200 where there is none, for which then is compiled."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else DEFAULT_DEVICE


@functools.cache
def load_tuning(kind: str) -> Tuning:
    """The sizes for that kind of device."""
    package = importlib.resources.files("jaxserve.pallas_kernels.paged_attention")
    devices = json.loads((package / "tuned" / "triton.json").read_text())
    found = devices.get(kind, devices[DEFAULT_DEVICE])
    return Tuning(
        num_sms=found["num_sms"],
        programs_per_sm=found["programs_per_sm"],
        min_split_tokens=found["min_split_tokens"],
        decode=tuple(Tile(**tile) for tile in found["decode"]),
        prefill=tuple(Tile(**tile) for tile in found["prefill"]),
    )
