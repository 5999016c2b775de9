"""Patterns of arguments that stand in a row with commas between them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxserve.chat_formats.format import Either, Part
from jaxserve.chat_formats.tools import Tool

MAX_OPTIONAL = 6
"""With more optional arguments than this, enforced calls hold the required ones only."""

Argument: TypeAlias = Callable[[str, Any], Sequence[Part]]
"""How an argument is written, from its name and schema."""


def listed_parts(
    tool: Tool, argument: Argument, comma: str, keys: Sequence[str]
) -> tuple[Part, ...]:
    """Arguments in the order of `keys`; commas depend on what was left out before."""
    if len([key for key in keys if key not in tool.required]) > MAX_OPTIONAL:
        keys = [key for key in keys if key in tool.required]

    def rest(i: int, is_first: bool) -> tuple[Part, ...]:
        if i == len(keys):
            return ()
        lead, *value = argument(keys[i], tool.properties[keys[i]])
        assert isinstance(lead, str)
        given = (("" if is_first else comma) + lead, *value, *rest(i + 1, False))
        if keys[i] in tool.required:
            return given
        return (Either((given, rest(i + 1, is_first))),)

    return rest(0, True)
