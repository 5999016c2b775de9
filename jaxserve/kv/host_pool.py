"""The host tier's memory: one page-aligned allocation, cut into slots.

A slot holds the blocks of all KV groups under one name, group after group, each from a 64-byte
boundary on. The allocation is made resident at once, so that the memory asked for is the memory
used, from the start. Knows nothing of names, policies or devices.
"""

import mmap
from collections.abc import Sequence

import numpy as np

from jaxserve.errors import ConfigError

ALIGNMENT = 64


class HostPool:
    """Memory of the host tier.

    Args:
        num_bytes: size of the allocation; what is left over after the last slot stays unused.
        block_shapes: per KV group, the shape of one block: [L, 2, K, P, H].
        dtype: what blocks are made of.

    Raises:
        ConfigError: the memory cannot be had, or has no room for one slot.
    """

    def __init__(self, num_bytes: int, block_shapes: Sequence[tuple[int, ...]], dtype: np.dtype):
        self._dtype = np.dtype(dtype)
        self._shapes = tuple(block_shapes)
        sizes = [int(np.prod(shape)) * self._dtype.itemsize for shape in self._shapes]
        self._sizes, self._offsets = sizes, []
        offset = 0
        for size in sizes:
            self._offsets.append(offset)
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        self.slot_bytes = offset
        self.num_bytes = num_bytes
        self.num_slots = num_bytes // self.slot_bytes
        if self.num_slots < 1:
            raise ConfigError(
                f"kv_host_bytes is {num_bytes}; one block of all KV groups needs "
                f"{self.slot_bytes} bytes: give at least that, or 0 for no host tier"
            )
        try:
            self._memory = mmap.mmap(
                -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _POPULATE
            )
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{num_bytes} bytes for the host tier cannot be had ({error}): lower kv_host_bytes"
            ) from error
        self._bytes = np.frombuffer(self._memory, np.uint8)

    def slot(self, slot: int) -> memoryview:
        """The writable bytes of a slot."""
        start = slot * self.slot_bytes
        return memoryview(self._memory)[start : start + self.slot_bytes]

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Size of one block of each group."""
        return tuple(self._sizes)

    def block(self, slot: int, group: int) -> np.ndarray:
        """One group's block in a slot: a writable view of its shape."""
        return self._block(self._bytes, slot * self.slot_bytes, group)

    def blocks_of(self, payload: memoryview) -> list[np.ndarray]:
        """The blocks of all groups in a copy of a slot's bytes: views."""
        raw = np.frombuffer(payload, np.uint8)
        return [self._block(raw, 0, group) for group in range(len(self._shapes))]

    def _block(self, memory: np.ndarray, start: int, group: int) -> np.ndarray:
        start += self._offsets[group]
        raw = memory[start : start + self._sizes[group]]
        return raw.view(self._dtype).reshape(self._shapes[group])


_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
