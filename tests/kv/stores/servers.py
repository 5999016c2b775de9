"""Real servers for store tests: each a process on a free port of the loopback interface.

Where a server is not installed the test is skipped, or fails if REQUIRE_KV_SERVICES=1.
"""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

_START_S = 20.0


class Server:
    """A process that listens on a port, which it keeps over restarts."""

    def __init__(self, command: list[str], port: int, folder: Path):
        self.port = port
        self._command = command
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        log = self._folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=output, stderr=output
            )
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"{self._command[0]} did not start: {log.read_text()[-2000:]}")

    def kill(self) -> None:
        """As kill -9 does; also if it is stopped."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It keeps its connections but answers nothing (SIGSTOP)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on as if nothing had been."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def start_valkey(folder: Path, *options: str, has_tls: bool = False) -> Server:
    """A Valkey or Redis server that keeps nothing on disk; with TLS it has no other port."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        _missing("no valkey-server or redis-server is installed (apt-get install redis-server)")
    port = _free_port()
    ports = ["--port", "0", "--tls-port", str(port)] if has_tls else ["--port", str(port)]
    command = [binary, *ports, "--bind", "127.0.0.1", "--save", "", *options]
    return Server(command, port, folder)


def start_s3(folder: Path, bucket: str) -> Server:
    """moto's S3 server, with one bucket."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Server(command, port, folder)
    make_bucket(server, bucket)
    return server


def start_gcs(folder: Path) -> Server:
    """A server that answers as Google Cloud Storage does; its buckets need not be made."""
    port = _free_port()
    command = [sys.executable, str(Path(__file__).with_name("gcs_server.py")), str(port)]
    return Server(command, port, folder)


def make_bucket(server: Server, bucket: str) -> None:
    """Add a bucket; moto keeps nothing over a restart."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()


def _missing(what: str) -> NoReturn:
    if os.environ.get("REQUIRE_KV_SERVICES") == "1":
        pytest.fail(f"{what}, and REQUIRE_KV_SERVICES=1")
    pytest.skip(what)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
