"""Builds what is below the device: host pool, indices, stores and the mover between them."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxserve.config import CacheConfig
from jaxserve.errors import ConfigError
from jaxserve.folders import user_cache_folder
from jaxserve.kv.cascade import StoreCascade
from jaxserve.kv.envelope import namespace_digest
from jaxserve.kv.host_index import HostIndex
from jaxserve.kv.host_pool import HostPool
from jaxserve.kv.keys import KeyFolder, MasterKey
from jaxserve.kv.labels import MAX_LABELS, TenantLabels
from jaxserve.kv.messages import Message
from jaxserve.kv.policy.factory import check_policy, make_policy
from jaxserve.kv.stores.disk_folder import FolderInUseError
from jaxserve.kv.stores.options import as_seconds
from jaxserve.kv.stores.url import open_worker
from jaxserve.kv.stores.worker import StoreWorker
from jaxserve.kv.tiers import Tiers
from jaxserve.pallas_kernels.paged_attention.api import Backend
from jaxserve.transfers import Transfers

logger = logging.getLogger(__name__)

STAGING_BYTES = 256 << 20
"""Host tier of an engine that has stores and was given no host memory: blocks pass through it."""

ANSWER_WAIT_S = 5e-4

IN_USE_WAIT_S, IN_USE_POLL_S = 30.0, 0.2
"""A server that was stopped a moment ago may still write to its folder, and its engine may compile
for some seconds before it sees that the server is gone."""

TRY_OUT_S = 1.0
"""Longest that a start waits to hear what loads cost."""

KEY_VARIABLE = "JAXSERVE_KV_KEY"


@dataclass(frozen=True, slots=True)
class LowerTiers:
    """Everything below the device, for the engine.

    Attributes:
        tiers: what the scheduler talks to.
        transfers: what the runner talks to.
        pool: memory of the host tier.
        cascade: the stores; None: none.
        keys: the tenants' keys; None: nothing is encrypted.
        wake: set whenever something has arrived.
        namespace: names in records what the engine runs.
    """

    tiers: Tiers
    transfers: Transfers
    pool: HostPool
    cascade: StoreCascade | None
    keys: KeyFolder | None
    wake: threading.Event
    namespace: bytes

    def flush(self, step: Callable[[], object], timeout_s: float) -> bool:
        """Let what is on its way to lower tiers arrive; `step` runs the engine once.

        Returns:
            Whether everything arrived in time.
        """
        until_s = time.monotonic() + timeout_s
        self.tiers.poll()
        while self.tiers.is_writing and time.monotonic() < until_s:
            self.wake.clear()
            step()
            self.tiers.poll()
            if self.tiers.is_writing and not self.tiers.has_saves:
                self.wake.wait(0.01)
        return not self.tiers.is_writing

    def hear_answers(self, is_device_done: Callable[[], bool]) -> None:
        """Wait a moment for the answers to look-ups that have just begun.

        That costs nothing while the device is busy. But a sequence that cannot start because its
        look-up is not over leaves the next step emptier.
        """
        while self.tiers.expects_answers and not is_device_done():
            self.wake.wait(ANSWER_WAIT_S)
            self.wake.clear()
            self.tiers.poll()

    def try_out(self) -> None:
        """Learn what the stores' loads cost, while nobody waits; hung stores are not waited for."""
        if self.cascade is not None:
            self.cascade.try_out(TRY_OUT_S)

    def close(self, timeout_s: float) -> None:
        """End the stores' threads and write out what they still hold."""
        if self.cascade is not None:
            self.cascade.close(timeout_s)


def build_tiers(
    config: CacheConfig, pool: "list[jax.Array]", namespace_root: bytes, backend: Backend
) -> LowerTiers | None:
    """The lower tiers that the settings ask for; None: none.

    Args:
        pool: the device pool's arrays, one per KV group.
        namespace_root: `Namespace.root()` of what the engine runs.
        backend: moves pages.

    Raises:
        ConfigError: the memory cannot be had, a store's URL is wrong, or the platform cannot move
            blocks.
        StoreError: a local store cannot be opened.
    """
    urls = (config.kv_store or "").split()
    num_bytes = config.kv_host_bytes or (STAGING_BYTES if urls else 0)
    check_policy(config.kv_host_policy)
    if config.kv_encrypt and not urls:
        raise ConfigError("kv_encrypt needs a store to encrypt: set kv_store, or leave it out")
    if config.kv_key_file and not config.kv_encrypt:
        raise ConfigError(
            "kv_key_file is set, but nothing would be encrypted: set kv_encrypt, too, or leave it "
            "out"
        )
    ttl_s = as_seconds("kv_ttl", config.kv_ttl) if config.kv_ttl else 0.0
    if ttl_s and not urls:
        raise ConfigError("kv_ttl is about what stores keep: set kv_store, or leave it out")
    if not num_bytes:
        return None
    keys = _key_folder(config) if config.kv_encrypt else None
    shapes = [array.shape[1:] for array in pool]
    host = HostPool(num_bytes, shapes, np.dtype(pool[0].dtype))
    index = HostIndex(host.num_slots, len(pool), make_policy(config.kv_host_policy, host.num_slots))
    inbox: deque[Message] = deque()
    wake = threading.Event()
    labels = TenantLabels(max(MAX_LABELS, 2 * (pool[0].shape[0] * len(pool) + host.num_slots)))
    workers: list[StoreWorker] = []
    try:
        for url in urls:
            workers.append(_open(url))
        names = [worker.name for worker in workers]
        if len(set(names)) < len(names) or {"device", "host"} & set(names):
            raise ConfigError(
                f"the stores are named {', '.join(names)}; names must differ and be neither "
                "device nor host: add name=... to their URLs"
            )
        transfers = Transfers(host, pool, inbox, wake.set, backend)
    except BaseException:
        for worker in workers:
            worker.close(1.0)
        raise
    cascade, namespace = None, namespace_digest(namespace_root)
    if workers:
        cascade = StoreCascade(
            workers,
            namespace,
            host.slot,
            host.slot_bytes,
            inbox,
            wake.set,
            keys=keys,
            ttl_s=ttl_s,
            labels=labels,
        )
    tiers = Tiers(
        index,
        len(pool),
        host.slot_bytes,
        transfers,
        saves_early=config.kv_offload == "eager" or (config.kv_offload == "auto" and bool(urls)),
        cascade=cascade,
        inbox=inbox,
        labels=labels,
    )
    return LowerTiers(tiers, transfers, host, cascade, keys, wake, namespace)


def _open(url: str) -> StoreWorker:
    """A store's worker; a folder that a process has which is about to end is waited for."""
    until_s = time.monotonic() + IN_USE_WAIT_S
    is_told = False
    while True:
        try:
            return open_worker(url)
        except FolderInUseError as error:
            if time.monotonic() >= until_s:
                raise
            if not is_told:
                logger.warning("%s Trying again for %.0f s.", error, IN_USE_WAIT_S)
            is_told = True
            time.sleep(IN_USE_POLL_S)


def tenant_secret(config: CacheConfig) -> bytes:
    """What keys the digests of tenants outside of the process: from the master key, if any."""
    return _master_key(config).tenant_secret if config.kv_encrypt else b""


def _master_key(config: CacheConfig) -> MasterKey:
    if config.kv_key_file:
        return MasterKey.from_file(config.kv_key_file)
    if KEY_VARIABLE in os.environ:
        return MasterKey.from_environment(KEY_VARIABLE)
    raise ConfigError(
        f"kv_encrypt needs a master key: set kv_key_file, or {KEY_VARIABLE} in the environment"
    )


def _key_folder(config: CacheConfig) -> KeyFolder:
    folder = Path(config.kv_key_folder) if config.kv_key_folder else None
    if folder is None:
        root = user_cache_folder()
        if root is None:
            raise ConfigError("there is no home to keep the tenants' keys in: set kv_key_folder")
        folder = root / "kv-keys"
    return KeyFolder(folder, _master_key(config))
