"""Anthropic's messages, tools and stop reasons as chat has them, and back.

Knows nothing of answers on their way. What chat would refuse is left for chat to refuse.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError

IGNORED_BLOCKS = ("redacted_thinking",)
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_messages(messages: Sequence[Any], system: Any) -> list[dict[str, Any]]:
    """The conversation that messages and a system prompt make.

    Raises:
        RequestError: a message or block that cannot be used, by its place.
    """
    converted: list[dict[str, Any]] = []
    if system:
        converted.append({"role": "system", "content": _text_of(system, "system")})
    for i, message in enumerate(messages):
        param = f"messages.{i}"
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or role not in ("user", "assistant", "system"):
            raise RequestError(f"{param}.role must be 'user' or 'assistant'", param=param)
        content = message.get("content")
        if isinstance(content, str):
            converted.append({"role": role, "content": content})
            continue
        if not isinstance(content, Sequence):
            raise RequestError(
                f"{param}.content is neither a text nor a list of blocks", param=f"{param}.content"
            )
        if role == "assistant":
            converted.append(_assistant(content, f"{param}.content"))
        else:
            converted += _user(content, f"{param}.content", role)
    return converted


def chat_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools as chat has them.

    Raises:
        RequestError: a tool that only Anthropic's own servers can run.
    """
    converted = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type", "custom") != "custom":
            kind = tool.get("type") if isinstance(tool, Mapping) else None
            raise RequestError(
                f"tools.{i} is of type {str(kind)[:60]!r}; only custom tools can be called here",
                param=f"tools.{i}",
                code="unsupported",
            )
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        converted.append({"type": "function", "function": function})
    return converted


def chat_tool_choice(choice: Any) -> dict[str, Any]:
    """`tool_choice` as fields of a chat request.

    Raises:
        RequestError: a kind that is not known.
    """
    if choice is None:
        return {}
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    fields: dict[str, Any] = {}
    if kind == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(kind, str) and kind in TOOL_CHOICES:
        fields["tool_choice"] = TOOL_CHOICES[kind]
    else:
        raise RequestError(
            f"tool_choice.type is {str(kind)[:60]!r}; expected auto, any, tool or none",
            param="tool_choice.type",
        )
    if choice.get("disable_parallel_tool_use") is not None:
        fields["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    return fields


def _assistant(blocks: Sequence[Any], param: str) -> dict[str, Any]:
    """What the model said: texts, thoughts and calls, as one message."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for i, block in enumerate(blocks):
        kind, place = _kind(block), f"{param}.{i}"
        if kind == "text":
            message["content"] = (message["content"] or "") + _text(block, "text", place)
        elif kind == "thinking":
            thought = message.get("reasoning_content", "") + _text(block, "thinking", place)
            message["reasoning_content"] = thought
        elif kind == "tool_use":
            call = {
                "id": _text(block, "id", place),
                "type": "function",
                "function": {
                    "name": _text(block, "name", place),
                    "arguments": json.dumps(block.get("input", {}), ensure_ascii=False),
                },
            }
            message.setdefault("tool_calls", []).append(call)
        elif kind not in IGNORED_BLOCKS:
            raise _unknown(block, place)
    return message


def _user(blocks: Sequence[Any], param: str, role: str) -> list[dict[str, Any]]:
    """What the user said, and the results of tools before it, each as a message."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        kind, place = _kind(block), f"{param}.{i}"
        if kind == "text":
            texts.append(_text(block, "text", place))
        elif kind == "tool_result":
            content = block.get("content")
            text = "" if content is None else _text_of(content, f"{place}.content")
            call_id = _text(block, "tool_use_id", place)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            raise _unknown(block, place)
    if texts or not messages:
        messages.append({"role": role, "content": "\n".join(texts)})
    return messages


def _text_of(content: Any, param: str) -> str:
    """A text, or the text of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{param} is neither a text nor a list of text blocks", param=param)
    texts = []
    for i, block in enumerate(content):
        if _kind(block) != "text":
            raise _unknown(block, f"{param}.{i}")
        texts.append(_text(block, "text", f"{param}.{i}"))
    return "\n".join(texts)


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, Mapping) else None


def _text(block: Mapping[str, Any], name: str, param: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{param}.{name} is missing or no text", param=f"{param}.{name}")
    return value


def _unknown(block: Any, param: str) -> RequestError:
    return RequestError(
        f"{param} is a block of type {str(_kind(block))[:60]!r}, which is not supported here",
        param=param,
        code="unsupported",
    )
