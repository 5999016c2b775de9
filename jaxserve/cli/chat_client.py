"""Streamed answers of any OpenAI server, one at a time: what `chat` and `complete` ask.

Closing the iterator early closes the connection, which stops the server's work on the answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from jaxserve.errors import ConfigError, JaxserveError

CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream brought: text, thoughts before it, or the figures at the end."""

    text: str = ""
    reasoning: str = ""
    usage: "Usage | None" = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cached_by_source: Mapping[str, int] = field(default_factory=dict)


class ChatClient:
    """One model of one server.

    Args:
        url: of the server, with or without /v1.
        model: its name; None takes the server's first.
        socket: path of a Unix socket to use instead of the network.
        transport: instead of the network, for tests.

    Raises:
        JaxserveError: the server does not answer, or has no such model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        socket: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        if transport is None and socket is not None:
            transport = httpx.HTTPTransport(uds=socket)
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not a URL such as http://127.0.0.1:8000/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, transport=transport
        )
        models = self._models()
        names = [entry["id"] for entry in models]
        if not names:
            raise JaxserveError(f"{self.url} serves no model")
        if model is not None and model not in names:
            raise JaxserveError(f"{self.url} serves no model {model!r}; it has {', '.join(names)}")
        self.model = model or names[0]
        self.max_model_len: int | None = models[names.index(self.model)].get("max_model_len")

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Iterator[Piece]:
        """The answer to a conversation.

        Raises:
            JaxserveError: the server refused it, or the connection broke.
        """
        return self._stream("/chat/completions", {"messages": list(messages), **sampling})

    def complete(self, prompt: str, sampling: Mapping[str, Any]) -> Iterator[Piece]:
        """What follows a text; raises like `chat`."""
        return self._stream("/completions", {"prompt": prompt, **sampling})

    def close(self) -> None:
        self._http.close()

    def _models(self) -> list[dict[str, Any]]:
        try:
            response = self._http.get("/models", timeout=CONNECT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise JaxserveError(f"no answer from {self.url}: {error}") from error
        if response.status_code != 200:
            raise JaxserveError(f"{self.url}/models: {_error_of(response)}")
        try:
            return list(response.json()["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise JaxserveError(f"{self.url}/models is not a list of models") from error

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Piece]:
        body = {"model": self.model, "stream": True, **body}
        body["stream_options"] = {"include_usage": True}
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise JaxserveError(_error_of(response))
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield from _pieces(data)
        except httpx.HTTPError as error:
            raise JaxserveError(f"the connection broke: {error or type(error).__name__}") from error


def _pieces(data: str) -> Iterator[Piece]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise JaxserveError(f"the stream is broken: {data[:100]!r}") from error
    if "error" in chunk:
        error = chunk["error"]
        raise JaxserveError(str(error.get("message") if isinstance(error, dict) else error))
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text") or ""
        reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
        yield Piece(text, reasoning, finish_reason=choice.get("finish_reason"))
    if usage := chunk.get("usage"):
        details = usage.get("prompt_tokens_details") or {}
        yield Piece(
            usage=Usage(
                usage.get("prompt_tokens") or 0,
                usage.get("completion_tokens") or 0,
                details.get("cached_tokens") or 0,
                details.get("cached_tokens_by_source") or {},
            )
        )


def _error_of(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
