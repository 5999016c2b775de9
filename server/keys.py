"""The keys and origins of a server, from its settings and the file that they name."""

from pathlib import Path

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.server.guard import Access

MAX_KEYS = 1000


def access_of(config: ServerConfig) -> Access:
    """Who may come in.

    Raises:
        ConfigError: the key file cannot be read, or has no key; a public address without a key.
    """
    keys = _words(config.api_key or "")
    if config.api_key_file is not None:
        keys += _keys_in(Path(config.api_key_file))
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"there are {len(keys)} API keys; expected at most {MAX_KEYS}")
    if config.admin_key in keys:
        raise ConfigError("the admin key is one of the API keys; make it another one")
    return Access(keys, config.admin_key, _words(config.allowed_origins or ""))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.split(",") if (word := part.strip()))


def _keys_in(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and those that begin with # do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file {path} has no key; expected one a line")
    return keys
