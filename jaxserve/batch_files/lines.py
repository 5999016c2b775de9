"""The lines of a batch file: requests, and what is wrong with those that are none.

A line is a JSON object with custom_id, method, url and body. A line that cannot be sent still gets
an answer, an error that names the line, so that output and input can be told apart by nobody losing
count. Knows nothing of HTTP.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxserve.errors import ConfigError
from jaxserve.settings import unknown_name

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_ID_CHARS = 512
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of the input.

    Attributes:
        number: from 1.
        problem: why it cannot be sent; the other fields are then as far as they could be read.
    """

    number: int
    custom_id: str | None
    url: str = ""
    body: "dict[str, Any] | None" = None
    problem: str = ""

    @property
    def key(self) -> str:
        """What tells it from all others: its id, or its number if it has none of its own."""
        if self.problem or self.custom_id is None:
            return f"line {self.number}"
        return f"id {self.custom_id}"


def read_lines(path: str | Path) -> Iterator[BatchLine]:
    """Every line that is not empty, in order; one at a time, so files may be large.

    Raises:
        ConfigError: the file cannot be read.
    """
    seen: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for number, text in enumerate(_raw_lines(file), start=1):
                if not text.strip():
                    continue
                line = _parse(number, text)
                if line.custom_id is not None and not line.problem:
                    first = seen.setdefault(line.custom_id, number)
                    if first != number:
                        problem = f"custom_id {line.custom_id!r:.80} is that of line {first}, too"
                        line = BatchLine(number, line.custom_id, problem=problem)
                yield line
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    while text := file.readline(MAX_LINE_BYTES + 1):
        yield text
        while len(text) > MAX_LINE_BYTES and not text.endswith(b"\n"):
            text = file.readline(MAX_LINE_BYTES + 1)  # the rest of a line that is refused


def _parse(number: int, text: bytes) -> BatchLine:
    def bad(problem: str, custom_id: str | None = None) -> BatchLine:
        return BatchLine(number, custom_id, problem=problem)

    if len(text) > MAX_LINE_BYTES:
        return bad(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return bad(f"not JSON: {str(error)[:120]}")
    if not isinstance(record, dict):
        return bad("not a JSON object with custom_id, method, url and body")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        return bad(f"custom_id is missing, or not a text of 1 to {MAX_ID_CHARS} characters")
    if record.get("method", "POST") != "POST":
        return bad(f"method is {record['method']!r:.40}; expected 'POST'", custom_id)
    url, body = record.get("url"), record.get("body")
    if url not in ENDPOINTS:
        return bad(unknown_name("url", str(url), ENDPOINTS), custom_id)
    if not isinstance(body, dict):
        return bad("body is missing, or not a JSON object", custom_id)
    if body.get("stream"):
        return bad("body.stream is true; an answer in a file cannot be streamed", custom_id)
    return BatchLine(number, custom_id, url, body)
