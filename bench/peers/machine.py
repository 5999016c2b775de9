"""This machine: what it can do at most, who else is using it, and what the figures depend on."""

import datetime
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.benchmarks.machine import num_cpus, product_flops, read_bytes_per_s

__all__ = [
    "CpuClock",
    "Limits",
    "cpu_name",
    "environment",
    "num_cpus",
    "peak_rss_bytes",
    "product_flops",
    "read_bytes_per_s",
    "read_cpu_clock",
    "sessions_of",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """The best rates measured here, whichever library reached them."""

    read_bytes_per_s: float
    flops: dict[str, float]  # by dtype of the matrices

    def line(self) -> dict[str, Any]:
        return {
            "read_gb_s": round(self.read_bytes_per_s / 1e9, 2),
            "gflop_s": {dtype: round(rate / 1e9, 1) for dtype, rate in self.flops.items()},
        }


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds so far: of the whole machine, and of the processes of some sessions."""

    machine_s: float
    ours_s: float
    at_s: float

    def others_share(self, later: "CpuClock") -> float | None:
        """What others used between two readings, as a fraction of all CPUs; None if unknown."""
        elapsed_s = later.at_s - self.at_s
        if self.machine_s < 0 or elapsed_s <= 0:
            return None
        others_s = (later.machine_s - self.machine_s) - (later.ours_s - self.ours_s)
        return max(0.0, others_s) / (elapsed_s * (os.cpu_count() or 1))


def read_cpu_clock(sessions: "set[int]") -> CpuClock:
    """Now; time that the host gave to other guests (steal) counts as used by others."""
    now_s = time.perf_counter()
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return CpuClock(-1.0, 0.0, now_s)
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    processes = _processes()
    ours_in = _with_descendants(sessions, processes)
    ours = sum(p.ticks for p in processes if p.session in ours_in or p.pid == os.getpid())
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq + steal
    return CpuClock(busy * tick_s, ours * tick_s, now_s)


@dataclass(frozen=True, slots=True)
class _ProcessStat:
    pid: int
    parent: int
    session: int
    ticks: int  # with those of children it waited for


def _processes() -> list[_ProcessStat]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold anything: state, parent, group, session, ...
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        ticks = sum(map(int, fields[11:15]))
        found.append(_ProcessStat(int(entry.name), int(fields[1]), int(fields[3]), ticks))
    return found


def sessions_of(session: int) -> "set[int]":
    """A session, and those that its processes have begun (a server's engine, for one)."""
    return _with_descendants({session}, _processes())


def _with_descendants(sessions: "set[int]", processes: list[_ProcessStat]) -> "set[int]":
    found = set(sessions)
    while True:
        members = {p.pid for p in processes if p.session in found}
        more = {p.session for p in processes if p.parent in members} - found
        if not more:
            return found
        found |= more


def peak_rss_bytes(session: int) -> int:
    """The most resident memory of each process of a session and those it began; 0 if unknown."""
    total = 0
    processes = _processes()
    ours = _with_descendants({session}, processes)
    for process in processes:
        if process.session not in ours:
            continue
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        total += sum(int(kib) * 1024 for kib in peak)
    return total


def environment(repository: Path) -> dict[str, Any]:
    """What the figures depend on, besides the engines' versions."""
    git = ["git", "-C", str(repository)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return {
        "commit": (commit or "unknown") + ("+changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
        "device": cpu_name(),
        "cpus": num_cpus(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
