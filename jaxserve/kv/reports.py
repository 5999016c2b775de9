"""What operations on the tiers found and did, as frozen values that become JSON.

Knows nothing of how it is done.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

DAMAGE = frozenset(
    ("truncated", "corrupt", "wrong block", "wrong namespace", "wrong tenant", "wrong size")
)
"""Verdicts that say that a record is not what was written; `unreadable` is another."""

UNREADABLE = "unreadable"
MAX_RELATIVE_ERROR = 0.1
"""A recomputed block differs by rounding if it ran in steps of other shapes: by far less than this
share of its norm. Beyond it the stored block is wrong."""


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block, and where it is.

    Attributes:
        name: hex digits of its hash.
        tiers: "device", "host" and names of stores.
        num_bytes: of its record, if a store lists it; else of its slot or pages.
        created_s, expires_s: seconds since the epoch; 0: not known, or never.
        tenant: hex digits; "" if it belongs to nobody, or that is not known.
        is_ours: whether this engine could use it (same weights, config, numerics).
        is_pinned: on the host or in a store.
    """

    name: str
    tiers: tuple[str, ...]
    num_bytes: int
    created_s: float = 0.0
    expires_s: float = 0.0
    tenant: str = ""
    is_ours: bool = True
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class BlockList:
    """Some blocks; `is_complete` is False if there are more, or a store could not be asked."""

    blocks: tuple[BlockEntry, ...]
    is_complete: bool

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StoreCheck:
    """What reading every record of a store found.

    Attributes:
        num_records, num_bytes: that were read.
        verdicts: records by what their check said.
        num_gone: listed, but removed or evicted before they were read.
        num_damaged: not what was written; num_deleted: of these, removed.
        error: why not everything was read; "" if everything was.
    """

    store: str
    num_records: int
    num_bytes: int
    verdicts: Mapping[str, int]
    num_gone: int
    num_damaged: int
    num_deleted: int
    seconds: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class RecomputeCheck:
    """What computing blocks again, and comparing them with what is kept, found.

    Attributes:
        num_wanted: blocks that were asked for.
        num_compared: copies that were compared: a block may be on the host and in stores.
        num_equal: equal to the last bit.
        num_skipped: could not be computed or read now.
        max_abs_difference: the largest of all elements.
        max_relative_error: norm of the difference over norm of the block, the largest of all;
            infinite (in JSON: null) if one copy holds no numbers.
        num_wrong: beyond `MAX_RELATIVE_ERROR`; these were deleted.
        note: what limited the choice of blocks, if something did.
    """

    num_wanted: int
    num_compared: int
    num_equal: int
    num_skipped: int
    max_abs_difference: float
    max_relative_error: float
    num_wrong: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        stores: of each store.
        index_error: what the books of device and host say that cannot be; "" if they add up.
        recompute: None if it was not asked for.
    """

    stores: tuple[StoreCheck, ...]
    index_error: str = ""
    recompute: RecomputeCheck | None = None

    @property
    def is_damaged(self) -> bool:
        """Whether anything was not as it should be."""
        is_wrong = self.recompute is not None and self.recompute.num_wrong > 0
        return bool(self.index_error) or is_wrong or any(s.num_damaged for s in self.stores)

    @property
    def is_complete(self) -> bool:
        """Whether every record was read."""
        return not any(check.error for check in self.stores)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON, with the verdict."""
        body = {**asdict(self), "is_damaged": self.is_damaged, "is_complete": self.is_complete}
        for name, value in (body["recompute"] or {}).items():
            if value == math.inf:  # JSON has none
                body["recompute"][name] = None
        return body


@dataclass(frozen=True, slots=True)
class StoreErasure:
    """What left one store; `error` is "" if it said that all has."""

    store: str
    num_records: int
    num_bytes: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class ClearReceipt:
    """What `clear` removed.

    Attributes:
        device_blocks: names that were forgotten on the device, over all KV groups.
        host_blocks: slots that were given up on the host.
    """

    device_blocks: int
    host_blocks: int
    stores: tuple[StoreErasure, ...]
    at_s: float
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every store that was asked did it."""
        return not any(erasure.error for erasure in self.stores)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON, with the verdict."""
        return {**asdict(self), "is_complete": self.is_complete}


@dataclass(frozen=True, slots=True)
class PinReceipt:
    """How many of the blocks were there and are pinned now, or no longer; by tier."""

    num_blocks: int
    pinned: bool
    by_tier: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EraseReceipt:
    """What is left of a tenant: nothing, where this says so.

    Attributes:
        tenant: hex digits of its digest, as in records.
        device_blocks, host_blocks: that were forgotten.
        live_requests: of the tenant; they go on, but nothing more is kept of them.
        is_exact: False: whose some blocks were was not known any more, so all of device and host
            was forgotten.
        stores: what left each.
        key: "destroyed", "none" (the tenant had none) or "not encrypted".
        at_s: seconds since the epoch.
    """

    tenant: str
    device_blocks: int
    host_blocks: int
    live_requests: int
    is_exact: bool
    stores: tuple[StoreErasure, ...]
    key: str
    at_s: float
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every store confirmed; if not, and nothing was encrypted, erase again later."""
        return not any(erasure.error for erasure in self.stores)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON, with the verdict."""
        return {**asdict(self), "is_complete": self.is_complete}
