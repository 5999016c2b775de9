"""The one interface of stores, and the values that cross it.

A store keeps sealed records: bytes that the envelope made and will check. It never looks inside
them, so it cannot make them wrong unnoticed; what it must do is bound its size, keep its index
true across a crash, and say honestly what it did. Its methods block and may be called by several
threads at once; `StoreWorker` makes them asynchronous, bounds their time and queues.

Knows nothing of pages, policies of other tiers, or jax.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.kv.blocks import BlockHash


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """What a store knows about a record without reading it.

    Attributes:
        block_hash: its key, 32 bytes; covers the namespace and the tenant's salt.
        namespace: 16 bytes that name the namespace (a digest of its root).
        tenant: 16 bytes that name the tenant (a digest of its salt); zeros if there is none.
        num_bytes: length of the sealed record.
        created_s: seconds since the epoch.
        expires_s: seconds since the epoch, 0 if never.
        is_pinned: whether it is protected from eviction; only `Store.scan` says so.
    """

    block_hash: BlockHash
    namespace: bytes
    tenant: bytes
    num_bytes: int
    created_s: float
    expires_s: float = 0.0
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class SealedRecord:
    """A record on its way into a store: `parts` are written one after the other."""

    info: RecordInfo
    parts: tuple[memoryview, ...]


class PutStatus(enum.Enum):
    """STORED; PRESENT: was there already; DECLINED: the store's policy or its retention would not
    keep it; FULL: no room within the budget; FAILED: I/O error."""

    STORED = "stored"
    PRESENT = "present"
    DECLINED = "declined"
    FULL = "full"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How full a store is; `max_bytes` 0 means that its size is not bounded here.

    Attributes:
        num_evicted, num_damaged: records that left to make room, or turned out not to be what was
            written, since this process opened the store. What it cannot know is 0.
        num_pinned: records that are protected from eviction.
    """

    num_records: int
    num_bytes: int
    max_bytes: int
    num_evicted: int = 0
    num_pinned: int = 0
    num_damaged: int = 0


@dataclass(frozen=True, slots=True)
class EraseCount:
    """What a deletion removed."""

    num_records: int
    num_bytes: int


class Store(Protocol):
    """One secondary tier.

    Every method may raise `StoreError` (jaxserve.errors) when the store as a whole cannot answer:
    connection lost, disk unreadable. Everything smaller is in the returned values.
    """

    name: str
    """Short and unique, for metrics and usage: "disk", "s3", "valkey"."""

    def probe(self, keys: Sequence[BlockHash]) -> list[bool]:
        """For each key whether a record is there now and has not expired."""
        ...

    def get(self, keys: Sequence[BlockHash], buffers: Sequence[memoryview]) -> list[int]:
        """Read records, each into its own writable buffer (at least the record's length).

        Returns:
            For each the number of bytes read: 0 if it is missing, expired, does not fit into its
            buffer, or could not be read.
        """
        ...

    def put(self, records: Sequence[SealedRecord]) -> list[PutStatus]:
        """Write records. The size bound holds before, while and after they are written."""
        ...

    def delete(self, keys: Sequence[BlockHash]) -> EraseCount:
        """Remove records for good, pinned or not."""
        ...

    def delete_tenant(self, tenant: bytes) -> EraseCount:
        """Remove all records of a tenant, pinned or not."""
        ...

    def delete_namespaces(self, keep: bytes | None = None) -> EraseCount:
        """Remove all records, or all whose namespace is not `keep`."""
        ...

    def pin(self, keys: Sequence[BlockHash], pinned: bool) -> int:
        """Protect records from eviction (not from deletion), or stop; how many were there."""
        ...

    def sweep(self) -> EraseCount:
        """Remove what has expired; a worker asks for it now and then."""
        ...

    def scan(self) -> Iterator[RecordInfo]:
        """Every record that is there; what changes meanwhile may be missed."""
        ...

    def usage(self) -> StoreUsage:
        """How full the store is."""
        ...

    def flush(self) -> None:
        """Return when everything that `put` reported as stored would survive a crash."""
        ...

    def close(self) -> None:
        """Flush and release everything; no other call may follow."""
        ...


class InMemoryIndex(Protocol):
    """What a store may offer beside, if it knows without asking anybody what it has."""

    def probe_at_once(self, keys: Sequence[BlockHash]) -> list[bool] | None:
        """As `Store.probe`, but never waits; None: not now."""
        ...


class OwnBooks(Protocol):
    """What a store may offer beside, if it has a list of its own of what is there."""

    def sample(self, count: int) -> list[RecordInfo]:
        """At most so many records, any; asks nobody."""
        ...
