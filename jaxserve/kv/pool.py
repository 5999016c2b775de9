"""The device pages of the KV cache: one page-major array per KV group.

`groups[g]` is `[N, L, 2, K, P, H]`, so a block is one contiguous piece of memory over all layers
of the group; of latent attention `[N, L, 1, 1, P, H]`, one vector a token. The pool is donated to
each step and to each scatter; the runner is its only owner.

On CPU a 16-bit float pool is kept as raw uint16: XLA:CPU converts a whole bf16 array at every
scatter (jax 0.10). Knows nothing of which page holds what.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.types import KVGroup


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPool:
    """Pages of every KV group."""

    groups: tuple[jax.Array, ...]  # each [N, L, parts, K, P, H]


def storage_dtype(compute_dtype: np.dtype, platform: str) -> np.dtype:
    """What the pool is made of: the compute dtype, or its raw bits on CPU."""
    dtype = np.dtype(compute_dtype)
    return np.dtype(np.uint16) if platform == "cpu" and dtype.itemsize == 2 else dtype


def page_shape(group: KVGroup, page_size: int) -> tuple[int, ...]:
    """Shape of one page of a group: [L, parts, K, P, H]."""
    cache = group.cache
    return (len(group.layers), cache.parts, cache.num_kv_heads, page_size, cache.head_dim)


def page_bytes(group: KVGroup, page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page of a group."""
    return math.prod(page_shape(group, page_size)) * np.dtype(dtype).itemsize


def create_pool(
    groups: tuple[KVGroup, ...],
    num_pages: tuple[int, ...],
    page_size: int,
    dtype: np.dtype,
    shardings: tuple[jax.sharding.Sharding, ...],
) -> KVPool:
    """A pool of zeros, each group laid out by its sharding."""
    arrays = []
    for group, pages, sharding in zip(groups, num_pages, shardings, strict=True):
        shape = (pages, *page_shape(group, page_size))
        arrays.append(jnp.zeros(shape, dtype, device=sharding))
    return KVPool(tuple(arrays))


def kernel_view(pool_nlckph: jax.Array) -> jax.Array:
    """The reshape that kernels see, [N*L*parts, K, P, H]; free inside jit."""
    return pool_nlckph.reshape(-1, *pool_nlckph.shape[3:])
