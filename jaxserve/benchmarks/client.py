"""One streamed request to any OpenAI server, with the time of every piece of its answer.

Failures are values, not exceptions: a load test goes on. Knows nothing of workloads or figures.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jaxserve.errors import ConfigError, JaxserveError

MAX_MESSAGE_CHARS = 300
READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what every one of them says.

    Attributes:
        url: up to and with /v1.
        is_chat: /chat/completions instead of /completions.
        extra: further fields of the body.
    """

    url: str
    model: str
    is_chat: bool
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 6 * 3600.0

    @property
    def endpoint(self) -> str:
        return f"{self.url}/{'chat/completions' if self.is_chat else 'completions'}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Answer:
    """What came of one request.

    Attributes:
        sent_s, first_s, ended_s: on the clock of `time.perf_counter`; first_s is 0 without a token.
        gaps_s: between the pieces of the answer.
        prompt_tokens, completion_tokens: as the server counts; is_counted is False where it does
            not say, and completion_tokens then is the number of pieces.
        cached_by_source: prompt tokens from a cache, by tier where the server says so.
        error: what kind of failure, or "".
    """

    sent_s: float = 0.0
    first_s: float = 0.0
    ended_s: float = 0.0
    late_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cached_by_source: dict[str, int] = field(default_factory=dict)
    is_counted: bool = False
    text: str = ""
    error: str = ""
    message: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for answers of one token."""
        later = self.completion_tokens - 1
        return (self.ended_s - self.first_s) / later if later > 0 else None


def new_session(num_connections: int = 0) -> aiohttp.ClientSession:
    """Connections for many requests at once; 0: as many as there are requests."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=num_connections, ttl_dns_cache=300),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        read_bufsize=READ_BYTES,
        trust_env=False,
    )


async def find_model(session: aiohttp.ClientSession, target: Target) -> dict[str, Any]:
    """The entry of the model in the server's list: the target's, or the first if it names none.

    Raises:
        JaxserveError: no answer, or no such model.
    """
    try:
        async with session.get(f"{target.url}/models", headers=target.headers) as response:
            status, text = response.status, await response.text()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise JaxserveError(f"no answer from {target.url}: {error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{target.url!r} is not a URL such as http://127.0.0.1:8000/v1"
        ) from error
    if status != 200:
        raise JaxserveError(f"{target.url}/models: HTTP {status}: {_message_of(text)}")
    try:
        models = json.loads(text)["data"]
        found = [m for m in models if target.model in ("", m["id"])]
    except (ValueError, KeyError, TypeError) as error:
        raise JaxserveError(f"{target.url}/models is not a list of models: {text[:100]}") from error
    if not found:
        names = ", ".join(str(m["id"]) for m in models[:20]) or "none"
        raise JaxserveError(f"{target.url} serves no model {target.model!r}; it has: {names}")
    return found[0]


async def ask(
    session: aiohttp.ClientSession,
    target: Target,
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
    num_output_tokens: int,
) -> Answer:
    """Send one request and read its stream to the end.

    Args:
        prompt: a text, token ids (not for chat), or the messages of a chat.
    """
    body: dict[str, Any] = {
        "model": target.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": num_output_tokens,
        **target.extra,
    }
    if target.is_chat:
        is_text = isinstance(prompt, str)
        body["messages"] = [{"role": "user", "content": prompt}] if is_text else prompt
    else:
        body["prompt"] = prompt
    answer = Answer(sent_s=time.perf_counter())
    try:
        async with asyncio.timeout(target.timeout_s):
            await _exchange(session, target, body, answer)
    except TimeoutError:
        answer.error, answer.message = "timeout", f"no end within {target.timeout_s:g} s"
    except aiohttp.ClientConnectorError as error:
        answer.error, answer.message = "connect", str(error)[:MAX_MESSAGE_CHARS]
    except (aiohttp.ClientError, OSError) as error:
        answer.error = "connection lost"
        answer.message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS]
    answer.ended_s = answer.ended_s or time.perf_counter()
    return answer


async def _exchange(
    session: aiohttp.ClientSession, target: Target, body: dict[str, Any], answer: Answer
) -> None:
    data = json.dumps(body).encode()
    headers = {**target.headers, "Content-Type": "application/json"}
    async with session.post(target.endpoint, data=data, headers=headers) as response:
        if response.status != 200:
            answer.error = f"http {response.status}"
            answer.message = _message_of(await response.text())
            return
        pieces: list[str] = []
        last_s, is_done = 0.0, False
        async for event in _events(response.content):
            now_s = time.perf_counter()
            if event == b"[DONE]":
                is_done = True
                break
            try:
                chunk = json.loads(event)
            except ValueError:
                answer.error, answer.message = "bad stream", event[:100].decode(errors="replace")
                return
            if "error" in chunk:
                answer.error, answer.message = "error in stream", _message_of(event.decode())
                return
            if (usage := chunk.get("usage")) is not None:
                _count(answer, usage)
            text = _text_of(chunk, target.is_chat)
            if text is None:
                continue
            pieces.append(text)
            if last_s:
                answer.gaps_s.append(now_s - last_s)
            else:
                answer.first_s = now_s
            last_s = answer.ended_s = now_s
    answer.text = "".join(pieces)
    if not answer.is_counted:
        answer.completion_tokens = len(pieces)
    if not is_done:
        answer.error, answer.message = "stream cut", "the stream ended without [DONE]"
    elif not pieces:
        answer.error, answer.message = "no token", "the answer has no text"


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _text_of(chunk: dict[str, Any], is_chat: bool) -> str | None:
    """What a chunk adds to the answer; None if it brings no token."""
    choices = chunk.get("choices")
    if not choices:
        return None
    if not is_chat:
        text = choices[0].get("text")
        return None if text is None else text
    delta = choices[0].get("delta") or {}
    text = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
    return text or None


def _count(answer: Answer, usage: Mapping[str, Any]) -> None:
    answer.is_counted = True
    answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
    answer.completion_tokens = int(usage.get("completion_tokens") or 0)
    details = usage.get("prompt_tokens_details") or {}
    answer.cached_tokens = int(details.get("cached_tokens") or 0)
    answer.cached_by_source = dict(details.get("cached_tokens_by_source") or {})


def _message_of(text: str) -> str:
    """The message of an error body, or its beginning."""
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:MAX_MESSAGE_CHARS]
