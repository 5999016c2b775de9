"""Result lines of the GPU suite, written as they come, and the machine's limits read from them.

Each part of the suite is a process of its own and appends to one file, so what a part has written
stays when it crashes. Knows nothing of what is measured.
"""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "transformers", "flashinfer-python")
COMMIT_VARIABLE = "JAXSERVE_COMMIT"
"""Names the commit where the tree was copied without its history."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Rates that this machine reached; bytes read and written both count. 0: not measured."""

    read_bytes_per_s: float = 0.0
    copy_bytes_per_s: float = 0.0
    bf16_flops: float = 0.0
    to_host_bytes_per_s: float = 0.0
    to_device_bytes_per_s: float = 0.0

    def seconds(self, num_bytes: float, flops: float = 0.0) -> float:
        """The least time for work that must move and compute so much; 0 if nothing is known."""
        if not self.read_bytes_per_s:
            return 0.0
        by_compute_s = flops / self.bf16_flops if self.bf16_flops else 0.0
        return max(num_bytes / self.read_bytes_per_s, by_compute_s)


@dataclass(frozen=True)
class Context:
    """What a part is told.

    Attributes:
        is_tiny: small shapes on any machine, kernels interpreted: shows that the part works.
        out: where result lines are appended.
        folder: for other files.
        deadline_s: on time.monotonic; a part that can leave things out shall end before it.
    """

    part: str
    is_tiny: bool
    out: Path
    folder: Path
    deadline_s: float
    common: dict[str, Any]
    limits: MachineLimits = MachineLimits()

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def line(self, **content: Any) -> None:
        """Write a result."""
        append(self.out, {"bench": "gpu", "part": self.part, **content, **self.common})

    def attempt(self, about: dict[str, Any]) -> "Attempt":
        """A block whose failure is a line of its own, and does not end the part."""
        return Attempt(self, about)


class Attempt:
    """See `Context.attempt`; `has_failed` is there afterwards."""

    def __init__(self, context: Context, about: dict[str, Any]):
        self._context = context
        self._about = about
        self.has_failed = False

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.has_failed = True
        text = f"{type(error).__name__}: {error}"
        self._context.line(**self._about, failed=text[:1500])
        return True


def append(path: Path, line: dict[str, Any]) -> None:
    """One JSON line, on the disk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line)
    with path.open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(text[:400], flush=True)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a result file."""
    if not path.exists():
        return
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue  # cut off by a kill


def read_limits(path: Path) -> MachineLimits:
    """What the limits part has written, if it ran."""
    found: dict[str, float] = {}
    for line in read_lines(path):
        if line.get("part") == "limits" and "rate" in line:
            found[line["limit"]] = line["rate"]
    return MachineLimits(**{k: v for k, v in found.items() if k in MachineLimits.__slots__})


def about_machine(device: str) -> dict[str, Any]:
    """What every line says: commit, date, device, versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": os.environ.get(COMMIT_VARIABLE) or _commit(),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": versions,
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def device_name() -> str:
    """The GPU's name, without starting anything on it; the processor's where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        from bench.peers.machine import cpu_name

        return cpu_name()
