"""Random JSON schemas and regular expressions, of the kinds that people write."""

import random
import string
from typing import Any

FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname")
PATTERNS = (
    "^[A-Z]{2}[0-9]{3}$",
    "^(red|green|blue)-[0-9]+$",
    "^[a-z]+@[a-z]+[.]com$",
    "^#[0-9a-f]{6}$",
    "^v?[0-9]{1,2}([.][0-9]{1,3}){1,2}$",
)
WORDS = ("name", "age", "city", "tags", "price", "is_open", "id", "note", "items", "größe", "a b")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object's schema; some have definitions that refer to themselves."""
    schema = _object(rng, depth)
    if rng.random() < 0.25:
        leaf = _leaf(rng)
        node = {
            "type": "object",
            "properties": {
                "value": leaf,
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        schema["$defs"] = {"node": node, "leaf": _leaf(rng)}
        schema["properties"]["tree"] = {"$ref": "#/$defs/node"}
        schema["properties"]["leaf"] = {"$ref": "#/$defs/leaf"}
        schema["required"] += ["leaf"]
    return schema


def bounded(schema: Any) -> Any:
    """The schema with an end to every answer: no keys, texts, digits or levels without a limit.

    A small model, told that it may go on, seldom stops of its own accord.
    """
    if isinstance(schema, list):
        return [bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref") == "#/$defs/node":  # within itself
        return {"type": "null"}
    limits: dict[str, Any] = {}
    if schema.get("type") == "object":
        limits = {"additionalProperties": False}
    elif schema.get("type") == "number":
        limits = {"multipleOf": 0.25}  # whose check is exact in binary
    elif schema.get("type") == ["integer", "null"]:
        limits = {"minimum": -99, "maximum": 99}
    elif schema.get("format") in ("email", "hostname", "time", "date-time"):
        limits = {"format": "date"}  # of fixed length; these have parts of any
    return {key: bounded(value) for key, value in schema.items()} | limits


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    kind = rng.random()
    if kind < 0.6:
        schema["additionalProperties"] = False
    elif kind < 0.8:
        schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 99}
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or rng.random() < 0.5:
        return _leaf(rng)
    kind = rng.random()
    if kind < 0.35:
        return _object(rng, depth)
    if kind < 0.7:
        low = rng.randint(0, 2)
        items = _value(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind < 0.8:
        prefix = [_leaf(rng) for _ in range(rng.randint(1, 3))]
        return {
            "type": "array",
            "prefixItems": prefix,
            "items": False,
            "minItems": len(prefix),
        }
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _leaf(rng: random.Random) -> dict[str, Any]:
    kind = rng.randrange(10)
    if kind == 0:
        return {"type": "string", "maxLength": rng.randint(1, 20)}
    if kind == 1:
        return {"type": "string", "minLength": 2, "maxLength": 10}
    if kind == 2:
        return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 20}
    if kind == 3:
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind == 4:
        return {"enum": rng.sample(["x", "y z", 'quo"te', 1, 2.5, True, None, "ü"], 3)}
    if kind == 5:
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
    if kind == 6:
        low = round(rng.uniform(-50, 50), 2)
        return {"type": "number", "exclusiveMinimum": low, "maximum": low + 7.25}
    if kind == 7:
        return {
            "type": "integer",
            "multipleOf": rng.choice([2, 5, 10]),
            "minimum": 0,
            "maximum": 500,
        }
    if kind == 8:
        return {"const": rng.choice(["fixed", 7, None, False])}
    return {"type": rng.choice([["boolean", "null"], "boolean", ["integer", "null"]])}


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """A regular expression that means the same to Rust and to Python, of bounded length."""
    parts = [_regex_part(rng, depth) for _ in range(rng.randint(1, 4))]
    return "".join(parts)


def _regex_part(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(7)
    if kind == 0 or depth == 0:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(1, 4)))
    if kind == 1:
        return rng.choice(("[0-9]", "[a-z]", "[A-Za-z_]", "[^a-z\\n]", "[äöü]")) + _repeat(rng)
    if kind == 2:
        return "(" + "|".join(random_regex(rng, depth - 1) for _ in range(2)) + ")"
    if kind == 3:
        return "(?:" + random_regex(rng, depth - 1) + ")" + _repeat(rng)
    if kind == 4:
        return rng.choice(("\\.", "\\-", "/", "\\(", "\\$", " ", "\\+"))
    if kind == 5:
        return rng.choice(("[0-9]{4}-[0-9]{2}", "#[0-9a-f]{6}", "[A-Z]{3}", "\\([0-9]{3}\\)"))
    return rng.choice("xyz") + _repeat(rng)


def _repeat(rng: random.Random) -> str:
    return rng.choice(("", "?", "{2}", "{1,3}", "{0,2}"))
