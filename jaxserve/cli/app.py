"""What every command of `jaxserve` has in common: how it is found, shown and refused.

A command's module is imported when the command runs, or when its own help is asked for, so that
`jaxserve --help` is quick. Help is plain text in sections, at most 80 columns wide. Knows nothing
of what commands do.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from jaxserve.errors import ConfigError
from jaxserve.settings import unknown_name

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}
OPTIONS = "Options"
MAX_FLAG_COLUMNS = 30

Run: TypeAlias = Callable[..., int]


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that is not imported yet.

    Attributes:
        place: `module:function` of what runs it, or of a `Group`.
        help: one line.
    """

    place: str
    help: str
    section: str = "Commands"

    def load(self, name: str) -> "Command | Group":
        module, _, attribute = self.place.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        return found if isinstance(found, Group) else as_command(name, found)


class Command(TyperCommand):
    """A command whose help is in sections."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _write_help(self, ctx, formatter)


class Group(TyperGroup):
    """Commands below a name, each loaded when it is needed.

    Args:
        entries: by the command's name, in the order of the help.
    """

    def __init__(self, name: str, help: str, entries: Mapping[str, Entry], **options: Any):
        super().__init__(
            name=name,
            help=help,
            no_args_is_help=False,
            context_settings=dict(CONTEXT_SETTINGS),
            **options,
        )
        self.entries = entries

    def get_help_option(self, ctx: Any) -> Any:
        found = super().get_help_option(ctx)
        if found is not None:
            found.default = False  # else typer loads pydantic to convert None
        return found

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; None if there is no such."""
        if cmd_name not in self.commands and cmd_name in self.entries:
            self.commands[cmd_name] = self.entries[cmd_name].load(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.entries and not args[0].startswith("-"):
            raise ConfigError(unknown_name("command", args[0], self.entries))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if not self._has_command(ctx):
            raise ConfigError(
                f"{ctx.command_path} needs a command; see {ctx.command_path} --help. "
                f"Valid: {', '.join(self.entries)}"
            )
        return super().invoke(ctx)

    def _has_command(self, ctx: Any) -> bool:
        return bool([*getattr(ctx, "_protected_args", ()), *ctx.args])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _write_help(self, ctx, formatter)


def as_command(name: str, function: Run) -> Command:
    """The command that calls `function`, whose parameters are options and arguments."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command, context_settings=dict(CONTEXT_SETTINGS))(function)
    found = typer.main.get_command(app)
    assert isinstance(found, Command)
    return found


def option(*names: str, help: str, section: str = OPTIONS, **how: Any) -> Any:
    """`typer.Option` for use in Annotated, with the section of the help it belongs to."""
    return typer.Option(
        *names, help=help, rich_help_panel=section, show_default=False, show_envvar=False, **how
    )


def flag(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a command that is made, not written; see `expand`."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def expand(
    function: Run,
    parameter: str,
    flags: Sequence[inspect.Parameter],
    build: Callable[[dict[str, Any]], Any],
) -> Run:
    """Replace one parameter of a command by several flags.

    Args:
        parameter: the name of the parameter.
        build: makes its value from the flags' values, by name.
    """
    signature = inspect.signature(function)
    kept = [own for own in signature.parameters.values() if own.name != parameter]
    assert len(kept) < len(signature.parameters), f"{function.__name__} has no {parameter}"
    names = [made.name for made in flags]

    def command(**given: Any) -> int:
        values = {name: given.pop(name) for name in names}
        return function(**given, **{parameter: build(values)})

    parameters = [*kept, *flags]
    parameters.sort(key=lambda own: own.kind == inspect.Parameter.KEYWORD_ONLY)
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {own.name: own.annotation for own in parameters}
    command.__doc__, command.__name__ = function.__doc__, function.__name__
    command.__module__ = function.__module__
    return command


def usage_of(error: typer.TyperException) -> str:
    """What was wrong with the command line, in one line, with the nearest option there is."""
    name = getattr(error, "option_name", None)
    ctx = getattr(error, "ctx", None)
    if name is not None and type(error).__name__ == "NoSuchOption" and ctx is not None:
        flags = [
            spelt
            for param in ctx.command.get_params(ctx)
            for spelt in (*param.opts, *param.secondary_opts)
            if spelt.startswith("--")
        ]
        near = difflib.get_close_matches(name, flags, n=1)
        hint = f"did you mean {near[0]}? See" if near else "see"
        return f"unknown option {name!r:.100}; {hint} {ctx.command_path} --help"
    text = " ".join(error.format_message().split())
    text = text[:1].lower() + text[1:].rstrip(".")
    return f"{text}; see {ctx.command_path} --help" if ctx is not None else text


def _write_help(command: Any, ctx: Any, formatter: Any) -> None:
    command.format_usage(ctx, formatter)
    first, *rest = inspect.cleandoc(command.help or "").split("\n\n")
    with formatter.indentation():
        for paragraph in (first, *rest):
            formatter.write_paragraph()
            formatter.write_text(" ".join(paragraph.split()))
    sections: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            if param.help:
                rows = sections.setdefault("Arguments", [])
                rows.append((param.metavar or param.name.upper(), param.help))
            continue
        section = getattr(param, "rich_help_panel", None) or OPTIONS
        sections.setdefault(section, []).append((_spelling(param), param.help or ""))
    for name, entry in getattr(command, "entries", {}).items():
        sections.setdefault(entry.section, []).append((name, entry.help))
    general = sections.pop(OPTIONS, None)
    if general:
        sections[OPTIONS] = general
    for name, rows in sections.items():
        with formatter.section(typer.style(name, bold=True)):
            formatter.write_dl(rows, col_max=MAX_FLAG_COLUMNS)


def _spelling(param: Any) -> str:
    """How an option is given: `-h, --help`, `--port N`, `--[no-]warmup`."""
    if len(param.opts) == 1 and param.secondary_opts:
        return "--[no-]" + param.opts[0].removeprefix("--")
    text = ", ".join(sorted(param.opts, key=len))
    return text if param.is_flag or not param.metavar else f"{text} {param.metavar}"
