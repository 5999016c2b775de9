"""What this machine can do at most: copies in memory, reads and writes on the disk."""

import contextlib
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 5
DISK_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes per second, the best of a few rounds, one thread each."""

    copy: float
    disk_read: float
    disk_write: float

    def line(self) -> dict[str, Any]:
        return {
            "copy_gb_s": round(self.copy / 1e9, 2),
            "disk_read_gb_s": round(self.disk_read / 1e9, 3),
            "disk_write_gb_s": round(self.disk_write / 1e9, 3),
        }


def find_limits(folder: Path, block_bytes: int, prompt_bytes: int) -> Limits:
    """Copy as much as a prompt's keys and values; read and write blocks past the page cache."""
    source, target = np.ones(prompt_bytes, np.uint8), np.ones(prompt_bytes, np.uint8)
    copy_s = _best_s(lambda: np.copyto(target, source))
    blocks = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(DISK_BYTES // block_bytes)]
    num_bytes = block_bytes * len(blocks)
    path = folder / "limits"
    direct = getattr(os, "O_DIRECT", 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | direct, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        write_s = _best_s(lambda: _each(os.pwritev, descriptor, blocks))
        read_s = _best_s(lambda: _each(os.preadv, descriptor, blocks))
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
    return Limits(prompt_bytes / copy_s, num_bytes / read_s, num_bytes / write_s)


def _each(call: Callable[..., int], descriptor: int, blocks: list[memoryview]) -> None:
    for index, block in enumerate(blocks):
        assert call(descriptor, [block], index * block.nbytes) == block.nbytes


def _best_s(function: Callable[[], None]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)
