"""`make demo`: starts a server on the embedded model, talks to it with a stock client, stops it.

Talks to the server through its port only, as anyone would. Needs the `openai` package.
"""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from jaxserve.embedded import checkpoint_path
from jaxserve.embedded.retrieval import make_prompt
from jaxserve.tokenizer import Tokenizer

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30
STORY = "Tell me a short story about a fox."
LONG_PROMPT_TOKENS = 900
PROMPT_SEED = 7


@dataclass(frozen=True, slots=True)
class Timing:
    """What one streamed answer took, and how much of its prompt came from the KV cache."""

    first_s: float
    total_s: float
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return (self.num_tokens - 1) / max(self.total_s - self.first_s, 1e-9)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code. An argument names another model."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        import openai
    except ImportError:
        print("the demo talks to the server with the official client: pip install openai")
        return 1
    print(
        "jaxserve demo, with the model that ships with it: a very small one. It tells short\n"
        "stories, adds small numbers, and finds facts in a long text. It knows nothing else.\n"
    )
    try:
        with running_server(arguments) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            with client:
                converse(client)
    except (RuntimeError, openai.OpenAIError) as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("\nTo keep a server running: jaxserve serve")
    return 0


def converse(client: Any) -> None:
    """A story, then a long text with a question, twice."""
    model = client.models.list().data[0]
    print(f"\n> {STORY}")
    story = ask(client, model.id, STORY, temperature=0.7, seed=PROMPT_SEED)
    print(
        f"  [{story.num_tokens} tokens: the first after {story.first_s * 1000:.0f} ms, "
        f"then {story.tokens_per_s:.0f} tokens/s]\n"
    )
    text = long_prompt(min(LONG_PROMPT_TOKENS, model.max_model_len - 64))
    print(f"> {shorten(text)}")
    first = ask(client, model.id, text, temperature=0)
    print(
        f"  [{first.num_prompt_tokens} prompt tokens, {first.num_cached_tokens} of them cached: "
        f"first token after {first.first_s * 1000:.0f} ms]\n"
    )
    print("> the same text and question again")
    again = ask(client, model.id, text, temperature=0)
    print(
        f"  [{again.num_prompt_tokens} prompt tokens, {again.num_cached_tokens} of them cached: "
        f"first token after {again.first_s * 1000:.0f} ms, "
        f"{first.first_s / max(again.first_s, 1e-9):.1f} times sooner]\n"
    )


def ask(client: Any, model: str, text: str, **sampling: Any) -> Timing:
    """Stream one answer to the terminal."""
    started_s = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=200 if len(text) < 200 else 32,
        **sampling,
    )
    first_s, usage = 0.0, None
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first_s = first_s or time.perf_counter() - started_s
            print(piece, end="", flush=True)
        usage = chunk.usage or usage
    total_s = time.perf_counter() - started_s
    print()
    if usage is None:
        raise RuntimeError("the stream ended without its figures")
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details else 0
    return Timing(first_s, total_s, usage.completion_tokens, usage.prompt_tokens, cached or 0)


def long_prompt(num_tokens: int) -> str:
    """A text with facts in it, and a question about one; made of words no training text has."""
    tokenizer = Tokenizer.from_folder(checkpoint_path())
    prompt = make_prompt(
        Random(PROMPT_SEED), "heldout", num_tokens, lambda text: len(tokenizer.encode(text, False))
    )
    return prompt.messages[-1]["content"]


def shorten(text: str) -> str:
    """The beginning and the end of a long text."""
    return (
        text if len(text) <= 300 else f"{text[:120]} ... ({len(text)} characters) ... {text[-120:]}"
    )


@contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[str]:
    """A server on a free port, ready when the block begins and stopped when it ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.cli", "serve", "--port", str(port), *arguments]
    print(f"$ jaxserve {' '.join(command[3:])}")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as server:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", lambda: server.poll() is None)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(server)


def wait_until_healthy(url: str, is_running: Callable[[], bool]) -> None:
    """The server itself shows what it does meanwhile."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if not is_running():
            raise RuntimeError("the server ended before it was ready; see above")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                time.sleep(0.1)  # it is about to print its own last lines
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {START_TIMEOUT_S} s")


def stop(server: "subprocess.Popen[bytes]") -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()


if __name__ == "__main__":
    sys.exit(main())
