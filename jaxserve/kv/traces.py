"""Traces of requests as lists of block names, as published for studies of prefix caches.

One JSON object a line, of which `hash_ids` (names of the prompt's blocks, head first) and
`timestamp` are read. Mooncake's traces count time in milliseconds, Qwen-Bailian's in seconds with
a fraction; blocks are 512 and 16 tokens. Files ending in .gz are unpacked as they are read.

Names become hashes of 16 bytes, because policies rely on names being spread evenly.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.kv.blocks import BlockHash

MAX_NAME_CHARS = 256
MAX_TIME = 1e18


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
    num_lines = 0
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for num_lines, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {num_lines}"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        after = f" after line {num_lines}" if num_lines else ""
        raise ConfigError(f"cannot read the trace {path}{after}: {why}") from None
    if not any(names for _, names in rows):
        raise ConfigError(f"{path} has no requests; expected JSON lines with hash_ids")
    rows.sort(key=lambda row: row[0])
    unit = 1.0 if any(time % 1 for time, _ in rows) else 1e-3
    return make_trace((names for _, names in rows), unit * (rows[-1][0] - rows[0][0]))


def _row(line: str, where: str) -> tuple[float, list[int | str]]:
    row = _parsed(line, where)
    names = row.get("hash_ids") if isinstance(row, dict) else None
    if names is None:
        raise ConfigError(f"{where} has no hash_ids; expected a list of block names, head first")
    if not isinstance(names, list):
        raise ConfigError(f"{where} has hash_ids {_shown(names)}; expected a list of block names")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise ConfigError(
                f"{where} has {_shown(name)} in hash_ids; expected names: whole numbers or text"
            )
        if isinstance(name, str) and len(name) > MAX_NAME_CHARS:
            raise ConfigError(
                f"{where} has a name of more than {MAX_NAME_CHARS} characters in hash_ids"
            )
    time = row.get("timestamp", 0)
    is_number = isinstance(time, int | float) and not isinstance(time, bool)
    if not is_number or not abs(time) <= MAX_TIME:
        raise ConfigError(
            f"{where} has the timestamp {_shown(time)}; expected a number, at most "
            f"{MAX_TIME:g} from 0"
        )
    return float(time), names


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        why = f"{error.msg}, at character {error.pos + 1}"
    except ValueError as error:  # such as a number of more digits than Python converts
        why = str(error).partition(";")[0]
    except RecursionError:
        why = "nested too deeply"
    raise ConfigError(f"{where} is not JSON ({why}); expected one request a line")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
