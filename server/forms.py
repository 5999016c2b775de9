"""What a request says about the form of its answer, in OpenAI's words and in vLLM's."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.openai import SamplingFields
from jaxserve.structured import Body, body_of
from jaxserve.types import StructuredOutputsParams

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older names."""

FIELDS = frozenset(spec.name for spec in fields(StructuredOutputsParams))
SWITCHES = ("json_object", "disable_any_whitespace", "disable_additional_properties")


def form_of(body: SamplingFields) -> Body | None:
    """What the answer must look like; None: anything.

    Raises:
        RequestError: two fields ask for a form, or one cannot be understood.
    """
    found: list[tuple[str, Body]] = []
    if (format_body := _of_response_format(body.response_format)) is not None:
        found.append(("response_format", format_body))
    if body.structured_outputs:
        found.append(("structured_outputs", _of_structured_outputs(body.structured_outputs)))
    for name, kind in GUIDED.items():
        if (value := getattr(body, name)) is not None:
            params = StructuredOutputsParams(**{kind: value})
            found.append((name, body_of(params, name, alone=True)))
    if len(found) > 1:
        raise RequestError(
            f"{' and '.join(name for name, _ in found)} both say what the answer must look like; "
            "give one",
            param=found[1][0],
        )
    return found[0][1] if found else None


def _of_response_format(given: Any) -> Body | None:
    param = "response_format"
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return body_of(StructuredOutputsParams(json_object=True), param)
    if kind == "json_schema":
        wrapped = given.get("json_schema")
        if not isinstance(wrapped, Mapping) or not isinstance(
            wrapped.get("schema"), (Mapping, bool)
        ):
            raise RequestError(
                'response_format.json_schema.schema is missing; expected {"type": "json_schema", '
                '"json_schema": {"name": ..., "schema": {...}}}',
                param="response_format.json_schema",
            )
        param = "response_format.json_schema.schema"
        return body_of(StructuredOutputsParams(json=wrapped["schema"]), param, alone=True)
    raise RequestError(
        f"response_format.type is {kind!r:.60}; expected 'text', 'json_object' or 'json_schema'",
        param="response_format.type",
    )


def _of_structured_outputs(given: Any) -> Body:
    param = "structured_outputs"
    if not isinstance(given, Mapping):
        raise RequestError(f"{param} is no object", param=param)
    known = {name: value for name, value in given.items() if name in FIELDS}
    if unknown := sorted(map(str, given.keys() - known.keys())):
        raise RequestError(
            f"{param} has unknown fields {', '.join(unknown)[:200]}; expected "
            + ", ".join(sorted(FIELDS)),
            param=param,
        )
    for name in SWITCHES:
        if not isinstance(known.get(name, False), (bool, type(None))):
            raise RequestError(f"{param}.{name} is no boolean", param=f"{param}.{name}")
    for name in ("disable_any_whitespace", "disable_additional_properties"):
        known[name] = bool(known.get(name))
    pattern = known.get("whitespace_pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise RequestError(
            f"{param}.whitespace_pattern is no text", param=f"{param}.whitespace_pattern"
        )
    return body_of(StructuredOutputsParams(**known), param)
