"""Chat templates: the Jinja text that ships with a checkpoint, run in a sandbox.

A template comes from the checkpoint, never from a request; messages are data. Knows nothing of
tokens. Whatever a template does wrong becomes a RequestError: the engine goes on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jaxserve.errors import RequestError

Message = Mapping[str, Any]

TEXT_KINDS = ("text", "input_text", "output_text", "refusal")

DEFAULT = "default"
TOOL_USE = "tool_use"
DEVELOPER, SYSTEM = "developer", "system"

ASKS_FOR_NONE = re.compile(r"""message(\.content|\[["']content["']\]) is none(?! or\b)""")
"""Templates such as those of DeepSeek R1 show calls only where a message has no content at all.

Where they ask for none or something else, as Ministral 3, they need a text they can measure.
"""


def normalise_messages(
    messages: Sequence[Message], param: str = "messages"
) -> list[dict[str, Any]]:
    """Check messages and join text parts, so that templates see a role and a text.

    Raises:
        RequestError: naming the message and the field that cannot be used.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f"{param} is {_kind(messages)}; expected a list of messages such as "
            '[{"role": "user", "content": "Hello"}]',
            param=param,
        )
    if not messages:
        raise RequestError(f"{param} is empty; expected at least one message", param=param)
    return [_normalise(message, f"{param}.{i}") for i, message in enumerate(messages)]


def _normalise(message: Any, param: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{param} is {_kind(message)}; expected a message", param=param)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"{param}.role is missing; expected 'system', 'user' or 'assistant'",
            param=f"{param}.role",
        )
    return {**message, "content": _join_parts(message.get("content"), f"{param}.content")}


def _join_parts(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(
            f"{param} is {_kind(content)}; expected a text or a list of text parts", param=param
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        name = "refusal" if kind == "refusal" else "text"
        text = part.get(name) if isinstance(part, Mapping) else None
        if kind not in TEXT_KINDS or not isinstance(text, str):
            raise RequestError(
                f'{param}.{i} is no text part; only {{"type": "text", "text": ...}} is supported',
                param=f"{param}.{i}",
            )
        texts.append(text)
    return "\n".join(texts)


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


class ChatTemplate:
    """The named templates of a checkpoint, compiled on first use.

    Args:
        sources: template text by name; the usual one is called "default".
        special_tokens: bos_token, eos_token, ... as templates name them.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]):
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def source(self, name: str) -> str | None:
        """The text of a template, if there is one of that name."""
        return self._sources.get(name)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self._sources.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation. `kwargs` reach the template (tools, enable_thinking, ...).

        Args:
            continue_final_message: end with the text of the last message, to be continued.
        """
        name = TOOL_USE if kwargs.get("tools") and TOOL_USE in self._sources else DEFAULT
        normalised = normalise_messages(messages)
        if DEVELOPER not in self._sources.get(name, ""):
            normalised = [_as_system(message) for message in normalised]
        if ASKS_FOR_NONE.search(self._sources.get(name, "")):
            normalised = [_call_without_text(message) for message in normalised]
        names = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **kwargs,
            "messages": normalised,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template(name).render(names)
            return _cut_behind(normalised[-1], text) if continue_final_message else text
        except RequestError:
            raise
        except Exception as error:  # a template can fail in any way; all of them are the request's
            raise RequestError(
                f"the chat template refused these messages: {_shorten(str(error))}",
                param="messages",
            ) from error

    def _template(self, name: str) -> Any:
        if name not in self._sources:
            raise RequestError(
                f"the checkpoint's chat templates are {', '.join(self._sources)}; none is called "
                f"{name!r}",
                param="messages",
            )
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._sources[name])
        return self._compiled[name]

    @cached_property
    def _environment(self) -> Any:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks the assistant's own tokens for training; here it is bare."""

            tags = {"generation"}

            def parse(self, parser: Any) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        return environment


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """What is said by a developer, for templates that know only systems."""
    return {**message, "role": SYSTEM} if message["role"] == DEVELOPER else message


def _call_without_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message that is nothing but calls, for templates that ask for no content."""
    is_bare = message.get("tool_calls") and not message["content"]
    return {**message, "content": None} if is_bare else message


def _cut_behind(message: Mapping[str, Any], text: str) -> str:
    """The rendered text as far as the end of its last message's own text.

    Templates may strip a message's text, or go on behind it.
    """
    content = message["content"]
    for wanted in (content, content.strip()):
        start = text.rfind(wanted) if wanted else -1
        if start >= 0:
            return text[: start + len(wanted)]
    raise RequestError(
        "continue_final_message needs a last message with a text, which the chat template shows",
        param="continue_final_message",
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, unlike Jinja's own filter, which escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
