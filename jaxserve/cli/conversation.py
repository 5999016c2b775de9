"""A conversation, its settings and its file; and what a line that begins with / asks for.

Knows nothing of terminals or HTTP.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.settings import unknown_name

NUMBERS: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "ignore_eos": bool,
}
ROLES = ("system", "user", "assistant")
BOOLS = {"true": True, "on": True, "yes": True, "1": True}
BOOLS |= {"false": False, "off": False, "no": False, "0": False}


@dataclass
class Conversation:
    """Messages in order; `sampling` has what was set, by the API's names."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the server gets."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def take_back(self) -> str:
        """Remove the last question and its answer; returns the question.

        Raises:
            ConfigError: there is none.
        """
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        raise ConfigError("nothing was asked yet")

    def set(self, text: str) -> str:
        """Change a sampling parameter by `name=value`; `name=` goes back to the model's own.

        Raises:
            ConfigError: no such parameter, or not such a value.
        """
        name, equals, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if name not in NUMBERS and name != "stop":
            raise ConfigError(unknown_name("parameter", name, [*NUMBERS, "stop"]))
        if not equals:
            return f"{name} = {self.sampling.get(name, 'as the model recommends')}"
        if not value:
            self.sampling.pop(name, None)
            return f"{name} is as the model recommends"
        self.sampling[name] = _value(name, value)
        return f"{name} = {self.sampling[name]}"

    def save(self, path: str) -> None:
        """Write a JSON file that `load` reads.

        Raises:
            ConfigError: it cannot be written.
        """
        content = {"messages": self.messages, "sampling": self.sampling}
        try:
            text = json.dumps(content, ensure_ascii=False, indent=1)
            Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def load(self, path: str) -> None:
        """Take everything from a file that `save` wrote, or from a list of messages.

        Raises:
            ConfigError: it cannot be read, or is something else; nothing is changed then.
        """
        try:
            content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        content = {"messages": content} if isinstance(content, list) else content
        messages = content.get("messages") if isinstance(content, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ConfigError(
                f"{path} holds no conversation; expected messages with role (one of "
                f"{', '.join(ROLES)}) and content"
            )
        systems = [m["content"] for m in messages if m["role"] == "system"]
        given: Any = content.get("sampling") if isinstance(content, dict) else None
        sampling = {
            name: value
            for name, value in (given if isinstance(given, dict) else {}).items()
            if name in NUMBERS or name == "stop"
        }
        self.system = "\n".join(systems) or None
        self.turns = [
            {"role": m["role"], "content": m["content"]} for m in messages if m["role"] != "system"
        ]
        self.sampling = sampling


@dataclass(frozen=True, slots=True)
class Command:
    """What a line such as `/set top_k=5` does; `act` gets what follows the name."""

    usage: str
    help: str
    act: Callable[[str], None]


def help_text(commands: Mapping[str, Command]) -> str:
    width = max(len(command.usage) for command in commands.values())
    return "\n".join(f"  {c.usage:<{width}}  {c.help}" for c in commands.values())


def find_command(commands: Mapping[str, Command], line: str) -> tuple[Command, str]:
    """The command of a line that begins with /, and what follows its name.

    Raises:
        ConfigError: there is no such command.
    """
    name, _, rest = line.partition(" ")
    starts = [known for known in commands if known.startswith(name)] if len(name) > 1 else []
    if name in commands:
        starts = [name]
    if len(starts) != 1:
        raise ConfigError(unknown_name("command", name, commands))
    return commands[starts[0]], rest.strip()


def _value(name: str, text: str) -> Any:
    kind = NUMBERS.get(name, str)
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        expected = {int: "an integer", float: "a number", bool: "true or false"}[kind]
        raise ConfigError(f"{name} is {text!r:.60}; expected {expected}") from error


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return False
    return isinstance(message.get("content"), str)
