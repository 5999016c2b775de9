"""Patterns of calls whose arguments are written one by one between tags, texts without quotes."""

from collections.abc import Mapping
from typing import Any

from jaxserve.chat_formats.format import Either, Json, Optional, Part, TextBefore
from jaxserve.chat_formats.tools import Tool, is_text


def tagged_parts(
    tool: Tool,
    *,
    head: str,
    before_key: str,
    after_key: str,
    after_value: str,
    tail: str,
) -> list[Part]:
    """A call with its arguments in the order of the schema; only required ones must be there."""
    definitions = {key: tool.parameters[key] for key in ("$defs",) if key in tool.parameters}
    parts: list[Part] = [head]
    for key, schema in tool.properties.items():
        argument = (before_key + key + after_key, *_value(schema, after_value, definitions))
        parts += argument if key in tool.required else [Optional(argument)]
    return [*parts, tail]


def _value(schema: Any, after: str, definitions: Mapping[str, Any]) -> tuple[Part, ...]:
    if not is_text(schema):
        whole = {**definitions, **schema} if isinstance(schema, Mapping) else schema
        return (Json(whole), after)
    choices = schema.get("enum")
    if "const" in schema:
        choices = [schema["const"]]
    if choices:
        return (Either(tuple((str(choice),) for choice in choices)), after)
    return (TextBefore(after),)
