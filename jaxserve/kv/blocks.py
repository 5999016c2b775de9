"""Names of KV blocks: a chain of hashes over tokens that starts from a namespace.

A block hash names a block's content: its own tokens and, through its parent, every token before
it and everything in the `Namespace`. Two blocks with the same hash hold the same keys and values,
whoever computed them. One chain serves all KV groups: the namespace covers every group, so a hash
and a group index name a block of that group.

Knows nothing of pages, tiers or jax.
"""

import json
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
from blake3 import blake3

from jaxserve.types import KVGroup

BlockHash: TypeAlias = bytes

_IS_INT32_LE = sys.byteorder == "little" and array("i").itemsize == 4
_ROOT_CONTEXT = "jaxserve kv namespace root v1"
_SALT_CONTEXT = "jaxserve kv cache salt v1"


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that must be equal for a block to be reusable.

    Attributes:
        weights_fingerprint: digest of the checkpoint's content, not its name.
        model_config_digest: digest of every config field that changes the mathematics.
        kv_dtype: what the pool stores.
        layout_version: of the bytes of a block.
        page_size: tokens per block.
        kv_groups: all groups of the model.
        numerics: level of numerical reproducibility that the blocks were computed at.
        adapter: fingerprint of an adapter on top of the weights.
        tenant_salt: keeps the blocks of tenants apart.
    """

    weights_fingerprint: str
    model_config_digest: str
    kv_dtype: str
    layout_version: int
    page_size: int
    kv_groups: tuple[KVGroup, ...]
    numerics: str = "default"
    adapter: str = ""
    tenant_salt: str = ""

    def root(self) -> BlockHash:
        """The parent of every first block in this namespace."""
        encoded = json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        return blake3(encoded, derive_key_context=_ROOT_CONTEXT).digest()


def salted_root(root: BlockHash, cache_salt: str) -> BlockHash:
    """The root for requests of one salt; without a salt it is `root` itself."""
    if not cache_salt:
        return root
    key = blake3(root, derive_key_context=_SALT_CONTEXT).digest()
    return blake3(cache_salt.encode("utf-8", "surrogatepass"), key=key).digest()


def block_hashes(
    token_ids: Iterable[int] | np.ndarray,
    page_size: int,
    parent: BlockHash,
    extra_key: bytes = b"",
) -> list[BlockHash]:
    """Hash each full block of `token_ids`; a partial last block has no name.

    Args:
        token_ids: tokens that follow the parent block.
        page_size: tokens per block.
        parent: hash of the block before, or a root.
        extra_key: what else the blocks depend on, beyond tokens and namespace.
    """
    if isinstance(token_ids, array) and token_ids.typecode == "i" and _IS_INT32_LE:
        data = token_ids.tobytes()
    elif isinstance(token_ids, np.ndarray):
        data = token_ids.astype("<i4").tobytes()
    else:
        data = np.fromiter(token_ids, "<i4").tobytes()
    stride = 4 * page_size
    hashes = []
    for end in range(stride, len(data) + 1, stride):
        parent = blake3(parent + data[end - stride : end] + extra_key).digest()
        hashes.append(parent)
    return hashes
