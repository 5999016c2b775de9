"""`jaxserve serve`: a plan, then the work with its progress, then a line that says where to go."""

import json
import signal
import socket
import sys
import time
from typing import Any

from jaxserve.cli.flags import with_model_argument, with_settings
from jaxserve.cli.plan import plan
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.settings import Settings

MAX_PORT = 65_535
SWITCH_S = 0.0005
"""How long the event loop may keep the engine's thread waiting (Python's own default is 5 ms)."""


@with_model_argument
@with_settings()
def serve(*, settings: Settings) -> int:
    """Serve a model over HTTP, with the OpenAI API, until Ctrl-C or SIGTERM."""
    started_s = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    sys.setswitchinterval(SWITCH_S)
    listener = bind(settings.config)
    try:
        url = f"http://{_host_of(listener)}"
        _print("\n".join(plan(settings, url)))
        from jaxserve.progress import Progress
        from jaxserve.server.launch import serve as serve_until_stopped
        from jaxserve.server.logs import set_up_logs

        server = settings.config.server
        set_up_logs(server.log_format, server.log_level)

        def on_ready(engine: Any) -> None:
            _print("\n".join(ready(engine, url, time.monotonic() - started_s)))

        with Progress() as bars:
            serve_until_stopped(settings.config, listener, bars, on_ready)
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
    _print("stopped")
    return 0


def bind(config: Config) -> socket.socket:
    """A socket on the address of the config, taken before any long work but not yet listening.

    Raises:
        ConfigError: the address cannot be taken.
    """
    host, port = config.server.host, config.server.port
    if port > MAX_PORT:  # the resolver would take it modulo 65536
        raise ConfigError(f"cannot listen on port {port}; expected 0 to {MAX_PORT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error}; choose another with --port or --host "
            "(--port 0 takes a free port)"
        ) from error
    return listener


def ready(engine: Any, url: str, elapsed_s: float) -> list[str]:
    """The lines that say that requests are served, how much fits, and how to send one."""
    report, config = engine.report, engine.config
    pages = " + ".join(f"{number:,}" for number in report.num_pages)
    body = {
        "model": engine.model_name,
        "messages": [{"role": "user", "content": "Tell me a short story."}],
        "stream": True,
    }
    key = " -H 'Authorization: Bearer '$JAXSERVE_API_KEY" if config.server.api_key else ""
    if not engine.tokenizer.has_chat_template:
        del body["messages"]
        body["prompt"] = "Once upon a time" if engine.tokenizer.has_text else [1]
    path = "chat/completions" if "messages" in body else "completions"
    return [
        f"  weights   {_count(report.num_params)} parameters as {engine.model.dtype}, "
        f"loaded in {report.load_s:.1f} s",
        f"  KV cache  {pages} pages of {config.cache.page_size} tokens = "
        f"{report.num_cache_tokens:,} tokens, {report.kv_bytes / 2**20:,.0f} MiB; "
        f"context {engine.max_model_len:,} tokens",
        *_tiers(engine),
        f"  graphs    {report.num_graphs} compiled in {report.compile_s:.1f} s, "
        f"{report.num_kept_graphs} of them traced at an earlier start",
        f"ready after {elapsed_s:.1f} s: {engine.model_name} on {url}/v1",
        f"  in a browser: {url}/",
        f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} \\",
        f"    -d '{json.dumps(body)}'",
    ]


def _tiers(engine: Any) -> list[str]:
    """A line about what is below the device, if anything is."""
    from jaxserve.server.engine_process import tiers_of

    text = engine.tiers if hasattr(engine, "tiers") else tiers_of(engine)
    return [f"  KV tiers  {text}"] if text else []


def _host_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _interrupt(signal_number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _print(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
