"""A client of OpenAI-compatible servers: streams of /v1/completions, and when their pieces came."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.peers.workload import Batch, Run

REQUEST_TIMEOUT_S = 300.0
POLL_S = 0.5


class BadAnswer(Exception):
    """The server refused, or sent something else than was asked for."""


@dataclass(slots=True)
class _Stream:
    times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


class Client:
    """One server; requests of a batch run at the same time."""

    def __init__(self, base_url: str):
        self._base_url = base_url
        self._loop = asyncio.new_event_loop()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=base_url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False
        )
        self._model = ""

    def wait_until_ready(self, timeout_s: float, is_alive: Callable[[], bool]) -> bool:
        """Poll until the server lists its model."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and is_alive():
            try:
                answer = self._loop.run_until_complete(self._http.get("/models", timeout=5))
                if answer.status_code == 200:
                    self._model = answer.json()["data"][0]["id"]
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(POLL_S)
        return False

    def run(self, batch: Batch) -> Run:
        """All prompts at once.

        Raises:
            BadAnswer: an answer is an error, or has another length than asked for.
        """
        streams = self._loop.run_until_complete(self._run(batch))
        for stream, length in zip(streams, batch.answer_lens, strict=True):
            if stream.num_tokens != length or not stream.times_s:
                raise BadAnswer(f"{stream.num_tokens} tokens where {length} were asked for")
        return Run(
            tuple(tuple(stream.times_s) for stream in streams),
            tuple(stream.num_tokens for stream in streams),
        )

    async def _run(self, batch: Batch) -> list[_Stream]:
        start_s = time.perf_counter()
        jobs = zip(batch.prompts, batch.answer_lens, strict=True)
        return await asyncio.gather(
            *(self._stream(prompt, length, start_s) for prompt, length in jobs)
        )

    async def _stream(self, prompt: tuple[int, ...], length: int, start_s: float) -> _Stream:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": length,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream = _Stream()
        try:
            async with self._http.stream("POST", "/completions", json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")
                    raise BadAnswer(f"status {answer.status_code}: {text:.500}")
                async for line in answer.aiter_lines():
                    if line.startswith("data:") and line != "data: [DONE]":
                        _note(json.loads(line[5:]), stream, time.perf_counter() - start_s)
        except httpx.HTTPError as error:
            raise BadAnswer(f"{type(error).__name__}: {error}") from error
        return stream

    def close(self) -> None:
        self._loop.run_until_complete(self._http.aclose())
        self._loop.close()


def _note(event: dict[str, Any], stream: _Stream, at_s: float) -> None:
    if "error" in event:
        raise BadAnswer(str(event["error"]))
    if event.get("usage"):
        stream.num_tokens = event["usage"]["completion_tokens"]
    if any(choice.get("text") for choice in event.get("choices", ())):
        stream.times_s.append(at_s)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
