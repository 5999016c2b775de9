"""Traces of requests as lists of block names, as published for studies of prefix caches.

One JSON object a line, of which `hash_ids` (names of the prompt's blocks, head first) and
`timestamp` are read. Mooncake's traces count time in milliseconds, Qwen-Bailian's in seconds with
a fraction; blocks are 512 and 16 tokens. Files ending in .gz are unpacked as they are read.

Names become hashes of 16 bytes, because policies rely on names being spread evenly.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from jaxserve.errors import ConfigError
from jaxserve.kv.blocks import BlockHash

MAX_NAME_CHARS = 256


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        requests: the blocks of each, head first, none twice in one request.
        duration_s: from the first request to the last; 0 if the trace has no times.
    """

    requests: Sequence[Sequence[BlockHash]]
    duration_s: float = 0.0

    @cached_property
    def num_references(self) -> int:
        return sum(map(len, self.requests))

    @cached_property
    def num_unique(self) -> int:
        return len({key for request in self.requests for key in request})

    @cached_property
    def ceiling(self) -> float:
        """Hit ratio of a tier without bounds that starts empty."""
        seen: set[BlockHash] = set()
        num_hits = 0
        for request in self.requests:
            num_hits += count_leading(request, seen)
            seen.update(request)
        return num_hits / max(1, self.num_references)


def count_leading(request: Sequence[BlockHash], resident: "set[BlockHash]") -> int:
    """How many blocks from the first one on are resident without a gap."""
    for index, key in enumerate(request):
        if key not in resident:
            return index
    return len(request)


def make_trace(requests: Iterable[Iterable[int | str]], duration_s: float = 0.0) -> Trace:
    """A trace from any names of blocks; equal names mean equal blocks."""
    keys: dict[int | str, BlockHash] = {}
    hashed = []
    for request in requests:
        names = dict.fromkeys(request)
        for name in names:
            if name not in keys:
                keys[name] = blake2b(str(name).encode(), digest_size=16).digest()
        hashed.append(tuple(keys[name] for name in names))
    return Trace(hashed, duration_s)


def load_trace(path: str | Path) -> Trace:
    """Read a trace file.

    Raises:
        ConfigError: the file cannot be read, or a line is not a request of a trace.
    """
    path = Path(path)
    rows: list[tuple[float, list[int | str]]] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    if not any(names for _, names in rows):
        raise ConfigError(f"{path} has no requests; expected JSON lines with hash_ids")
    rows.sort(key=lambda row: row[0])
    unit = 1.0 if any(time % 1 for time, _ in rows) else 1e-3
    return make_trace((names for _, names in rows), unit * (rows[-1][0] - rows[0][0]))


def _row(line: str, where: str) -> tuple[float, list[int | str]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); expected one request a line") from None
    names = row.get("hash_ids") if isinstance(row, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, int | str) for name in names):
        raise ConfigError(f"{where} has no hash_ids; expected a list of block names, head first")
    if any(isinstance(name, str) and len(name) > MAX_NAME_CHARS for name in names):
        raise ConfigError(f"{where} has a block name of more than {MAX_NAME_CHARS} characters")
    time = row.get("timestamp", 0)
    if isinstance(time, bool) or not isinstance(time, int | float) or time != time:
        raise ConfigError(f"{where} has the timestamp {time!r:.40}; expected a number")
    return float(time), names
