"""Rewrites of JSON schemas: walks the places that hold schemas, and no others.

A rewrite takes any JSON: what is no schema comes out as it went in, for the compiler to refuse.

Dates and times get patterns that are exact: llguidance's own allow 29 February in every year, the
year 0 and leap seconds, which date libraries refuse.
"""

from collections.abc import Callable, Mapping
from typing import Any

MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
)

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_BY_4 = "(?:0[48]|[2468][048]|[13579][26])"
_DAYS = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAYS}|(?:[0-9]{{2}}{_BY_4}|{_BY_4}00)-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3])"
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:[.][0-9]{{1,6}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"

EXACT_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
}


LONG_FORMATS = ("email", "hostname", "uri")
MAX_ADDRESS_CHARS = 80
"""Addresses may be of any length; ones that nobody writes are kept from weak models."""


def rewrite(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A schema in which `change` was applied to every schema, the inner ones first."""
    if not isinstance(schema, Mapping):
        return schema
    new = dict(schema)
    for key in MAPS:
        if isinstance(new.get(key), Mapping):
            new[key] = {name: rewrite(part, change) for name, part in new[key].items()}
    for key in LISTS:
        if isinstance(new.get(key), list):
            new[key] = [rewrite(part, change) for part in new[key]]
    for key in SINGLES:
        if key in new:
            new[key] = rewrite(new[key], change)
    return change(new)


def with_exact_formats(schema: Any) -> Any:
    """Dates and times by patterns of ours."""
    return rewrite(schema, _exact)


def closed_where_silent(schema: Any) -> Any:
    """Objects that name properties, and are silent about others, allow no others.

    Every answer that fits the result fits the schema. Models end their objects instead of inventing
    names; who wants additional properties says so. A schema that intersects others is left alone:
    closed parts would exclude each other.
    """
    return schema if "allOf" in str(schema) else rewrite(schema, _closed_if_silent)


def without_additional(schema: Any) -> Any:
    """Objects allow what they name only, unless they say otherwise."""
    return rewrite(schema, _closed)


def _exact(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("format")
    if name in LONG_FORMATS and "maxLength" not in schema and "pattern" not in schema:
        return {**schema, "maxLength": MAX_ADDRESS_CHARS}
    pattern = EXACT_FORMATS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return schema
    rest = {key: value for key, value in schema.items() if key != "format"}
    if "pattern" not in rest:
        return {**rest, "pattern": pattern}
    others = rest.get("allOf", [])
    if not isinstance(others, list):
        return schema  # refused where it is compiled
    return {**rest, "allOf": [*others, {"pattern": pattern}]}


def _closed_if_silent(schema: dict[str, Any]) -> dict[str, Any]:
    required, known = schema.get("required", []), schema.get("properties", {})
    speaks = (
        "$ref",
        "anyOf",
        "oneOf",
        "patternProperties",
        "minProperties",
        "unevaluatedProperties",
    )
    if any(key in schema for key in speaks):
        return schema
    if not isinstance(required, (list, tuple)) or not isinstance(known, Mapping):
        return schema  # refused where it is compiled
    if not all(isinstance(name, str) and name in known for name in required):
        return schema
    return _closed(schema)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    if "properties" in schema and "additionalProperties" not in schema:
        return {**schema, "additionalProperties": False}
    return schema
