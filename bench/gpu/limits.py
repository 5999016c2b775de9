"""Part `limits`: what this machine does at most; every other part is held against it.

Device copy and read bandwidth, bfloat16 matrix products, and the link to the host with pinned and
with pageable memory. Also writes what XLA says of the device (`target_config-*.txt`), from which
kernels can be compiled for it elsewhere (`tests/aot`).
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from bench.gpu.report import Context
from bench.gpu.timing import time_call, time_loop

GIB = 1 << 30
PRODUCT_SIZES = (4096, 8192)


def run(context: Context) -> None:
    context.line(**_device_facts())
    with context.attempt({"limit": "target_config"}):
        _write_target_config(context)
    for measure in (_copy, _read, _products, _links):
        with context.attempt({"limit": measure.__name__.strip("_")}):
            measure(context)


def _device_facts() -> dict[str, object]:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "limit": "device",
        "kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_bytes": stats.get("bytes_limit"),
        "memory_kinds": sorted(memory.kind for memory in device.addressable_memories()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _write_target_config(context: Context) -> None:
    from jax._src.lib import xla_client

    device = jax.devices()[0]
    if device.platform != "gpu":
        return
    topology = xla_client.get_topology_for_devices(jax.devices())
    name = re.sub(r"\W+", "-", device.device_kind).lower()
    text = str(topology.target_config)
    (context.folder / f"target_config-{name}.txt").write_text(text)
    context.line(limit="target_config", text=text[:4000])


def _random_bytes(num_bytes: int) -> jax.Array:
    """Numbers of 32 bits on the device."""
    make = jax.jit(lambda key: jax.random.bits(key, (num_bytes // 4,), jnp.uint32))
    return make(jax.random.key(0))


def _copy(context: Context) -> None:
    num_bytes = 1 << 20 if context.is_tiny else 4 * GIB
    x = _random_bytes(num_bytes)

    def body(index: jax.Array, carry: jax.Array, _: None) -> jax.Array:
        return carry ^ index.astype(jnp.uint32)

    timing = time_loop(body, x, None, expected_s=2 * num_bytes / 4e12, is_tiny=context.is_tiny)
    rate = 2 * num_bytes / timing.median_s
    context.line(limit="copy_bytes_per_s", rate=rate, bytes=2 * num_bytes, **timing.facts())


def _read(context: Context) -> None:
    """A sum over memory: nothing is written. Two accesses patterns; the better one counts."""
    num_bytes = 1 << 20 if context.is_tiny else 4 * GIB
    x = _random_bytes(num_bytes)
    best = 0.0
    for rows in (132 * 16, 1024, 8192):

        def body(index: jax.Array, carry: jax.Array, x: jax.Array, rows: int = rows) -> jax.Array:
            shaped = x[: x.size // rows * rows].reshape(rows, -1)
            return carry ^ jnp.bitwise_xor.reduce(shaped ^ index.astype(jnp.uint32), axis=1)

        carry = jnp.zeros(rows, jnp.uint32)
        timing = time_loop(body, carry, x, expected_s=num_bytes / 4e12, is_tiny=context.is_tiny)
        rate = num_bytes / timing.median_s
        context.line(limit=f"read in {rows} rows", measured=rate, **timing.facts())
        best = max(best, rate)
    context.line(limit="read_bytes_per_s", rate=best, bytes=num_bytes)


def _products(context: Context) -> None:
    best = 0.0
    for size in (64,) if context.is_tiny else PRODUCT_SIZES:
        a, b = (
            jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) / size**0.5
            for i in range(2)
        )

        def body(_: jax.Array, carry: jax.Array, b: jax.Array) -> jax.Array:
            return carry @ b

        flops = 2 * size**3
        timing = time_loop(body, a, b, expected_s=flops / 7e14, is_tiny=context.is_tiny)
        rate = flops / timing.median_s
        context.line(limit=f"bf16 product of {size}", measured=rate, **timing.facts())
        best = max(best, rate)
    context.line(limit="bf16_flops", rate=best)


def _links(context: Context) -> None:
    """Between device and host; pinned memory is JAX's, pageable memory numpy's."""
    num_bytes = 1 << 20 if context.is_tiny else GIB // 2
    device = jax.devices()[0]
    on_device = SingleDeviceSharding(device)
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    x = _random_bytes(num_bytes)
    there = jax.device_put(x, pinned)
    pageable = np.array(np.asarray(there))
    repeats = 2 if context.is_tiny else 5
    measures = {
        "to_host_bytes_per_s": lambda: jax.device_put(x, pinned),
        "to_device_bytes_per_s": lambda: jax.device_put(there, on_device),
        "to_device_pageable": lambda: jax.device_put(pageable, on_device),
        # A new array each time, for JAX keeps the host's copy of one that was read.
        "to_host_pageable": lambda: np.asarray(x + jnp.uint32(1)),
    }
    for name, move in measures.items():
        rate = num_bytes / time_call(move, repeats=repeats)
        context.line(limit=name, rate=rate, bytes=num_bytes)
