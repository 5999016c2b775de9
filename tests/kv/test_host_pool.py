"""The host tier's memory: size, alignment, views, and that it is really there."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.kv.host_pool import HostPool

SHAPES = ((2, 2, 1, 4, 8), (1, 2, 1, 4, 3))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_slots_are_aligned_and_apart():
    pool = HostPool(100_000, SHAPES, np.dtype(np.uint16))
    first, second = (int(np.prod(shape)) * 2 for shape in SHAPES)
    assert pool.slot_bytes == -(-first // 64) * 64 + -(-second // 64) * 64
    assert pool.num_slots == 100_000 // pool.slot_bytes
    for slot in range(pool.num_slots):
        for group in range(2):
            pool.block(slot, group)[...] = slot * 2 + group
    for slot in range(pool.num_slots):
        for group, shape in enumerate(SHAPES):
            block = pool.block(slot, group)
            assert block.shape == shape and (block == slot * 2 + group).all()
            assert block.ctypes.data % 64 == 0
        assert pool.slot(slot).nbytes == pool.slot_bytes
    assert pool.block(0, 0).ctypes.data % os.sysconf("SC_PAGE_SIZE") == 0


def test_the_memory_asked_for_is_resident_from_the_start_within_2_percent():
    num_bytes = 256 << 20
    before = resident_bytes()
    pool = HostPool(num_bytes, SHAPES, np.dtype(np.float32))
    taken = resident_bytes() - before
    assert abs(taken - num_bytes) <= 0.02 * num_bytes
    for slot in range(0, pool.num_slots, 100):
        pool.block(slot, 0)[...] = 1.0
    assert abs(resident_bytes() - before - num_bytes) <= 0.02 * num_bytes


def test_too_little_memory_for_one_slot_says_how_much_is_needed():
    with pytest.raises(ConfigError, match="kv_host_bytes is 100; one block .* needs 1216 bytes"):
        HostPool(100, SHAPES, np.dtype(np.float64))


def test_more_memory_than_there_is_says_so():
    with pytest.raises(ConfigError, match="lower kv_host_bytes"):
        HostPool(1 << 60, SHAPES, np.dtype(np.float32))
