"""How full a store is, without waiting for it: asked on a thread of its own, the last answer kept.

A store that hangs costs one waiting thread and makes its answer old, nothing else. Knows nothing
of what is done with the numbers.
"""

import threading
from typing import NamedTuple

from jaxserve.errors import StoreError
from jaxserve.kv.stores.base import Store, StoreUsage

PATIENCE_S = 0.05
"""Longest wait for an answer; one that is still out from before is not waited for."""


class LatestUsage(NamedTuple):
    """What a store said last, and whether it said so just now."""

    usage: StoreUsage
    is_fresh: bool


class UsageReader:
    """Asks one store; for one owner's thread."""

    def __init__(self, store: Store):
        self._store = store
        self._latest = StoreUsage(0, 0, 0)
        self._thread: threading.Thread | None = None
        self._answers = 0

    def read(self, patience_s: float = PATIENCE_S) -> LatestUsage:
        """The usage now, or the last one known."""
        if self._thread is not None and self._thread.is_alive():
            return LatestUsage(self._latest, False)
        before = self._answers
        self._thread = threading.Thread(
            target=self._ask, name=f"{self._store.name}-usage", daemon=True
        )
        self._thread.start()
        self._thread.join(patience_s)
        return LatestUsage(self._latest, self._answers > before)

    def _ask(self) -> None:
        try:
            self._latest = self._store.usage()
        except StoreError:
            return
        self._answers += 1
