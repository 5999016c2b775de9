"""`jaxserve config`: what is in force and why; whether a file is right; the schema of files."""

import json
import re
from typing import Annotated, Any

import typer

from jaxserve.cli.app import Entry, Group, option
from jaxserve.cli.flags import with_model_argument, with_settings
from jaxserve.errors import ConfigError
from jaxserve.settings import Setting, Settings, all_settings, load_settings

HIDDEN = "(hidden)"
DEFAULT = "default"
PASSWORD = re.compile(r"//([^/@:\s]*):[^/@\s]+@")
_HERE = "jaxserve.cli.configure:"

group = Group(
    "config",
    "Show and check settings.",
    {
        "show": Entry(_HERE + "show", "what is in force, and where each value came from"),
        "check": Entry(_HERE + "check", "read a YAML file as `serve --config` would"),
        "schema": Entry(_HERE + "schema", "JSON Schema of such a file, for editors"),
    },
)


@with_model_argument
@with_settings()
def show(
    *,
    changed: Annotated[bool, option("--changed", help="only what somebody gave")] = False,
    as_json: Annotated[bool, option("--json", help="print JSON")] = False,
    as_yaml: Annotated[
        bool, option("--yaml", help="print a file for --config; secrets are left out")
    ] = False,
    settings: Settings,
) -> int:
    """Show the settings in force, and where each came from.

    Takes the flags of `serve` and reads the same variables and files, but starts nothing. Where a
    value is empty, the engine chooses when it starts.
    """
    if as_json and as_yaml:
        raise ConfigError("give either --json or --yaml")
    wanted = {
        name: setting
        for name, setting in all_settings().items()
        if not changed or name in settings.origins
    }
    if as_yaml:
        _print_yaml(wanted, settings)
    elif as_json:
        rows = {
            name: {
                "value": shown_value(settings, setting),
                "origin": settings.origins.get(name, DEFAULT),
                "section": setting.section,
            }
            for name, setting in wanted.items()
        }
        print(json.dumps(rows, indent=1))
    else:
        _print_table(wanted, settings)
    return 0


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML file with settings")],
) -> int:
    """Read a YAML file as `serve --config` would, without flags and environment."""
    settings = load_settings({}, {}, file)
    print(f"{file}: {len(settings.origins)} settings, all right")
    return 0


def schema() -> int:
    """Print the JSON Schema of a config file, for editors that complete and check YAML."""
    print(json.dumps(file_schema(), indent=1))
    return 0


def shown_value(settings: Settings, setting: Setting) -> Any:
    """The value in force; of a secret, or a password in a URL, only that it is there."""
    value = getattr(getattr(settings.config, setting.section), setting.name)
    if setting.is_secret and value is not None:
        return HIDDEN
    return PASSWORD.sub(rf"//\1:{HIDDEN}@", value) if isinstance(value, str) else value


def file_schema() -> dict[str, Any]:
    """Keys may be flat or below their section, so both are in it."""
    known = all_settings()
    flat = {name: _property(setting) for name, setting in known.items()}
    sections = {
        section: {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {n: flat[n] for n, s in known.items() if s.section == section},
        }
        for section in dict.fromkeys(setting.section for setting in known.values())
    }
    flat_only = {name: value for name, value in flat.items() if name not in sections}
    model = {"anyOf": [flat["model"], sections["model"]]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "jaxserve settings",
        "type": "object",
        "additionalProperties": False,
        "properties": {**sections, **flat_only, "model": model},
    }


def _property(setting: Setting) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    types = [kinds[setting.kind]]
    if setting.name.endswith("_bytes"):
        types.append("string")
    if setting.optional:
        types.append("null")
    found: dict[str, Any] = {"description": setting.help, "type": types}
    if len(types) == 1:
        found["type"] = types[0]
    if setting.choices:
        found["enum"] = list(setting.choices)
    if setting.default is not None:
        found["default"] = setting.default
    return found


def _print_table(wanted: dict[str, Setting], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    section = None
    for name, setting in wanted.items():
        if setting.section != section:
            section = setting.section
            table.add_row(Text(section, style="bold"))
        value = shown_value(settings, setting)
        text = (
            "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        )
        origin = settings.origins.get(name, DEFAULT)
        style = "dim" if origin == DEFAULT else "bold"
        table.add_row("  " + name, Text(text, style), Text(_origin(origin), style))
    Console(soft_wrap=False).print(table)


def _origin(origin: str) -> str:
    return f"env {origin}" if origin.startswith("JAXSERVE_") else origin


def _print_yaml(wanted: dict[str, Setting], settings: Settings) -> None:
    import yaml

    sections: dict[str, dict[str, Any]] = {}
    for name, setting in wanted.items():
        value = shown_value(settings, setting)
        if value is not None and not setting.is_secret:
            sections.setdefault(setting.section, {})[name] = value
    print(yaml.safe_dump(sections, sort_keys=False), end="")
