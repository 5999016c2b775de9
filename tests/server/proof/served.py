"""A `jaxserve serve` of the embedded model in processes of its own, and what they use."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.demo import stop, wait_until_healthy

ROOT = Path(__file__).parents[3]
API_KEY, ADMIN_KEY = "proof", "proof-admin"
AUTHORIZATION = f"Authorization: Bearer {API_KEY}\r\n".encode()
FLAGS = (
    *("--max-model-len", "512", "--max-num-seqs", "96", "--max-num-batched-tokens", "256"),
    *("--kv-host-bytes", "16MiB", "--max-stored-responses", "20"),
)
"""The same for every proof, so that only the first one compiles; tiers for the admin routes."""

SETTLE_S = 100.0
"""Freed memory goes back to the system once a minute."""

MAX_GROWTH_MB = 48
"""Of resident memory, of both processes, over a proof: more is taken for a leak."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a process holds."""

    num_fds: int
    rss_mb: int

    @classmethod
    def of(cls, pid: int) -> "Use":
        status = Path(f"/proc/{pid}/status").read_text()
        (rss,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
        return cls(len(os.listdir(f"/proc/{pid}/fd")), int(rss) >> 10)


@dataclass(frozen=True, slots=True)
class Uses:
    """What the processes of a server hold."""

    server: Use
    engine: Use

    @property
    def rss_mb(self) -> int:
        return self.server.rss_mb + self.engine.rss_mb

    def is_back_at(self, before: "Uses") -> bool:
        """No file is open that was not, and memory has not grown by more than MAX_GROWTH_MB."""
        pairs = ((self.server, before.server), (self.engine, before.engine))
        has_files_back = all(now.num_fds <= then.num_fds for now, then in pairs)
        return has_files_back and self.rss_mb <= before.rss_mb + MAX_GROWTH_MB

    def told(self) -> dict[str, Any]:
        return {
            "fds": {"server": self.server.num_fds, "engine": self.engine.num_fds},
            "rss_mb": {"server": self.server.rss_mb, "engine": self.engine.rss_mb},
        }


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs."""

    port: int
    pid: int
    engine_pid: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def uses(self) -> Uses:
        return Uses(Use.of(self.pid), Use.of(self.engine_pid))

    def pages_in_use(self) -> int:
        """Pages that sequences hold; nobody's are free or cached, which is as good as free."""
        return sum(group["in_use"] for group in self.get("/v1/kv/stat")["pages"])

    def is_idle(self) -> bool:
        """No request is known, to the server or the engine, and no page is held."""
        shown = self.get("/v1/kv/stat")
        requests = shown["requests"]
        is_quiet = not (requests["live"] or requests["running"] or requests["waiting"])
        return is_quiet and not any(group["in_use"] for group in shown["pages"])

    def settled(self, before: Uses) -> Uses:
        """What is held once it is back where it was, or after SETTLE_S."""
        wait_until(lambda: self.is_idle() and self.uses().is_back_at(before), SETTLE_S)
        return self.uses()

    def num_errors_logged(self) -> int:
        lines = self.log.read_text(errors="replace").splitlines()
        return sum("Traceback" in line for line in lines)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float | None:
    """Seconds until the condition came true; None: it did not in time."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > timeout_s:
            return None
        time.sleep(0.02)
    return time.monotonic() - start_s


@contextmanager
def served() -> Iterator[Served]:
    """A server with keys on a free port, ready when the block begins and stopped when it ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.cli", "serve", "--port", str(port)]
    command += ["--api-key", API_KEY, "--admin-key", ADMIN_KEY, *FLAGS]
    with tempfile.NamedTemporaryFile("wb", suffix=".log") as log:
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process:
            try:
                wait_until_healthy(f"http://127.0.0.1:{port}", lambda: process.poll() is None)
                yield Served(port, process.pid, _engine_of(process.pid), Path(log.name))
            finally:
                stop(process)
                _show_faults(Path(log.name))


def _engine_of(pid: int) -> int:
    """The process of a server's engine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            is_engine = b"engine_process" in (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if int(parent) == pid and is_engine:
            return int(folder.name)
    raise RuntimeError(f"the server (process {pid}) has no engine process")


def _show_faults(log: Path) -> None:
    """What the server logged beside its usual lines, if it says that something failed."""
    text = log.read_text(errors="replace")
    if "Traceback" in text:
        print(text[-6000:], file=sys.stderr)
