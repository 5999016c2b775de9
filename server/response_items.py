"""Items of /v1/responses as messages of a conversation, and its tools and formats as chat has them.

Knows nothing of answers. What chat would refuse is left for chat to refuse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError

MAX_ITEMS = 10_000


def messages_of(items: Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation that items make.

    A call belongs to the model's message before it, if there is one, and so does its reasoning to
    the message after it.

    Raises:
        RequestError: an item that is not known, by its place.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    reasoning = ""
    for i, item in enumerate(items):
        param = f"input.{i}"
        if not isinstance(item, Mapping):
            raise RequestError(f"{param} is no item; expected an object", param=param)
        kind = item.get("type", "message")
        if kind == "reasoning":
            reasoning += _reasoning_text(item)
            continue
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
        elif kind == "function_call":
            call = _call(item, param)
            last = messages[-1] if messages else {}
            if last.get("role") == "assistant" and not reasoning:
                last.setdefault("tool_calls", []).append(call)
                continue
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            message = _call_output(item, param)
        else:
            raise RequestError(
                f"{param}.type is {str(kind)[:60]!r}; expected message, function_call, "
                "function_call_output or reasoning",
                param=f"{param}.type",
                code="unsupported",
            )
        if reasoning and message["role"] == "assistant":
            message["reasoning_content"], reasoning = reasoning, ""
        messages.append(message)
    return messages


def as_items(given: Any) -> list[Any]:
    """`input` as a list of items.

    Raises:
        RequestError: it is neither a text nor a list of items.
    """
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError(
            "input is missing or empty; expected a text or a list of items", param="input"
        )
    if len(given) > MAX_ITEMS:
        raise RequestError(
            f"input has {len(given)} items; expected at most {MAX_ITEMS}", param="input"
        )
    return given


def chat_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Function tools as chat has them.

    Raises:
        RequestError: a tool that only OpenAI's own servers can run.
    """
    converted = []
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or kind != "function":
            raise RequestError(
                f"tools.{i} is of type {str(kind)[:60]!r}; only functions can be called here",
                param=f"tools.{i}",
                code="unsupported",
            )
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        converted.append({"type": "function", "function": function})
    return converted


def chat_tool_choice(choice: Any, tools: list[dict[str, Any]]) -> Any:
    """`tool_choice` as chat has it. Of `allowed_tools`, only those are left in `tools`."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = [tool.get("name") for tool in choice["tools"] if isinstance(tool, Mapping)]
        tools[:] = [tool for tool in tools if tool["function"].get("name") in allowed]
        return choice.get("mode", "auto")
    raise RequestError(
        f"tool_choice is of type {str(choice.get('type'))[:60]!r}; expected auto, none, required, "
        "a function or allowed_tools",
        param="tool_choice",
        code="unsupported",
    )


def chat_response_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`text.format` as chat's `response_format`; None asks for plain text."""
    given = (text or {}).get("format")
    if given is None or not isinstance(given, Mapping) or given.get("type") == "text":
        return None
    if given.get("type") != "json_schema":
        return dict(given)
    schema = {name: given[name] for name in ("name", "schema", "strict") if name in given}
    return {"type": "json_schema", "json_schema": schema}


def _reasoning_text(item: Mapping[str, Any]) -> str:
    parts = item.get("content") or item.get("summary")
    if not isinstance(parts, list):
        return ""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def _call(item: Mapping[str, Any], param: str) -> dict[str, Any]:
    return {
        "id": _text(item, "call_id", param),
        "type": "function",
        "function": {
            "name": _text(item, "name", param),
            "arguments": _text(item, "arguments", param),
        },
    }


def _call_output(item: Mapping[str, Any], param: str) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, (str, list)):
        raise RequestError(f"{param}.output is no text", param=f"{param}.output")
    return {"role": "tool", "tool_call_id": _text(item, "call_id", param), "content": output}


def _text(item: Mapping[str, Any], name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{param}.{name} is missing or no text", param=f"{param}.{name}")
    return value
