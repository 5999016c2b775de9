"""Builds what is below the device: host pool, indices, stores and the mover between them."""

import threading
from collections import deque
from dataclasses import dataclass

import jax
import numpy as np

from jaxserve.config import CacheConfig
from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.host_pool import HostPool
from jaxserve.kv.policy.factory import make_policy
from jaxserve.kv.tiers import Message, Tiers
from jaxserve.transfers import Transfers


@dataclass(frozen=True, slots=True)
class LowerTiers:
    """Everything below the device, for the engine.

    Attributes:
        tiers: what the scheduler talks to.
        transfers: what the runner talks to.
        pool: memory of the host tier.
        wake: set whenever something has arrived.
    """

    tiers: Tiers
    transfers: Transfers
    pool: HostPool
    wake: threading.Event


def build_tiers(config: CacheConfig, pool: "list[jax.Array]") -> LowerTiers | None:
    """The lower tiers that the settings ask for; None: none.

    Args:
        pool: the device pool's arrays, one per KV group.

    Raises:
        ConfigError: the memory cannot be had, or the platform cannot move blocks to it.
    """
    if not config.kv_host_bytes:
        return None
    shapes = [array.shape[1:] for array in pool]
    host = HostPool(config.kv_host_bytes, shapes, np.dtype(pool[0].dtype))
    index = HostIndex(host.num_slots, len(pool), make_policy(config.kv_host_policy, host.num_slots))
    inbox: deque[Message] = deque()
    wake = threading.Event()
    transfers = Transfers(host, pool, inbox, wake.set)
    tiers = Tiers(
        index,
        len(pool),
        host.slot_bytes,
        transfers,
        saves_early=config.kv_offload == "eager",
        inbox=inbox,
    )
    return LowerTiers(tiers, transfers, host, wake)
