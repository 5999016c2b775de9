"""`jaxserve kv`: the group of commands about cached KV blocks; each is in a file beside this."""

from jaxserve.cli.app import Entry, Group

_ADMIN = "jaxserve.cli.kv_admin:"

group = Group(
    "kv",
    "Look after the tiers of the KV cache.",
    {
        "stat": Entry(_ADMIN + "stat", "what the tiers hold and have done"),
        "ls": Entry(_ADMIN + "ls", "list blocks, and where each of them is"),
        "verify": Entry(_ADMIN + "verify", "read and check every record; delete damaged ones"),
        "clear": Entry(_ADMIN + "clear", "remove all blocks of tiers"),
        "pin": Entry(_ADMIN + "pin", "keep blocks from eviction on host and stores"),
        "erase": Entry(
            _ADMIN + "erase", "remove everything of a tenant from all tiers, and destroy its key"
        ),
        "simulate": Entry(
            "jaxserve.cli.kv_simulate:simulate",
            "replay a trace of block hashes through tiers of any policy and size",
        ),
    },
)
