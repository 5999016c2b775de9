"""What a request asks for, as the text of a grammar (llguidance's dialect of Lark).

Checks sizes and types; whether the grammar makes sense is found by compiling it. Texts are built
so that they can be preceded by other rules: a reasoning part, the head of a tool call.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.structured.schemas import closed_where_silent, with_exact_formats, without_additional
from jaxserve.types import StructuredOutputsParams

MAX_GRAMMAR_CHARS = 256 * 1024
"""Longest JSON schema or grammar."""
MAX_REGEX_CHARS = 16 * 1024
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = 64

JSON_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": r"\x20"}
"""One blank at most between the parts of JSON. Where any white space is allowed, weak models fill
their answers with it, and strong ones write a third more tokens."""

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class Body:
    """The rule `body` of a grammar.

    Attributes:
        rule: its right side.
        parts: further grammars that it names as `@name`.
        schema: the JSON schema it stands for, to say which part of it is wrong.
        param: what errors call it.
    """

    rule: str
    parts: tuple[tuple[str, str], ...] = ()
    schema: Any = None
    param: str = "structured_outputs"


def grammar_of(params: StructuredOutputsParams) -> str:
    """The grammar of an answer that is nothing but what `params` asks for.

    Raises:
        RequestError: nothing or several things are asked for, or one is too large or of the wrong
            type.
    """
    return complete(body_of(params))


def complete(body: Body, before: str = "") -> str:
    """A whole grammar.

    Args:
        before: what precedes the body, as the right side of a rule.
    """
    lines = ["%llguidance {}", f"start: {before} body".replace("  ", " "), f"body: {body.rule}"]
    if not body.parts:
        return "\n".join(lines) + "\n"
    grammars = [{"lark_grammar": "\n".join(lines) + "\n"}]
    grammars += [{"name": name, "lark_grammar": text} for name, text in body.parts]
    return json.dumps({"grammars": grammars})


def body_of(
    params: StructuredOutputsParams, param: str = "structured_outputs", *, alone: bool = False
) -> Body:
    """The rule for what `params` asks for; see `grammar_of`.

    Args:
        param: what errors call `params`, or, if `alone`, the one thing in it.
    """
    given = [kind for kind in KINDS if getattr(params, kind) not in (None, False)]
    if len(given) != 1:
        raise RequestError(
            f"{param} asks for {' and '.join(given) or 'nothing'}; expected exactly one of "
            + ", ".join(KINDS),
            param=param,
        )
    (kind,) = given
    value = getattr(params, kind)
    name = param if alone else f"{param}.{kind}"
    if kind == "json_object":
        return json_body({"type": "object"}, params, param)
    if kind == "json":
        return json_body(_parse_schema(value, name), params, name)
    if kind == "regex":
        return _regex_body(value, name)
    if kind == "choice":
        return _choice_body(value, name)
    if kind == "grammar":
        return _grammar_body(value, name)
    raise RequestError(
        f"{name} is not supported; use tools, or a grammar",
        param=name,
        code="unsupported",
    )


def json_body(schema: Any, params: StructuredOutputsParams, param: str) -> Body:
    """The rule for JSON that fits a schema."""
    options = JSON_OPTIONS
    if params.whitespace_pattern is not None:
        options = {"whitespace_pattern": params.whitespace_pattern}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    if params.disable_additional_properties:
        schema = without_additional(schema)
    return Body(json_rule(schema, options), schema=schema, param=param)


def json_rule(schema: Any, options: Mapping[str, Any] | None = None) -> str:
    """JSON that fits a schema, as part of a rule."""
    if options is None:
        options = JSON_OPTIONS
    exact = {} if schema is True else closed_where_silent(with_exact_formats(schema))
    return "%json " + json.dumps({**exact, "x-guidance": options})


def text_rule(text: str) -> str:
    """Exactly this text, as part of a rule."""
    return json.dumps(text)


def _parse_schema(value: Any, param: str) -> Any:
    if isinstance(value, str):
        if len(value) > MAX_GRAMMAR_CHARS:
            raise RequestError(_too_long(param, len(value), MAX_GRAMMAR_CHARS), param=param)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param} is no JSON: {str(error)[:200]}", param=param) from error
    if not isinstance(value, Mapping) and value is not True:
        raise RequestError(
            f"{param} is of type {type(value).__name__}; expected a JSON schema", param=param
        )
    if _depth(value) > MAX_SCHEMA_DEPTH:
        raise RequestError(
            f"{param} is nested more than {MAX_SCHEMA_DEPTH} deep; make it flatter", param=param
        )
    try:
        num_chars = len(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{param} is no JSON: {str(error)[:200]}", param=param) from error
    if num_chars > MAX_GRAMMAR_CHARS:
        raise RequestError(_too_long(param, num_chars, MAX_GRAMMAR_CHARS), param=param)
    return value


def _regex_body(value: Any, param: str) -> Body:
    from llguidance import regex_to_lark

    _check_text(value, param, MAX_REGEX_CHARS)
    return Body(f"/{regex_to_lark(value, '')}/", param=param)


def _choice_body(value: Any, param: str) -> Body:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (list, tuple)):
        raise RequestError(
            f"{param} is of type {type(value).__name__}; expected a list of texts", param=param
        )
    if not 1 <= len(value) <= MAX_CHOICES:
        raise RequestError(
            f"{param} has {len(value)} entries; expected 1 to {MAX_CHOICES}", param=param
        )
    for i, choice in enumerate(value):
        _check_text(choice, f"{param}.{i}", MAX_REGEX_CHARS)
    if sum(map(len, value)) > MAX_GRAMMAR_CHARS:
        raise RequestError(_too_long(param, sum(map(len, value)), MAX_GRAMMAR_CHARS), param=param)
    return Body(" | ".join(map(text_rule, dict.fromkeys(value))), param=param)


def _grammar_body(value: Any, param: str) -> Body:
    from llguidance.gbnf_to_lark import any_to_lark

    _check_text(value, param, MAX_GRAMMAR_CHARS)
    try:
        text = any_to_lark(value)
    except Exception as error:  # the converter raises bare Exception
        raise RequestError(
            f"{param} is neither a Lark nor a GBNF grammar: {str(error)[:200]}", param=param
        ) from error
    return Body("@given", parts=(("given", text),), param=param)


def _check_text(value: Any, param: str, limit: int) -> None:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{param} is empty or no text; expected a text", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} has half a surrogate pair at character {error.start}; expected a text that "
            "UTF-8 can express",
            param=param,
        ) from error
    if len(value) > limit:
        raise RequestError(_too_long(param, len(value), limit), param=param)


def _too_long(param: str, num_chars: int, limit: int) -> str:
    return f"{param} has {num_chars} characters; expected at most {limit}"


def _depth(value: Any) -> int:
    """How deeply containers are nested; iterative, since a request chooses the depth."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, depth = todo.pop()
        deepest = max(deepest, depth)
        if deepest > MAX_SCHEMA_DEPTH:
            return deepest
        children = item.values() if isinstance(item, Mapping) else item
        if isinstance(children, (str, bytes)) or not hasattr(children, "__iter__"):
            continue
        todo += [(child, depth + 1) for child in children]
    return deepest
