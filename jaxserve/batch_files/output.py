"""The output of a batch: a line for every line of the input, each safe on disk at once.

Lines are appended and synced; a line that a kill cut short is removed when the file is opened
again, and what is complete is not done again. The file is locked while it is open, so that two runs
cannot both append to it.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.batch_files.lines import BatchLine
from jaxserve.errors import ConfigError, JaxserveError

COPY_BYTES = 1 << 20


class BatchOutput:
    """An output file, open for appending.

    Args:
        retry_failed: forget lines whose requests failed, so that they are done again.

    Attributes:
        done: keys of the input lines that have an answer here.
        num_failed: how many of them are errors.

    Raises:
        ConfigError: it cannot be opened, another run uses it, or it is something else.
    """

    def __init__(self, path: str | Path, *, retry_failed: bool = False):
        self.path = Path(path)
        self.done: set[str] = set()
        self.num_failed = 0
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(f"{path} is in use by another run") from error
        try:
            self._recover(retry_failed)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write lines and wait until the disk has them.

        Raises:
            JaxserveError: the disk is full or broken; nothing is left half written.
        """
        data = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)
        size = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, data)
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise JaxserveError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)

    def _recover(self, retry_failed: bool) -> None:
        """Read what is there; drop an incomplete last line, and failed ones if asked to."""
        end, kept, failed = 0, [], 0
        number = 0
        with open(self.path, "rb") as file:
            for text in file:
                number += 1
                if not text.endswith(b"\n"):
                    break
                record = _record(text)
                if record is None:
                    raise ConfigError(
                        f"{self.path}:{number} is not the output of a batch; name another file"
                    )
                end += len(text)
                if is_failed(record):
                    failed += 1
                    if retry_failed:
                        continue
                kept.append(text) if retry_failed else None
                self.done.add(key_of(record))
        if retry_failed and failed:
            self._replace(kept)
        else:
            self.num_failed = failed
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, 0, os.SEEK_END)

    def _replace(self, lines: Sequence[bytes]) -> None:
        """Exchange the file for one with fewer lines; whoever looks sees the old or the new one."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        for line in lines:
            _write_all(fd, line)
        os.fsync(fd)
        os.rename(partial, self.path)
        os.close(self._fd)
        self._fd = fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def answered(line: BatchLine, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """The output line of a request that the server answered, with an error or without."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {**_head(line), "response": response, "error": None}


def refused(line: BatchLine) -> dict[str, Any]:
    """The output line of an input line that could not be sent."""
    error = {"code": "invalid_line", "message": line.problem, "line": line.number}
    return {**_head(line), "response": None, "error": error}


def unanswered(line: BatchLine, code: str, message: str) -> dict[str, Any]:
    """The output line of a request that no answer came to."""
    error = {"code": code, "message": message, "line": line.number}
    return {**_head(line), "response": None, "error": error}


def is_failed(record: Mapping[str, Any]) -> bool:
    response = record.get("response")
    return response is None or not 200 <= response.get("status_code", 0) < 300


def key_of(record: Mapping[str, Any]) -> str:
    """The key of the input line that an output line belongs to."""
    error = record.get("error") or {}
    if error.get("code") == "invalid_line":
        return f"line {error['line']}"
    return f"id {record['custom_id']}"


def _head(line: BatchLine) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}


def _record(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    expected: tuple[Callable[[Any], bool], ...] = (
        lambda r: isinstance(r, dict) and {"custom_id", "response", "error"} <= set(r),
        lambda r: isinstance(r["response"], (dict, type(None))),
        lambda r: isinstance(r["error"], (dict, type(None))),
    )
    return record if all(holds(record) for holds in expected) else None
