"""The page as users have it: before `jaxserve serve` with the embedded model."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from jaxserve.demo import stop, wait_until_healthy

Open = Callable[..., Page]


FLAGS = ("--max-model-len", "512", "--max-num-seqs", "2", "--max-num-batched-tokens", "64")
"""Few shapes of steps to compile."""


@pytest.fixture
def served_url(browser: object, tmp_path: Path) -> Iterator[str]:
    """A server that begins with the test, unless there is no browser to see it with."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.cli", "serve", "--port", str(port), *FLAGS]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", lambda: process.poll() is None)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def without_end(route: Route) -> None:
    """An answer as long as the context, so that it can be stopped before it ends by itself."""
    asked = route.request.post_data_json or {}
    route.continue_(post_data=json.dumps(asked | {"ignore_eos": True}))


def test_the_embedded_model_talks_stops_and_is_remembered(open_page: Open, served_url: str):
    page = open_page(served_url, color_scheme="dark")
    page.get_by_label("Message", exact=True).fill("Tell me a story about a fox.")
    with page.expect_response("**/v1/chat/completions") as response:
        page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_attribute("data-status", "done")
    told = page.locator(".answer .markdown").inner_text()
    assert len(told.split()) > 10
    # Its body is not asked for: a browser may have thrown away what a page read piece by piece.
    assert (response.value.header_value("content-type") or "").startswith("text/event-stream")
    expect(page.locator(".answer .facts")).to_contain_text("first token")

    page.route("**/v1/chat/completions", without_end)
    page.get_by_label("Message", exact=True).fill("Tell me a longer one.")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".answer").last).to_have_attribute("data-status", "stopped")

    page.set_viewport_size({"width": 390, "height": 780})
    page.reload()
    asked = ["Tell me a story about a fox.", "Tell me a longer one."]
    expect(page.locator(".said")).to_have_text(asked)
    assert page.locator(".answer .markdown").first.inner_text() == told
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
