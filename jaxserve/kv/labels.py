"""Whose blocks are whose: the tenant of each block that has one, so that a tenant can be erased.

The block's name cannot be turned back into its tenant; this is what remembers. Names of blocks
that belong to nobody are not kept. Bounded: the labels noted longest ago are forgotten, and then
it says that it no longer knows everything. Read by any thread, written by one.
"""

from collections import OrderedDict
from collections.abc import Sequence

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.envelope import NO_TENANT

MAX_LABELS = 1 << 20


class TenantLabels:
    """The tenants of blocks.

    Args:
        max_labels: how many are kept.
    """

    def __init__(self, max_labels: int = MAX_LABELS):
        self.is_complete = True
        """Nothing had to be forgotten so far."""
        self._max_labels = max_labels
        self._tenants: OrderedDict[BlockHash, bytes] = OrderedDict()

    def label(self, names: Sequence[BlockHash], tenant: bytes) -> None:
        """These blocks belong to a tenant."""
        if tenant == NO_TENANT:
            return
        for name in names:
            self._tenants[name] = tenant
            self._tenants.move_to_end(name)
        while len(self._tenants) > self._max_labels:
            self._tenants.popitem(last=False)
            self.is_complete = False

    def of(self, name: BlockHash) -> bytes:
        """The tenant of a block; `NO_TENANT` if it has no label."""
        return self._tenants.get(name, NO_TENANT)

    def names_of(self, tenant: bytes) -> list[BlockHash]:
        """Every block with this label."""
        return [name for name, owner in self._tenants.items() if owner == tenant]
