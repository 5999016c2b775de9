"""Flags from the fields of Config and SamplingParams, and what they say, as settings.

No flag is written by hand that a field describes. `with_settings` and `with_sampling` decorate a
command's function: its parameter `settings` or `sampling` becomes all those flags. Knows nothing of
what commands do.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

import typer

from jaxserve.cli.app import Run, expand, flag, option
from jaxserve.errors import ConfigError
from jaxserve.settings import Setting, Settings, all_settings, load_settings
from jaxserve.types import SamplingParams

SAMPLING = "Sampling"
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
    "seed": "makes the answer the same every time",
}

ModelArgument: TypeAlias = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="the same as --model MODEL")
]


def with_settings(**defaults: Any) -> Callable[[Run], Run]:
    """Give a command a flag for each setting, and `--config`, in place of its `settings`.

    Args:
        defaults: the command's own defaults, for settings that nobody gave.
    """

    def decorate(function: Run) -> Run:
        flags = [config_flag(), *map(_setting_flag, all_settings().values())]

        def build(values: Mapping[str, Any]) -> Settings:
            given = {name.removeprefix("set_"): value for name, value in values.items()}
            config_file = given.pop("config_file")
            return settings_of(given, config_file, **defaults)

        return expand(function, "settings", flags, build)

    return decorate


def with_model_argument(function: Run) -> Run:
    """Let a command with settings take the model as an argument, too."""
    signature = inspect.signature(function)

    def command(model_argument: str | None, **given: Any) -> int:
        if model_argument is not None:
            if given["set_model"] is not None:
                raise ConfigError(
                    f"the model is given twice: {model_argument!r} and "
                    f"--model {given['set_model']!r}"
                )
            given["set_model"] = model_argument
        return function(**given)

    own = inspect.Parameter(
        "model_argument",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=ModelArgument,
    )
    positional = [p for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]
    others = [p for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY]
    parameters = [*positional, own, *others]
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__, command.__name__ = function.__doc__, function.__name__
    return command


def settings_of(flags: Mapping[str, Any], config_file: str | None, **defaults: Any) -> Settings:
    """What flags, environment and file say together.

    Args:
        flags: by setting name, None where the flag was not given.
        defaults: a command's own defaults, for settings that nobody gave.

    Raises:
        ConfigError: what is given cannot work.
    """
    given = load_settings(flags, os.environ, config_file)
    missing = {name: value for name, value in defaults.items() if name not in given.origins}
    if not missing:
        return given
    chosen = {name: value for name, value in flags.items() if value is not None}
    loaded = load_settings({**missing, **chosen}, os.environ, config_file)
    return Settings(loaded.config, given.origins)


def config_flag() -> inspect.Parameter:
    """`--config FILE`."""
    return flag(
        "config_file",
        str | None,
        option("--config", metavar="FILE", help="YAML file with settings (env JAXSERVE_CONFIG)"),
    )


def with_sampling(function: Run) -> Run:
    """Give a command a flag for each scalar sampling parameter, in place of its `sampling`."""
    flags = []
    for spec in dataclasses.fields(SamplingParams):
        if spec.name in SAMPLING_HELP:
            kind = float if isinstance(spec.default, float) else int
            shown = option(
                "--" + spec.name.replace("_", "-"),
                help=SAMPLING_HELP[spec.name],
                section=SAMPLING,
                metavar="X" if kind is float else "N",
            )
            flags.append(flag("sample_" + spec.name, kind | None, shown))
    stop = option(
        "--stop", help="stop at this text; may be repeated", section=SAMPLING, metavar="TEXT"
    )
    flags.append(flag("sample_stop", list[str] | None, stop))
    ignore = option(
        "--ignore-eos", help="go on after the model's end of sequence", section=SAMPLING
    )
    flags.append(flag("sample_ignore_eos", bool, ignore, default=False))
    return expand(function, "sampling", flags, _sampling_of)


def _sampling_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that were given, by name."""
    given = {name.removeprefix("sample_"): value for name, value in values.items() if value}
    zeros = {name.removeprefix("sample_"): v for name, v in values.items() if v == 0}
    given |= {name: value for name, value in zeros.items() if name != "ignore_eos"}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return given


def _setting_flag(setting: Setting) -> inspect.Parameter:
    name = "set_" + setting.name
    section = setting.section.capitalize() + " settings"
    if setting.kind is bool:
        spelt = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
        return flag(name, bool | None, option(spelt, help=_help(setting), section=section))
    shown = option(
        setting.flag,
        help=_help(setting),
        section=section,
        metavar=_metavar(setting),
        autocompletion=_completer(setting),
    )
    return flag(name, str | None, shown)


def _completer(setting: Setting) -> Callable[[str], list[str]] | None:
    if not setting.choices:
        return None
    return lambda incomplete: [c for c in setting.choices if c.startswith(incomplete)]


def _help(setting: Setting) -> str:
    parts = [setting.help]
    if setting.choices:
        parts.append("one of " + ", ".join(setting.choices))
    if not setting.optional:
        default = str(setting.default).lower() if setting.kind is bool else setting.default
        parts.append(f"default: {default}")
    return "; ".join(parts) + f" (env {setting.variable})"


def _metavar(setting: Setting) -> str:
    if setting.name.endswith("_bytes"):
        return "BYTES"
    return {int: "N", float: "X", str: "TEXT"}[setting.kind]
