"""Calls whose arguments are written one by one between tags, texts without quotes: how their values
are read, and their patterns."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from jaxserve.chat_formats.events import CallArguments, Event, to_json
from jaxserve.chat_formats.format import Either, Json, Optional, Part, TextBefore
from jaxserve.chat_formats.source import NEED_MORE, Source, held_back
from jaxserve.chat_formats.tools import Tool, cast_value, is_text


def tagged_value(
    source: Source, index: int, schema: Any, ends: Sequence[str], *, has_breaks: bool = False
) -> Generator[Event | None, None, str]:
    """Give out a value up to the first of `ends`, texts as they come. Returns what was used.

    Args:
        schema: what the value should be.
        has_breaks: a line break after the tag before, and one before the tag after, are no part
            of the value.
    """
    raw, pending, streams, is_first = "", "", is_text(schema), has_breaks
    if streams:
        yield CallArguments(index, '"')
    while True:
        found = [at for end in ends if (at := source.text.find(end)) >= 0]
        held = 0 if source.is_final else max(held_back(source.text, end) for end in ends)
        piece = source.take(min(found) if found else len(source.text) - held)
        raw += piece
        pending += piece
        is_over = bool(found) or source.is_final
        if is_first and pending:
            pending, is_first = pending.removeprefix("\n"), False
        if is_over and has_breaks:
            pending = pending.removesuffix("\n")
        if streams:
            keep = has_breaks and not is_over and pending.endswith("\n")
            text, pending = pending[: len(pending) - keep], pending[len(pending) - keep :]
            if text:
                yield CallArguments(index, to_json(text)[1:-1])
        if is_over:
            break
        yield NEED_MORE
    yield CallArguments(index, '"' if streams else to_json(cast_value(pending, schema)))
    return raw


def tagged_parts(
    tool: Tool,
    *,
    head: str,
    before_key: str,
    after_key: str | Callable[[Any], str],
    after_value: str | Callable[[str], str],
    tail: str,
    write_key: Callable[[str], str] = str,
) -> list[Part]:
    """A call with its arguments in the order of the schema; only required ones must be there.

    Args:
        after_key: a text, or what gives it for the schema of the value.
        after_value: a text, or what gives it for the key.
        write_key: how a key stands between `before_key` and `after_key`.
    """
    definitions = definitions_of(tool)
    parts: list[Part] = [head]
    for key, schema in tool.properties.items():
        end_of_key = after_key if isinstance(after_key, str) else after_key(schema)
        end = after_value if isinstance(after_value, str) else after_value(key)
        lead = before_key + write_key(key) + end_of_key
        argument = (lead, *value_parts(schema, end, definitions))
        parts += argument if key in tool.required else [Optional(argument)]
    return [*parts, tail]


def definitions_of(tool: Tool) -> dict[str, Any]:
    """What the schemas of a tool's arguments may refer to."""
    return {key: tool.parameters[key] for key in ("$defs",) if key in tool.parameters}


def value_parts(schema: Any, after: str, definitions: Mapping[str, Any]) -> tuple[Part, ...]:
    """A value and the text after it: a text as it stands, JSON otherwise."""
    if not is_text(schema):
        whole = {**definitions, **schema} if isinstance(schema, Mapping) else schema
        return (Json(whole), after)
    choices = schema.get("enum")
    if "const" in schema:
        choices = [schema["const"]]
    if choices:
        return (Either(tuple((str(choice),) for choice in choices)), after)
    return (TextBefore(after),)
