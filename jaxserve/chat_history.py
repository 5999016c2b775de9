"""Earlier messages of a conversation as chat templates want them, whichever way they read them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.chat_template import Message
from jaxserve.errors import RequestError


class Arguments(dict[str, Any]):
    """Arguments of a call: an object, but JSON where it is joined to a text or written as one.

    Most templates take the object apart or write it with `tojson`; those of DeepSeek V3, R1 and
    V3.1 join the text that a client sends, and would refuse an object.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, after: str) -> str:
        return str(self) + after

    def __radd__(self, before: str) -> str:
        return before + str(self)


def prepare_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """Messages as templates want them: arguments of calls as objects, reasoning by both names.

    Raises:
        RequestError: the arguments of a call are no JSON object.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        return messages  # refused where messages are checked
    return [_prepare(message, f"messages.{i}") for i, message in enumerate(messages)]


def _prepare(message: Any, param: str) -> Any:
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    prepared = dict(message)
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str):
        prepared |= {"reasoning_content": thought, "reasoning": thought, "thinking": thought}
    calls = message.get("tool_calls")
    if not calls:
        prepared.pop("tool_calls", None)
        return prepared
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{param}.tool_calls is no list", param=f"{param}.tool_calls")
    prepared["tool_calls"] = [
        _prepare_call(call, f"{param}.tool_calls.{i}") for i, call in enumerate(calls)
    ]
    return prepared


def _prepare_call(call: Any, param: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{param}.function.name is missing", param=f"{param}.function.name")
    arguments = function.get("arguments")
    if arguments in (None, ""):
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"{param}.function.arguments is no JSON object",
            param=f"{param}.function.arguments",
        )
    return {**call, "function": {**function, "arguments": Arguments(arguments)}}
