"""Flags from the fields of Config and SamplingParams, and what they say, as settings.

No flag is written by hand that a field describes. Knows nothing of what commands do.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from jaxserve.errors import ConfigError
from jaxserve.settings import Setting, Settings, all_settings, load_settings, unknown_name
from jaxserve.types import SamplingParams

SAMPLING_HELP = {
    "max_tokens": "stop after this many tokens; default: what the context holds",
    "temperature": "0 picks the likeliest token",
    "top_k": "keep the k likeliest tokens; 0 keeps all",
    "top_p": "keep the likeliest tokens that reach this probability together",
    "min_p": "drop tokens less likely than this times the likeliest",
    "presence_penalty": "subtracted for tokens of the answer",
    "frequency_penalty": "the same, times how often they came",
    "repetition_penalty": "divides the logits of tokens seen anywhere",
    "min_tokens": "no end before this many tokens",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors, with the nearest option named."""

    Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
    Args: TypeAlias = argparse.Namespace

    def __init__(self, **kwargs: Any):
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.HelpFormatter, **kwargs}
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises ConfigError where argparse would print its usage and exit."""
        args, rest = self.parse_known_args(argv)
        if rest:
            parser: Parser = getattr(args, "parser", self)
            raise ConfigError(parser._unknown(rest[0]))
        return args

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def _unknown(self, argument: str) -> str:
        name = argument.split("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {argument!r:.100}; see {self.prog} --help"
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        return unknown_name("option", name, flags)


def add_command(
    commands: Parser.Commands,
    name: str,
    usage: str,
    help: str,
    run: Callable[[argparse.Namespace], int],
) -> Parser:
    command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    command.usage = f"{command.prog} {usage}".rstrip()
    command.set_defaults(run=run, parser=command)
    return command


def add_settings(command: Parser) -> None:
    """A flag for each setting, in groups by section, and --config."""
    command.add_argument("--config", metavar="FILE", help="YAML file with settings")
    groups: dict[str, Any] = {}
    for setting in all_settings().values():
        if setting.section not in groups:
            groups[setting.section] = command.add_argument_group(setting.section)
        options: dict[str, Any] = {"dest": "set_" + setting.name, "default": None}
        options["help"] = _help(setting)
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(setting)
        groups[setting.section].add_argument(setting.flag, **options)


def settings_of(args: argparse.Namespace, **defaults: Any) -> Settings:
    """What flags, environment and file say together.

    Args:
        defaults: a command's own defaults, for settings that nobody gave.

    Raises:
        ConfigError: what is given cannot work.
    """
    flags = {name: getattr(args, "set_" + name) for name in all_settings()}
    model = getattr(args, "model_argument", None)
    if model is not None:
        if flags["model"] is not None:
            raise ConfigError(f"the model is given twice: {model!r} and --model {flags['model']!r}")
        flags["model"] = model
    given = load_settings(flags, os.environ, args.config)
    missing = {name: value for name, value in defaults.items() if name not in given.origins}
    if not missing:
        return given
    loaded = load_settings(
        {**missing, **{k: v for k, v in flags.items() if v is not None}}, os.environ, args.config
    )
    return Settings(loaded.config, given.origins)


def add_sampling(command: Parser) -> None:
    """Flags for the scalar sampling parameters, and --stop."""
    group = command.add_argument_group("sampling")
    for spec in dataclasses.fields(SamplingParams):
        if spec.name in SAMPLING_HELP:
            kind = float if isinstance(spec.default, float) else int
            group.add_argument(
                "--" + spec.name.replace("_", "-"),
                dest="sample_" + spec.name,
                type=kind,
                metavar=kind.__name__.upper(),
                help=SAMPLING_HELP[spec.name],
            )
    group.add_argument(
        "--stop", dest="sample_stop", action="append", metavar="TEXT", help="stop at this text"
    )
    group.add_argument(
        "--ignore-eos",
        dest="sample_ignore_eos",
        action="store_const",
        const=True,
        help="go on after the model's end of sequence",
    )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given, by name."""
    given = {
        name.removeprefix("sample_"): value
        for name, value in vars(args).items()
        if name.startswith("sample_") and value is not None
    }
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return given


def _help(setting: Setting) -> str:
    parts = [setting.help]
    if setting.choices:
        parts.append("one of " + ", ".join(setting.choices))
    if not setting.optional:
        parts.append(f"default: {setting.default}")
    return ("; ".join(parts) + f" [{setting.variable}]").replace("%", "%%")


def _metavar(setting: Setting) -> str:
    if setting.name.endswith("_bytes"):
        return "BYTES"
    return {int: "N", float: "X", str: "TEXT"}[setting.kind]
