"""Options of a store's URL, each with a clear refusal: `file:///path?max_bytes=100GiB&ttl=7d`.

Knows no store: each names its own options and what they mean.
"""

import difflib
import re
from collections.abc import Collection
from urllib.parse import parse_qsl, urlsplit

from jaxserve.errors import ConfigError

_BYTE_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: factor
    for power, letter in enumerate("KMGTP", 1)
    for prefix, suffix, factor in (
        (letter, "iB", 1024**power),
        (letter, "B", 1000**power),
        (letter, "", 1024**power),
    )
}
_SECOND_UNITS = {"": 1, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_options(url: str, valid: Collection[str]) -> dict[str, str]:
    """The options after the question mark.

    Raises:
        ConfigError: an unknown option (naming the valid ones), one given twice, or bad syntax.
    """
    query = urlsplit(url).query
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigError(
            f"The options of the KV store URL {url} cannot be read; expected "
            f"?name=value&name=value with names from {', '.join(sorted(valid))}."
        ) from None
    options: dict[str, str] = {}
    for name, value in pairs:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"The KV store URL {url} has an unknown option {name!r:.60}; expected one of "
                f"{', '.join(sorted(valid))}.{hint}"
            )
        if name in options:
            raise ConfigError(f"The KV store URL {url} gives the option {name} twice.")
        options[name] = value
    return options


def as_bytes(name: str, text: str) -> int:
    """A positive number of bytes: `100GiB`, `1.5TB`, `4096`."""
    number = _quantity(text, _BYTE_UNITS)
    if number is None or not 1 <= number < 2**63:
        raise ConfigError(f"{name} is {text!r:.60}; expected a number of bytes such as 100GiB.")
    return int(number)


def as_seconds(name: str, text: str) -> float:
    """A duration: `7d`, `12h`, `30m`, `90s`, `2w`; 0 where the option allows it."""
    number = _quantity(text, _SECOND_UNITS)
    if number is None or number > 1e11:
        raise ConfigError(f"{name} is {text!r:.60}; expected a duration such as 7d, 12h or 90s.")
    return number


def as_count(name: str, text: str, low: int, high: int) -> int:
    """A whole number between two bounds, both included."""
    if not text.isascii() or not text.isdigit() or not low <= int(text[:12]) <= high:
        raise ConfigError(f"{name} is {text!r:.60}; expected a number from {low} to {high}.")
    return int(text)


def as_choice(name: str, text: str, choices: Collection[str]) -> str:
    """One of several words."""
    if text not in choices:
        raise ConfigError(f"{name} is {text!r:.60}; expected one of {', '.join(choices)}.")
    return text


def _quantity(text: str, units: dict[str, int]) -> float | None:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]] if "." in match[1] else int(match[1]) * units[match[2]]
