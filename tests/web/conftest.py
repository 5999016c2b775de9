"""A real Chromium before a real server; the engine behind it is a fake with a long answer.

The tests are skipped where there is no Chromium, unless REQUIRE_BROWSER is set (as in CI).
"""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from jaxserve.config import Config
from jaxserve.server.app import create_app
from tests.web.watched_engine import WatchedEngine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    if os.environ.get("REQUIRE_BROWSER"):
        raise
    pytest.skip("playwright is not installed", allow_module_level=True)


TIMEOUT_S = 20
"""For whatever a page should do, on a machine that may be busy."""

expect.set_options(timeout=1000 * TIMEOUT_S)


class WebServer:
    """A server in a thread of its own."""

    def __init__(self, engine: Any, port: int = 0):
        self.engine = engine
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app: Any = create_app(engine)
        settings = uvicorn.Config(
            app, log_level="warning", log_config=None, timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        wait_for(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@dataclass
class Seen:
    """What a page did that nobody asked it to."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def wait_for(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.01)


def watched(reply: str, step_s: float = 0.001, **more: Any) -> WatchedEngine:
    """An engine that answers everything with one text."""
    engine = WatchedEngine(step_s=step_s, config=more.pop("config", Config()), **more)
    tokens = engine.tokenizer.encode(reply)
    engine.reply = lambda request: tokens
    return engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ends with each file: while its driver runs, this thread can run no other event loop."""
    if CHROMIUM is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("REQUIRE_BROWSER is set, but there is no chromium: apt-get install it")
        pytest.skip("no chromium on this machine")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., WebServer]]:
    """Starts servers that end with the test."""
    servers: list[WebServer] = []

    def start(engine: Any, port: int = 0) -> WebServer:
        servers.append(WebServer(engine, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages of a browser that knows nothing yet; whatever they ask of others fails the test.

    The page's own failures do, too, but for those that hold the text `allowed`.
    """
    contexts: list[Any] = []
    all_seen: list[tuple[Seen, str]] = []

    def start(
        url: str, *, width: int = 1280, height: int = 800, allowed: str = "nothing", **options: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(1000 * TIMEOUT_S)
        contexts.append(context)
        page, seen = context.new_page(), Seen()
        all_seen.append((seen, url))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                seen.errors.append(message.text)
                if message.type == "error"
                and "Failed to load resource" not in message.text
                and allowed not in message.text
                else None
            ),
        )
        page.goto(url)
        return page

    yield start
    for context in contexts:
        context.close()
    for seen, url in all_seen:
        origin = "/".join(url.split("/")[:3])
        outside = [asked for asked in seen.requests if not asked.startswith((origin, "data:"))]
        assert not outside, f"the page asked others: {outside}"
        assert not seen.errors, seen.errors
