"""`jaxserve kv` on a store that no server uses: the same methods, on the records themselves.

A local disk store is locked by who uses it, so this refuses one that a server has open. It is
opened without the size bound, policy and time to live of its URL: looking must not evict. Knows
nothing of what the commands print.
"""

import itertools
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from jaxserve.errors import ConfigError, StoreError
from jaxserve.folders import user_cache_folder
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import NO_TENANT, tenant_digest
from jaxserve.kv.keys import KeyFolder, MasterKey
from jaxserve.kv.reports import BlockList, ClearReceipt, EraseReceipt, PinReceipt, VerifyReport
from jaxserve.kv.stores.disk_options import parse_disk_url
from jaxserve.kv.stores.tasks import Outcome
from jaxserve.kv.stores.url import open_worker, parse_address
from jaxserve.kv.upkeep import entry_of, is_encrypted, remove, scan, verify_store, wait_for
from jaxserve.progress import Progress

KEY_VARIABLE = "JAXSERVE_KV_KEY"
NOT_OURS = ("max_bytes", "policy", "ttl")
CLOSE_S = 60.0


class StoreTiers:
    """One store, opened for upkeep.

    Args:
        url: as for `--kv-store`.
        key_file: of the master key; None: the environment's, if any.
        key_folder: of the tenants' wrapped keys; None: the default one.

    Raises:
        ConfigError: no such store, or another process uses it.
        StoreError: it cannot be opened.
    """

    def __init__(self, url: str, key_file: str | None = None, key_folder: str | None = None):
        self._master: MasterKey | None = None
        if key_file is not None:
            self._master = MasterKey.from_file(key_file)
        elif KEY_VARIABLE in os.environ:
            self._master = MasterKey.from_environment(KEY_VARIABLE)
        self._keys = _key_folder(self._master, key_folder) if self._master is not None else None
        self._worker = open_worker(for_upkeep(url))
        self.url = url

    def stat(self) -> dict[str, Any]:
        """What is in the store, by namespace and tenant."""
        now_s = time.time()
        namespaces, tenants = Counter[str](), Counter[str]()
        num_expired, oldest_s = 0, 0.0
        for info in scan(self._worker):
            namespaces[info.namespace.hex()] += 1
            tenants["" if info.tenant == NO_TENANT else info.tenant.hex()] += 1
            num_expired += bool(info.expires_s) and info.expires_s <= now_s
            oldest_s = min(oldest_s or info.created_s, info.created_s)
        usage = self._worker.store.usage()
        return {
            "store": self._worker.name,
            "num_records": usage.num_records,
            "num_bytes": usage.num_bytes,
            "namespaces": dict(namespaces),
            "num_tenants": len(tenants.keys() - {""}),
            "num_expired": num_expired,
            "oldest_s": oldest_s,
        }

    def ls(self, limit: int, prefix: str) -> dict[str, Any]:
        """`BlockList.as_json`."""
        if len(prefix) > 64 or set(prefix.lower()) - set("0123456789abcdef"):
            raise ConfigError(f"--prefix is {prefix!r:.80}; expected the first hex digits of names")
        wanted = (
            entry_of(info, (self._worker.name,), None)
            for info in scan(self._worker)
            if info.block_hash.hex().startswith(prefix.lower())
        )
        blocks = tuple(itertools.islice(wanted, limit + 1))
        return BlockList(blocks[:limit], len(blocks) <= limit).as_json()

    def verify(self, recompute: int, prompts: Sequence[Any] | None) -> dict[str, Any]:
        """`VerifyReport.as_json`."""
        if recompute:
            raise ConfigError(
                "--recompute needs a model: ask a running server (--server), whose stores are "
                "these, or use llm.kv.verify"
            )
        total = max(self._worker.store.usage().num_records, 1)
        with Progress() as report:
            check = verify_store(
                self._worker,
                keys=self._keys,
                is_just_opened=True,
                progress=lambda done: report("records", done, max(total, done)),
            )
        return VerifyReport((check,)).as_json()

    def clear(self, tiers: Sequence[str], stale: bool) -> dict[str, Any]:
        """`ClearReceipt.as_json`."""
        if stale:
            raise ConfigError(
                "--stale keeps what the running model can use: ask its server (--server)"
            )
        if set(tiers) - {"all", self._worker.name}:
            raise ConfigError(f"this store is called {self._worker.name}; name it, or all")
        start_s = time.monotonic()
        erasure = remove(self._worker, lambda store: store.delete_namespaces(None))
        receipt = ClearReceipt(0, 0, (erasure,), time.time(), time.monotonic() - start_s)
        return receipt.as_json()

    def pin(
        self, hashes: Sequence[str], prompt: str | None, cache_salt: str, pinned: bool
    ) -> dict[str, Any]:
        """`PinReceipt.as_json`."""
        if prompt is not None:
            raise ConfigError("a prompt's blocks have names only under a model: give hashes")
        names = list({_name(text): None for text in hashes})
        outcome: Outcome[int] | None = wait_for(
            lambda done: self._worker.submit_alone(lambda store: store.pin(names, pinned), done)
        )
        if outcome is None or not outcome.values:
            why = "it is closing" if outcome is None else outcome.error or outcome.reason
            raise StoreError(f"The store {self._worker.name} did not answer: {why}")
        by_tier = {self._worker.name: outcome.values[0]}
        note = "" if outcome.values[0] else "the store has none of these blocks"
        return PinReceipt(len(names), pinned, by_tier, note).as_json()

    def erase(self, cache_salt: str) -> dict[str, Any]:
        """`EraseReceipt.as_json`."""
        if not cache_salt:
            raise ConfigError("the tenant's cache salt is empty: blocks without one are nobody's")
        if self._master is None and is_encrypted(self._worker):
            raise ConfigError(
                "the records of this store are encrypted, and their tenants named under the master "
                f"key: give it (--kv-key-file, or {KEY_VARIABLE} in the environment)"
            )
        start_s = time.monotonic()
        secret = self._master.tenant_secret if self._master is not None else b""
        tenant = tenant_digest(cache_salt, secret)
        key = "not encrypted"
        if self._keys is not None:
            key = "destroyed" if self._keys.destroy(tenant).existed else "none"
        erasure = remove(self._worker, lambda store: store.delete_tenant(tenant))
        return EraseReceipt(
            tenant.hex(),
            0,
            0,
            0,
            True,
            (erasure,),
            key,
            time.time(),
            time.monotonic() - start_s,
        ).as_json()

    def close(self) -> None:
        self._worker.close(CLOSE_S)


def for_upkeep(url: str) -> str:
    """The same store, without what would make opening it evict or expire records.

    Raises:
        ConfigError: it lies on this machine and is not there.
    """
    if len(url.split()) > 1:
        raise ConfigError(f"--kv-store names {len(url.split())} stores; expected one")
    address = parse_address(url)
    parts = urlsplit(url)
    scheme = parts.scheme.removeprefix("fault+")
    if scheme == "memory":
        raise ConfigError("a store in memory ends with its process: there is nothing to look at")
    if parts.scheme == "file":
        parse_disk_url(address.url)  # now, while it is what was typed
    if scheme in ("file", "objects+file") and not Path(unquote(parts.path)).is_dir():
        raise ConfigError(f"there is no store at {unquote(parts.path)}")
    kept = [pair for pair in parse_qsl(parts.query) if pair[0] not in NOT_OURS]
    if scheme == "file":
        kept.append(("max_bytes", "1024TiB"))
    rest = urlunsplit(parts._replace(scheme="", query=urlencode(kept)))
    return f"{parts.scheme}://{rest.removeprefix('//')}"  # of schemes it does not know it drops //


def _key_folder(master: MasterKey, folder: str | None) -> KeyFolder:
    root = user_cache_folder()
    if folder is None and root is None:
        raise ConfigError("there is no home with the tenants' keys: give --kv-key-folder")
    path = Path(folder) if folder is not None else Path(str(root)) / "kv-keys"
    if not KeyFolder.is_one(path):
        raise ConfigError(
            f"there is no key folder {path}: give the one that the store's server has, with "
            "--kv-key-folder"
        )
    return KeyFolder(path, master)


def _name(text: str) -> BlockHash:
    try:
        name = bytes.fromhex(text)
    except ValueError:
        name = b""
    if len(name) != 32:
        raise ConfigError(f"{text!r:.80} is no block hash; expected 64 hex digits")
    return name
