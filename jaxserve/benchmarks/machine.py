"""What this machine reaches at most: bytes of memory read, and arithmetic of a large product."""

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

PRODUCT_SIZE = 2048
DEVICE_PRODUCT_SIZE = 8192
LIMIT_ROUNDS = 8
CPU_BUFFER_BYTES = 256 << 20
DEVICE_BUFFER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """The best of a few passes.

    Attributes:
        flops: floating-point operations per second of a product in the compute dtype.
    """

    read_bytes_per_s: float
    flops: float


def measure_limits(dtype: str) -> MachineLimits:
    """Of JAX's default device; takes a second or a few."""
    import jax

    if jax.default_backend() == "cpu":
        return MachineLimits(read_bytes_per_s(CPU_BUFFER_BYTES), product_flops(dtype))
    return MachineLimits(
        device_read_bytes_per_s(DEVICE_BUFFER_BYTES), product_flops(dtype, DEVICE_PRODUCT_SIZE)
    )


def read_bytes_per_s(num_bytes: int) -> float:
    """Bytes of main memory read per second by all cores together, the best of a few passes.

    Each thread searches its part of the buffer for a byte that is not there: `memchr` of the C
    library reads with the widest instructions, and calls through ctypes run in parallel.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    memchr.restype = ctypes.c_void_p
    buffer = np.ones(num_bytes, np.uint8)
    num_threads = num_cpus()
    part = num_bytes // num_threads
    with ThreadPoolExecutor(num_threads) as threads:

        def one_pass() -> None:
            starts = [buffer.ctypes.data + i * part for i in range(num_threads)]
            found = list(threads.map(lambda start: memchr(start, 0, part), starts))
            assert not any(found)

        best_s = min(_seconds(one_pass) for _ in range(LIMIT_ROUNDS))
    return part * num_threads / best_s


def device_read_bytes_per_s(num_bytes: int) -> float:
    """Bytes of device memory read per second: the largest element of a big array."""
    import jax
    import jax.numpy as jnp

    array = jnp.zeros(num_bytes // 4, jnp.float32)
    largest = jax.jit(jnp.max)
    largest(array).block_until_ready()
    best_s = min(_seconds(lambda: largest(array).block_until_ready()) for _ in range(LIMIT_ROUNDS))
    return num_bytes / best_s


def product_flops(dtype: str, size: int = PRODUCT_SIZE) -> float:
    """Floating-point operations per second of a large matrix product in XLA, the best of a few."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), dtype)
    product = jax.jit(
        lambda x: jax.lax.dot_general(
            x, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
    )
    product(a).block_until_ready()
    best_s = min(_seconds(lambda: product(a).block_until_ready()) for _ in range(LIMIT_ROUNDS))
    return 2 * size**3 / best_s


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seconds(function: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s
