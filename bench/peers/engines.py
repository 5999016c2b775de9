"""Engines in processes of their own: started, asked to run batches, held still while others run.

Each has a session of its own, by which its processes are stopped, continued, counted and ended.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from bench.peers import load, machine
from bench.peers.workload import Batch, Run

END_TIMEOUT_S = 20
LOG_TAIL = 2000


class EngineFailed(Exception):
    """An engine did not start, ended, or refused; says which and why."""


class Engine(Protocol):
    """What the bench needs of an engine."""

    name: str
    about: dict[str, Any]

    @property
    def session(self) -> int: ...
    def run(self, batch: Batch, way: str = "") -> Run: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def peak_rss_bytes(self) -> int: ...
    def close(self) -> None: ...


class Process:
    """A command in a session of its own; what it prints on stderr is kept for the error message."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        has_pipe: bool,
    ):
        self.name = name
        self.log = tempfile.TemporaryFile()
        self.popen = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE if has_pipe else subprocess.DEVNULL,
            stdout=subprocess.PIPE if has_pipe else self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self._sessions = {self.popen.pid}

    def signal(self, number: signal.Signals) -> None:
        """To all processes of the session, and of those it began, if there are any left."""
        self._sessions |= machine.sessions_of(self.popen.pid)  # children may outlive their parent
        for session in self._sessions:
            try:
                os.killpg(session, number)
            except ProcessLookupError:
                pass

    def failed(self, what: str) -> EngineFailed:
        """An error with the end of the log."""
        self.log.seek(0)
        text = self.log.read().decode(errors="replace").strip()
        return EngineFailed(f"{self.name}: {what}\n{text[-LOG_TAIL:]}")

    def close(self) -> None:
        if self.log.closed:
            return
        self.signal(signal.SIGCONT)
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        else:
            self.popen.terminate()  # a server ends its engine itself
        try:
            self.popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        self.signal(signal.SIGKILL)
        self.popen.wait()
        self.log.close()


class WorkerEngine:
    """An engine behind `protocol.serve`, in any interpreter."""

    def __init__(self, name: str, python: str, module: str, folder: Path, **arguments: Any):
        self.name = name
        self._process = Process(name, [python, "-m", module], folder, {}, has_pipe=True)
        try:
            self.call("start", **arguments)
            self.about: dict[str, Any] = self.call("describe")
        except BaseException:
            self.close()
            raise

    @property
    def session(self) -> int:
        return self._process.popen.pid

    def call(self, command: str, **arguments: Any) -> Any:
        """The result of a command; raises EngineFailed if there is none."""
        pipe_in, pipe_out = self._process.popen.stdin, self._process.popen.stdout
        assert pipe_in is not None and pipe_out is not None
        line = b""
        try:
            pipe_in.write(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
            pipe_in.flush()
            line = pipe_out.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise self._process.failed(f"ended during {command!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise EngineFailed(f"{self.name}: {command}: {reply['error']}")
        return reply["result"]

    def run(self, batch: Batch, way: str = "") -> Run:
        result = self.call("run", **asdict(batch), way=way)
        times_s = tuple(map(tuple, result["times_s"]))
        tokens = tuple(map(tuple, result["tokens"]))
        return Run(times_s, tuple(map(len, tokens)), tokens)

    def freeze(self) -> None:
        self._process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.signal(signal.SIGCONT)

    def peak_rss_bytes(self) -> int:
        return self.call("peak_rss_bytes")

    def close(self) -> None:
        self._process.close()


class ServerEngine:
    """An OpenAI-compatible server on a loopback port, asked over HTTP."""

    def __init__(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        folder: Path,
        environment: Mapping[str, str],
        *,
        timeout_s: float,
        versions: dict[str, str],
    ):
        self.name = name
        self.about: dict[str, Any] = {"versions": versions}
        port = load.free_port()
        self._process = Process(name, command(port), folder, environment, has_pipe=False)
        self._client = load.Client(f"http://127.0.0.1:{port}/v1")
        try:
            if not self._client.wait_until_ready(timeout_s, self._is_alive):
                ended = "ended" if not self._is_alive() else f"no answer within {timeout_s:.0f} s"
                raise self._process.failed(ended)
        except BaseException:
            self.close()
            raise

    def _is_alive(self) -> bool:
        return self._process.popen.poll() is None

    @property
    def session(self) -> int:
        return self._process.popen.pid

    def run(self, batch: Batch, way: str = "") -> Run:
        try:
            return self._client.run(batch)
        except load.BadAnswer as error:
            raise self._process.failed(str(error)) from error

    def freeze(self) -> None:
        self._process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.signal(signal.SIGCONT)

    def peak_rss_bytes(self) -> int:
        return machine.peak_rss_bytes(self.session)

    def close(self) -> None:
        self._client.close()
        self._process.close()
