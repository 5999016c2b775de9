"""What can be chosen of a disk store, how a URL says it, and what the store counts."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from jaxserve.errors import ConfigError
from jaxserve.kv.policy.factory import check_policy
from jaxserve.kv.stores.options import (
    as_bytes,
    as_choice,
    as_count,
    as_seconds,
    parse_options,
)

MIN_MAX_BYTES = 1 << 20
FSYNC_CHOICES = ("put", "flush", "never")
IO_CHOICES = ("direct", "buffered")


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """Options of a disk store.

    Attributes:
        max_bytes: of everything in the folder, on disk, at any time; at least 1 MiB.
        policy: what leaves first, as `jaxserve.kv.policy` spells it, e.g. `lru` or
            `s3fifo?small=0.2`.
        ttl_s: no record is kept for longer, whatever it says itself; 0 for no limit.
        fsync: `put`: what `put` reports as stored survives a power cut; `flush`: what was stored
            before `flush` or `close` does; `never`: the system decides. A killed process loses
            nothing in any case, and deletions are always made durable.
        io: `direct` goes past the page cache where the file system can; `buffered` uses it.
        threads: reads and writes in flight for one call.
        name: of the store, for metrics.
    """

    max_bytes: int = 10 << 30
    policy: str = "lru"
    ttl_s: float = 0.0
    fsync: str = "flush"
    io: str = "direct"
    threads: int = 4
    name: str = "disk"

    def __post_init__(self):
        if self.max_bytes < MIN_MAX_BYTES:
            raise ConfigError(
                f"max_bytes of the disk store is {self.max_bytes}; expected at least 1 MiB."
            )
        check_policy(self.policy)
        as_choice("fsync", self.fsync, FSYNC_CHOICES)
        as_choice("io", self.io, IO_CHOICES)


@dataclass(frozen=True, slots=True)
class DiskURL:
    """A folder and the options of the store in it."""

    folder: Path
    options: DiskOptions


@dataclass(frozen=True, slots=True)
class DiskStats:
    """Counters since the store was opened, and its size now.

    Attributes:
        num_evicted: records that left to make room.
        num_corrupt: records, or their entries, that were not as they had been written; they are
            gone.
        num_io_errors: reads and writes that the disk refused.
        physical_bytes: of the folder, an upper bound.
        num_lost_files: files that were of no use when the store was opened.
    """

    num_evicted: int
    num_corrupt: int
    num_io_errors: int
    physical_bytes: int
    num_lost_files: int


def parse_disk_url(url: str) -> DiskURL:
    """Read `file:///folder?max_bytes=100GiB&policy=lru&ttl=7d&fsync=flush&io=direct&threads=4`.

    Raises:
        ConfigError: another scheme, a relative folder, an unknown option or a wrong value.
    """
    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.fragment:
        raise ConfigError(f"The KV store URL is {url!r}; expected file:///folder?option=value.")
    if not folder.is_absolute() or len(folder.parts) < 2:
        raise ConfigError(
            f"The folder of the KV store URL {url} is {str(folder)!r}; expected a full path of a "
            f"folder of its own, as in file:///var/cache/jaxserve."
        )
    valid = [field.name.removesuffix("_s") for field in fields(DiskOptions)]
    options = parse_options(url, [name for name in valid if name != "name"])
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name == "max_bytes":
            values[name] = as_bytes(name, text)
        elif name == "ttl":
            values["ttl_s"] = as_seconds(name, text)
        elif name == "threads":
            values[name] = as_count(name, text, 1, 64)
        else:
            values[name] = text
    return DiskURL(folder, DiskOptions(**values))
