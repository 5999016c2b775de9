"""The tiers' administration: what `jaxserve kv`, the admin routes and `llm.kv` do.

For a thread that may wait: whatever touches the engine runs on the engine's own thread (`run`);
stores are asked from here, through their workers. One operation that changes or reads everything
at a time. Knows nothing of HTTP or of the command line.
"""

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.engine.core import Engine
from jaxserve.engine.history import TierSample
from jaxserve.engine.recent_prompts import KnownPrompt
from jaxserve.engine.spot_check import Run, SpotCheck
from jaxserve.errors import RequestError, StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import NO_TENANT
from jaxserve.kv.reports import (
    BlockEntry,
    BlockList,
    ClearReceipt,
    EraseReceipt,
    PinReceipt,
    StoreErasure,
    VerifyReport,
)
from jaxserve.kv.stats import KVStats
from jaxserve.kv.stores.base import EraseCount, Store
from jaxserve.kv.stores.tasks import Outcome
from jaxserve.kv.stores.worker import StoreWorker
from jaxserve.kv.tiers import DEVICE, HOST
from jaxserve.kv.upkeep import entry_of, erasure_of, probe, scan, verify_store, wait_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LISTED = 100_000
MAX_RECOMPUTED = 10_000
REMOVE_TIMEOUT_S = 120.0
"""Longest wait for the stores to confirm a deletion."""


class KVAdmin:
    """The tiers of one engine, for people.

    Args:
        engine: whose tiers.
        run: runs a function on the engine's thread; raises EngineDeadError if it has none.
        wait: waits for an event that the engine will set while it works.
        encode: the token ids of a text or a list of them; raises RequestError.
    """

    def __init__(
        self,
        engine: Engine,
        run: Run,
        wait: Callable[[threading.Event], object],
        encode: Callable[[Any], Sequence[int]],
    ):
        self._engine = engine
        self._control = engine.tier_control
        self._run = run
        self._wait = wait
        self._encode = encode
        self._busy = threading.Lock()

    # --- looking ---

    def stat(self) -> KVStats:
        """What the tiers hold and have done."""
        return self._run(self._control.stats)

    def history(self) -> tuple[TierSample, ...]:
        """How the tiers filled since the engine started, up to now."""

        def read() -> tuple[TierSample, ...]:
            self._control.history.add(self._control.stats())
            return self._control.history.samples()

        return self._run(read)

    def plot(self, path: "str | Path | None" = None) -> "Figure":
        """A picture of the tiers over time: bytes in each, and where prompt tokens came from.

        Args:
            path: also write it to this file; the suffix says how, such as .png or .svg.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from jaxserve.engine.kv_plot import plot

        return plot(self.history(), path)

    def ls(self, limit: int = 100, prefix: str = "") -> BlockList:
        """Blocks, and where each of them is.

        Args:
            limit: at most so many.
            prefix: first hex digits of their names.
        """
        if not 1 <= limit <= MAX_LISTED:
            raise RequestError(f"limit is {limit}; expected 1 to {MAX_LISTED}", param="limit")
        prefix = prefix.lower()
        if len(prefix) > 64 or set(prefix) - set("0123456789abcdef"):
            raise RequestError("prefix is no start of a hash in hex digits", param="prefix")
        resident = self._run(lambda: self._control.resident(prefix, limit + 1))
        entries = {
            block.name: BlockEntry(
                block.name.hex(),
                block.tiers,
                block.num_bytes,
                tenant="" if block.tenant == NO_TENANT else block.tenant.hex(),
                is_pinned=block.is_pinned,
            )
            for block in resident
        }
        is_complete, lower = True, self._engine.lower
        for worker in self._control.workers:
            assert lower is not None
            unseen = set(entries)  # of these the store may know how old they are
            try:
                for info in scan(worker):
                    if len(entries) > limit and not unseen:
                        break
                    name, known = info.block_hash, entries.get(info.block_hash)
                    if known is not None:
                        unseen.discard(name)
                        said = entry_of(info, known.tiers, lower.namespace)
                        is_pinned = known.is_pinned or said.is_pinned
                        entries[name] = replace(said, is_pinned=is_pinned)
                    elif len(entries) <= limit and name.hex().startswith(prefix):
                        entries[name] = entry_of(info, (), lower.namespace)
            except StoreError:
                is_complete = False
        names = list(entries)[:limit]
        is_complete = is_complete and len(entries) <= limit
        for worker in self._control.workers:
            there = probe(worker, names)
            is_complete = is_complete and there is not None
            for name in there or ():
                entry = entries[name]
                entries[name] = replace(entry, tiers=(*entry.tiers, worker.name))
        return BlockList(tuple(entries[name] for name in names), is_complete)

    # --- checking ---

    def verify(
        self,
        recompute: int = 0,
        prompts: Sequence[Any] | None = None,
        seed: int | None = None,
        progress: Callable[[str, int], object] = lambda what, count: None,
    ) -> VerifyReport:
        """Read every stored record and check it; delete what is damaged.

        Args:
            recompute: compute so many random blocks again, and compare.
            prompts: whose blocks to choose from: texts, lists of token ids, or mappings with
                "prompt" or "prompt_token_ids" and "cache_salt". None: the engine's recent ones,
                which are all whose tokens it knows.
            seed: makes the choice of blocks repeatable.
            progress: told (what is being checked, how much is done).
        """
        if not 0 <= recompute <= MAX_RECOMPUTED:
            text = f"recompute is {recompute}; expected 0 to {MAX_RECOMPUTED}"
            raise RequestError(text, param="recompute")
        known = None if prompts is None else [self._known(prompt) for prompt in prompts]
        lower = self._engine.lower
        with self._alone():
            index_error = self._run(self._control.integrity)
            checks = []
            for worker in self._control.workers:
                assert lower is not None
                check = verify_store(
                    worker,
                    namespace=lower.namespace,
                    payload_bytes=lower.pool.slot_bytes,
                    keys=lower.keys,
                    progress=lambda count, name=worker.name: progress(name, count),
                )
                checks.append(check)
            if any(check.num_damaged for check in checks):
                self._run(self._control.forget_stores)
            again = None
            if recompute:
                check = SpotCheck(self._engine, self._run, self._wait)
                again = check.run(recompute, known, seed, lambda n: progress("recomputed", n))
        return VerifyReport(tuple(checks), index_error, again)

    def _known(self, prompt: Any) -> KnownPrompt:
        salt = ""
        if isinstance(prompt, dict):
            salt = str(prompt.get("cache_salt") or "")
            prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
        return KnownPrompt(array("i", self._encode(prompt)), salt)

    # --- changing ---

    def clear(self, tiers: Sequence[str] | None = None, stale: bool = False) -> ClearReceipt:
        """Remove blocks.

        Args:
            tiers: from these: "device", "host", names of stores; None: from all.
            stale: only what other models, settings or versions left in stores.
        """
        valid = (DEVICE, HOST, *(worker.name for worker in self._control.workers))
        chosen = valid if tiers is None else tuple(tiers)
        for name in chosen:
            if name not in valid:
                raise RequestError(
                    f"there is no tier {name!r:.60}; expected {', '.join(valid)}", param="tiers"
                )
        start_s, lower = time.monotonic(), self._engine.lower
        keep = lower.namespace if stale and lower is not None else None
        if stale and not set(chosen) - {DEVICE, HOST}:
            raise RequestError(
                "stale is about what others left in stores: device and host have only what the "
                "running model can use",
                param="stale",
            )
        with self._alone():
            device, host = DEVICE in chosen and not stale, HOST in chosen and not stale
            forgotten = self._run(lambda: self._control.clear(device, host))
            stores = self._remove(
                lambda store: store.delete_namespaces(keep),
                [worker for worker in self._control.workers if worker.name in chosen],
            )
            self._run(self._control.forget_stores)
        return ClearReceipt(*forgotten, stores, time.time(), time.monotonic() - start_s)

    def pin(
        self,
        hashes: Sequence[str] = (),
        prompt: Any = None,
        cache_salt: str = "",
        pinned: bool = True,
    ) -> PinReceipt:
        """Keep blocks from eviction on the host and in stores, or stop.

        Pins on the host last until the engine ends, those in stores as long as the stores say.

        Args:
            hashes: names in hex digits.
            prompt: a text or token ids: all its full blocks.
            cache_salt: of the prompt.
        """
        names = [_name(text) for text in hashes]
        if prompt is not None:
            known = KnownPrompt(array("i", self._encode(prompt)), cache_salt)
            names += self._run(lambda: self._control.names_of(known))
        names = list(dict.fromkeys(names))
        if not names:
            raise RequestError(
                "nothing to pin: give hashes, or a prompt of at least one full block",
                param="prompt" if prompt is not None else "hashes",
            )
        by_tier = {HOST: self._run(lambda: self._control.pin(names, pinned))}
        notes: list[str] = []
        for worker in self._control.workers:
            outcome: Outcome[int] | None = wait_for(
                lambda done, w=worker: w.submit_alone(lambda store: store.pin(names, pinned), done)
            )
            if outcome is None or not outcome.values:
                why = "it is closing" if outcome is None else outcome.error or outcome.reason
                notes.append(f"{worker.name} did not answer: {why}")
            else:
                by_tier[worker.name] = outcome.values[0]
        if not notes and not any(by_tier.values()):
            notes.append("no tier has any of these blocks")
        return PinReceipt(len(names), pinned, by_tier, "; ".join(notes))

    def erase(self, cache_salt: str) -> EraseReceipt:
        """Remove everything of a tenant from all tiers, and destroy its key.

        What is on its way to stores is removed there, too. Live requests of the tenant go on, but
        nothing more of them is kept.
        """
        if not isinstance(cache_salt, str) or not cache_salt:
            raise RequestError(
                "erase needs the tenant's cache_salt; blocks without one belong to nobody: "
                "use clear for those",
                param="cache_salt",
            )
        start_s, lower = time.monotonic(), self._engine.lower
        tenant = self._run(lambda: self._control.scheduler.tenant_of(cache_salt))
        key = "not encrypted"
        with self._alone():
            here = self._run(lambda: self._control.erase(cache_salt))
            keys = None if lower is None else lower.keys
            if keys is not None:
                key = "none"

            def destroy_key() -> None:
                # Here all earlier records are sealed: none of them can make the key anew.
                nonlocal key
                if keys is not None and keys.destroy(tenant).existed:
                    key = "destroyed"

            stores = self._remove(lambda store: store.delete_tenant(tenant), first=destroy_key)
            self._run(self._control.forget_stores)
        return EraseReceipt(
            tenant.hex(),
            *here.forgotten,
            here.live_requests,
            here.is_exact,
            stores,
            key,
            time.time(),
            time.monotonic() - start_s,
        )

    def _remove(
        self,
        operation: Callable[[Store], EraseCount],
        workers: Sequence[StoreWorker] | None = None,
        first: Callable[[], object] = lambda: None,
    ) -> tuple[StoreErasure, ...]:
        """Run a deletion on stores, behind everything that was offered to them before."""
        workers = self._control.workers if workers is None else workers
        if not workers:
            return ()
        assert self._engine.lower is not None and self._engine.lower.cascade is not None
        receipts: dict[str, StoreErasure] = {}
        ended = threading.Semaphore(0)
        failures: list[Exception] = []

        def submit() -> None:
            try:
                first()
            except StoreError as error:
                failures.append(error)
            for worker in workers:

                def done(outcome: Outcome[EraseCount], worker: StoreWorker = worker) -> None:
                    receipts[worker.name] = erasure_of(worker, outcome)
                    ended.release()

                if worker.submit_alone(operation, done) is None:
                    receipts[worker.name] = erasure_of(worker, None)
                    ended.release()

        self._engine.lower.cascade.after_writes(submit)
        until_s = time.monotonic() + REMOVE_TIMEOUT_S
        for _ in workers:
            ended.acquire(timeout=max(0.0, until_s - time.monotonic()))
        if failures:
            raise failures[0]
        late = "the store did not confirm in time"
        return tuple(
            receipts.get(worker.name, StoreErasure(worker.name, 0, 0, late)) for worker in workers
        )

    @contextmanager
    def _alone(self):
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "another verify, clear or erase is running; try again later", code="busy"
            )
        try:
            yield
        finally:
            self._busy.release()


def _name(text: str) -> BlockHash:
    try:
        name = bytes.fromhex(text)
    except (ValueError, TypeError):
        name = b""
    if len(name) != 32:
        raise RequestError(f"{text!r:.80} is no block hash; expected 64 hex digits", param="hashes")
    return name
