"""The tools of a request, checked, and values of arguments as their schemas want them."""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.errors import RequestError

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ALTERNATIVES = ("anyOf", "oneOf")
MAX_LITERAL_CHARS = 65536


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object.
        strict: calls must fit the schema, even where the model may choose not to call.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> frozenset[str]:
        found = self.parameters.get("required")
        return frozenset(found if isinstance(found, list) else ())


def parse_tools(given: Any, param: str = "tools") -> tuple[Tool, ...]:
    """Tools in OpenAI's form: {"type": "function", "function": {name, parameters, strict}}.

    Raises:
        RequestError: naming the tool and the field that cannot be used.
    """
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError(f"{param} is no list of tools", param=param)
    if len(given) > MAX_TOOLS:
        raise RequestError(
            f"{param} has {len(given)} entries; expected at most {MAX_TOOLS}", param=param
        )
    tools = tuple(_parse_tool(tool, f"{param}.{i}") for i, tool in enumerate(given))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(
                f"{param}.{i}.function.name is {name!r}, which another tool has",
                param=f"{param}.{i}.function.name",
            )
    return tools


def _parse_tool(tool: Any, param: str) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(
            f'{param} is no function; expected {{"type": "function", "function": {{"name": ...}}}}',
            param=param,
        )
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(
            f"{param}.function.name is missing or unusable; expected 1 to 64 letters, digits, "
            "'_', '-' or '.'",
            param=f"{param}.function.name",
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise RequestError(
            f"{param}.function.parameters is no JSON schema", param=f"{param}.function.parameters"
        )
    tool = Tool(name, parameters, bool(function.get("strict")))
    _check_read(tool, f"{param}.function.parameters")
    return tool


def _check_read(tool: Tool, param: str) -> None:
    """Refuse what calls could not be read by; the rest of a schema is for the model, and for the
    compiler if calls are enforced."""
    if not _are_texts(tool.parameters.get("required") or []):
        raise RequestError(f"{param}.required is no list of names", param=f"{param}.required")
    todo = [(schema, f"{param}.properties.{name}") for name, schema in tool.properties.items()]
    while todo:
        schema, where = todo.pop()
        if not isinstance(schema, Mapping):
            continue
        kinds = schema.get("type") or []
        if not isinstance(kinds, str) and not _are_texts(kinds):
            raise RequestError(
                f"{where}.type is neither the name of a type nor a list of names",
                param=f"{where}.type",
            )
        for key in ALTERNATIVES:
            parts = schema.get(key) or []
            if not isinstance(parts, list):
                raise RequestError(f"{where}.{key} is no list of schemas", param=f"{where}.{key}")
            todo += [(part, f"{where}.{key}.{i}") for i, part in enumerate(parts)]


def _are_texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(item, str) for item in given)


def types_of(schema: Any) -> set[str]:
    """The JSON types that a schema names, by itself or in alternatives; empty: any."""
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type")
    found = {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(kinds, list) else set()
    for key in ALTERNATIVES:
        for part in schema.get(key) or ():
            found |= types_of(part)
    if not found and isinstance(schema.get("enum"), list):
        found = {"string" if isinstance(value, str) else "number" for value in schema["enum"]}
    return found


def is_text(schema: Any) -> bool:
    """Whether a value written without quotes is a text as it stands."""
    return types_of(schema) == {"string"}


def cast_value(text: str, schema: Any) -> Any:
    """A value that was written without quotes, as its schema wants it; a text if it is no JSON.

    Where no text is wanted, lists and objects may be written as Python has them.
    """
    kinds = types_of(schema)
    if kinds == {"string"}:
        return text
    stripped = text.strip()
    lowered = stripped.lower()
    if lowered in ("true", "false") and (not kinds or "boolean" in kinds):
        return lowered == "true"
    if lowered in ("null", "none") and (not kinds or "null" in kinds):
        return None
    try:
        value = json.loads(stripped, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return text if not kinds or "string" in kinds else _literal(stripped, text)
    if "string" in kinds and isinstance(value, (list, dict)):
        return value if ("array" if isinstance(value, list) else "object") in kinds else text
    if isinstance(value, (int, float)) and kinds and not kinds & {"integer", "number"}:
        return text
    if isinstance(value, float) and value.is_integer() and kinds == {"integer"}:
        return int(value)
    return value


def _literal(written: str, otherwise: str) -> Any:
    """A list or object in Python's notation, as JSON knows it; `otherwise`: it is none."""
    if written[:1] not in ("[", "{", "(") or len(written) > MAX_LITERAL_CHARS:
        return otherwise
    try:
        return json.loads(json.dumps(ast.literal_eval(written), allow_nan=False))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return otherwise


def _finite(written: str) -> float:
    value = float(written)
    return value if math.isfinite(value) else _refuse(written)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
