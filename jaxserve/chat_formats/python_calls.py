"""Calls as Python writes them, read with `ast`; nothing is evaluated.

Models write what Python would refuse: tools named `get-weather`, arguments named `from`, line
breaks and quotes within strings. Such a text is mended, and read only if Python takes it then.
"""

import ast
import keyword
import math
import re
import textwrap
from typing import Any

from jaxserve.chat_formats.events import to_json
from jaxserve.chat_formats.json_call import JsonCall
from jaxserve.chat_formats.tools import NAME

MAX_CHARS = 262144
MAX_CODE_CHARS = 65536
"""How much may stand outside strings: Python takes ten microseconds for each such character."""
STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
WORDS = {"true": True, "false": False, "null": None}
WORD = re.compile(r"[A-Za-z_][\w.-]*")
TOOL = re.compile(r"\s*\(")
ARGUMENT = re.compile(r"\s*=(?!=)")
STRING_ENDS = re.compile(
    r"""\s*(?:$|[)\]}:]|,\s*(?:$|[A-Za-z_][\w-]*\s*=|["'\[{(\d\])}-]|(?:[Tt]rue|[Ff]alse|[Nn]one|null)\b))"""
)
"""What may follow the quote that ends a string; any other quote belongs to the text."""


def read_calls(text: str) -> list[JsonCall] | None:
    """The calls of a list, or one a line; None: it is something else."""
    text = textwrap.dedent(text).strip()
    if not text or len(text) > MAX_CHARS:
        return None
    if len(text) > MAX_CODE_CHARS and len(STRING.sub("", text)) > MAX_CODE_CHARS:
        return None
    calls = _read(text, {})
    return _read(*_mended(text)) if calls is None else calls


def _read(text: str, names: dict[str, str]) -> list[JsonCall] | None:
    """The calls of a text in which placeholders stand for `names`."""
    try:
        nodes = [_expression(statement) for statement in ast.parse(text).body]
        calls = []
        for node in nodes:
            items = node.elts if isinstance(node, (ast.List, ast.Tuple)) else [node]
            calls += [_read_call(item, names) for item in items]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return calls or None


def _expression(statement: ast.stmt) -> ast.expr:
    if not isinstance(statement, ast.Expr):
        raise ValueError("no expression")
    return statement.value


def _read_call(node: ast.expr, names: dict[str, str]) -> JsonCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    name = ast.unparse(node.func)
    name = names.get(name, name)
    if not NAME.fullmatch(name):
        raise ValueError("no name of a tool")
    arguments = {}
    for given in node.keywords:
        if given.arg is None:
            raise ValueError("arguments in a dictionary")
        arguments[names.get(given.arg, given.arg)] = _read_value(given.value)
    return JsonCall(name, to_json(arguments))


def _read_value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(float(value)) if not math.isfinite(value):
            raise ValueError("JSON has no such number")
        case ast.Constant(value) if value is None or isinstance(value, (str, int, float, bool)):
            return value
        case ast.Name(name) if name in WORDS:
            return WORDS[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if isinstance(value, (int, float)):
            return -value
        case ast.List(items) | ast.Tuple(items):
            return [_read_value(item) for item in items]
        case ast.Dict(keys, values):
            return {
                str(_read_value(key)): _read_value(value)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
    raise ValueError(f"{type(node).__name__} is no value")


def _mended(text: str) -> tuple[str, dict[str, str]]:
    """The text as Python takes it, and the names for which its placeholders stand."""
    parts: list[str] = []
    names: dict[str, str] = {}
    at = 0
    while at < len(text):
        end = at + 1
        if text[at] in "\"'":
            end = _string_end(text, at)
            parts.append(_mended_string(text[at:end]))
        elif word := WORD.match(text, at):
            end = word.end()
            parts.append(_mended_name(word[0], text, end, names))
        else:
            parts.append(text[at])
        at = end
    return "".join(parts), names


def _mended_name(word: str, text: str, end: int, names: dict[str, str]) -> str:
    is_name = TOOL.match(text, end) or ARGUMENT.match(text, end)
    if not is_name or not ("-" in word or keyword.iskeyword(word)):
        return word
    placeholder = f"name_{len(names)}_"
    names[placeholder] = word
    return placeholder


def _string_end(text: str, start: int) -> int:
    """Where the string that begins at `start` ends: after the first quote that can be its end."""
    quote, at = text[start], start + 1
    if text.startswith(quote * 3, start):
        end = text.find(quote * 3, start + 3)
        return len(text) if end < 0 else end + 3
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == quote and STRING_ENDS.match(text, at + 1):
            return at + 1
        at += 1
    return len(text)


def _mended_string(written: str) -> str:
    quote, inside = written[0], written[1:-1]
    if written.startswith(quote * 3):
        return written
    inside = re.sub(rf"(?<!\\)((?:\\\\)*){quote}", rf"\1\\{quote}", inside)
    return quote + inside.replace("\r", "\\r").replace("\n", "\\n") + quote
