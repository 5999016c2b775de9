"""Builds a Config from flags, environment, a YAML file and keywords, in that order of precedence.

The fields of Config are the only list of settings: this module derives names, types and messages
from it. A field's name is unique over all sections, so `page_size`, `--page-size`,
`JAXSERVE_PAGE_SIZE` and `cache: {page_size: 16}` are the same setting. Unknown names are refused.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxserve.config import Config
from jaxserve.errors import ConfigError

ENV_PREFIX = "JAXSERVE_"
CONFIG_FILE_VARIABLE = "JAXSERVE_CONFIG"
OTHER_VARIABLES = (CONFIG_FILE_VARIABLE, "JAXSERVE_KV_KEY")
"""Variables of ours that are not settings: where to look for them, and the KV master key."""

SERVICE_LINKS = re.compile(
    r"(JAXSERVE_(.+_)?PORT=\w+://.*)"
    r"|(JAXSERVE_(.+_)?SERVICE_(HOST|PORT(_\w+)?)=.*)"
    r"|(JAXSERVE_(.+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)"
)
"""What Kubernetes and Docker set for every service called jaxserve or jaxserve-..."""

BYTE_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    BYTE_UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}iB": 1024**_power}
    BYTE_UNITS[_letter] = 1024**_power


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of Config.

    Attributes:
        kind: bool, int, float or str; `optional` fields may be None, which means "auto".
    """

    section: str
    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def is_secret(self) -> bool:
        """Whether the value itself gives access, and is never shown."""
        return self.name.endswith(("_key", "_keys"))


@dataclass(frozen=True, slots=True)
class Settings:
    """A config, and for each setting that somebody gave, where it came from.

    An origin is a flag, the name of an environment variable, or `file:line`.
    """

    config: Config
    origins: Mapping[str, str]


def all_settings() -> dict[str, Setting]:
    """Every setting by name, in the order of Config."""
    found: dict[str, Setting] = {}
    for section in fields(Config):
        for spec in fields(section.type):  # pyright: ignore[reportArgumentType]
            kind, optional = _kind_of(spec.type)
            assert spec.name not in found, f"two sections have a setting {spec.name}"
            found[spec.name] = Setting(
                section.name,
                spec.name,
                kind,
                optional,
                spec.default,
                spec.metadata["help"],
                spec.metadata["choices"],
            )
    return found


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    config_file: str | Path | None = None,
) -> Settings:
    """Combine all sources: flags win over environment, environment over file, file over defaults.

    Args:
        flags: by setting name, None where the flag was not given.
        environ: usually os.environ; its JAXSERVE_* variables count.
        config_file: YAML, with sections or flat keys; default: what JAXSERVE_CONFIG names.

    Raises:
        ConfigError: an unknown name, a value of the wrong type, or settings that exclude each
            other.
    """
    known = all_settings()
    environ = environ or {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def take(name: str, value: Any, origin: str, shown: str | None = None) -> None:
        values[name] = convert(known[name], value, shown or origin)
        origins[name] = origin

    path = config_file or environ.get(CONFIG_FILE_VARIABLE)
    if path:
        for entry in _read_yaml(Path(path), known):
            take(entry.name, entry.value, entry.place, f"{entry.place}: {entry.key}")
    by_variable = {setting.variable: name for name, setting in known.items()}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES:
            continue
        if SERVICE_LINKS.fullmatch(f"{variable}={environ[variable]}"):
            continue
        if variable not in by_variable:
            raise ConfigError(unknown_name("environment variable", variable, by_variable))
        take(by_variable[variable], environ[variable], variable)
    for name, value in flags.items():
        if value is not None:
            take(name, value, known[name].flag)
    return Settings(_build(known, values), origins)


def config_from_keywords(keywords: Mapping[str, Any]) -> Config:
    """A Config from keyword arguments, for use in process; the environment does not count.

    Raises:
        ConfigError: an unknown keyword, with the nearest known one.
    """
    known = all_settings()
    for name in keywords:
        if name not in known:
            raise ConfigError(unknown_name("setting", name, known))
    return _build(
        known, {name: convert(known[name], value, name) for name, value in keywords.items()}
    )


def convert(setting: Setting, value: Any, origin: str) -> Any:
    """A value of the setting's own type, from text or from a value of that type."""
    if value is None or (setting.optional and value in ("auto", "none")):
        if setting.optional:
            return None
    elif setting.kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _BOOL_WORDS:
            return _BOOL_WORDS[value.lower()]
    elif setting.kind is int:
        number = _as_int(value, is_bytes=setting.name.endswith("_bytes"))
        if number is not None:
            return number
    elif setting.kind is float and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            pass
    elif setting.kind is str and isinstance(value, (str, Path)):
        return str(value)
    raise ConfigError(f"{origin} is {value!r:.100}; expected {_expected(setting)}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest one, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name!r:.100}; {hint}Valid: {', '.join(names)}"


_BOOL_WORDS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def _expected(setting: Setting) -> str:
    if setting.choices:
        return "one of " + ", ".join(setting.choices)
    if setting.name.endswith("_bytes"):
        text = "a number of bytes such as 4GiB"
    else:
        text = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[
            setting.kind
        ]
    return text + (" or auto" if setting.optional else "")


def _as_int(value: Any, *, is_bytes: bool) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        return None
    text = value.strip().replace("_", "")
    digits = text.rstrip("KMGTiB ") if is_bytes else text
    unit = text[len(digits) :].strip() if is_bytes else ""
    try:
        return int(digits) * BYTE_UNITS[unit]
    except (KeyError, ValueError):
        return None


def _build(known: Mapping[str, Setting], values: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(known[name].section, {})[name] = value
    types_of = {section.name: section.type for section in fields(Config)}
    return Config(**{name: types_of[name](**given) for name, given in sections.items()})  # pyright: ignore[reportCallIssue]


def _kind_of(annotation: Any) -> "_Kind":
    """The type of a field's annotation, and whether None is allowed beside it."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        assert len(kinds) == 1, f"a setting has one type, not {annotation}"
        return _Kind(kinds[0], True)
    return _Kind(annotation, False)


class _Kind(typing.NamedTuple):
    kind: type
    optional: bool


class _Entry(typing.NamedTuple):
    name: str
    value: Any
    key: str  # as the file spells it
    place: str  # file:line


def _read_yaml(path: Path, known: Mapping[str, Setting]) -> list[_Entry]:
    """The settings of a file; keys may be flat or in sections, with '-' or '_'."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not YAML: {message[:300]}") from error
    if content is None:
        return []
    if not isinstance(content, Mapping):
        raise ConfigError(f"config file {path} holds no keys; expected lines such as 'port: 8000'")
    sections = {section.name for section in fields(Config)}
    lines = _lines_of(root, sections)
    found: dict[str, _Entry] = {}

    def take(key: Any, value: Any, valid: Mapping[str, Setting], shown: str) -> None:
        name, place = str(key).replace("-", "_"), f"{path}:{lines.get(shown, 1)}"
        if name not in valid:
            raise ConfigError(f"{place}: " + unknown_name("key", shown, valid))
        if name in found:
            raise ConfigError(f"{place}: {shown} is given twice, first in {found[name].place}")
        found[name] = _Entry(name, value, shown, place)

    for key, value in content.items():
        if key in sections and isinstance(value, Mapping):
            of_section = {name: s for name, s in known.items() if s.section == key}
            for inner, inner_value in value.items():
                take(inner, inner_value, of_section, f"{key}.{inner}")
        elif key in sections and value is None:
            continue  # a section whose keys are all commented out
        else:
            take(key, value, known, str(key))
    return list(found.values())


def _lines_of(root: Any, sections: "set[str]") -> dict[str, int]:
    """The line of each key, from 1; keys below a section as `section.key`."""
    lines: dict[str, int] = {}
    for key, value in root.value:
        lines[str(key.value)] = key.start_mark.line + 1
        if key.value in sections and isinstance(value.value, list):
            for pair in value.value:
                if isinstance(pair, tuple):
                    lines[f"{key.value}.{pair[0].value}"] = pair[0].start_mark.line + 1
    return lines
