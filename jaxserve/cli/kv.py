"""`jaxserve kv`: the group of commands about cached KV blocks.

Each command has its own file beside this one and is registered here.
"""

from jaxserve.cli.flags import Parser
from jaxserve.cli.kv_admin import add_admin_commands
from jaxserve.cli.kv_simulate import add_simulate_command


def add_kv_commands(commands: Parser.Commands) -> None:
    """Register `kv` and what stands below it."""
    group = commands.add_parser(
        "kv",
        help="look after the tiers of the KV cache",
        description="Look after the tiers of the KV cache.",
    )
    below = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_admin_commands(below)
    add_simulate_command(below)
