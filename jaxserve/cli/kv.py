"""`jaxserve kv`: the group of commands about cached KV blocks.

Each command has its own file beside this one and is registered here.
"""

from jaxserve.cli.flags import Parser
from jaxserve.cli.kv_simulate import add_simulate_command


def add_kv_commands(commands: Parser.Commands) -> None:
    """Register `kv` and what stands below it."""
    group = commands.add_parser(
        "kv", help="look into cached KV blocks", description="Look into cached KV blocks."
    )
    below = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_simulate_command(below)
