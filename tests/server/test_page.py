"""The web page's files: what is served, to whom, and under which policy."""

import re
from pathlib import Path

import pytest

from jaxserve.config import Config, ServerConfig
from jaxserve.server.page import read_files
from tests.fake_engine import FakeEngine
from tests.server.conftest import Serve

WEB = Path(__file__).parents[2] / "server" / "web"
pytestmark = pytest.mark.anyio

MAX_VENDORED_BYTES = 150_000


async def test_the_page_needs_no_key_but_what_it_asks_does(serve: Serve):
    engine = FakeEngine(config=Config(server=ServerConfig(api_key="key")))
    async with serve(engine) as http:
        page = await http.get("/")
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
        for name in re.findall(r'(?:src|href)="(/web/[^"]+)"', page.text):
            assert (await http.get(name)).status_code == 200, name
        assert (await http.get("/v1/models")).status_code == 401


async def test_the_policy_lets_the_page_ask_nobody_else(serve: Serve, engine: FakeEngine):
    async with serve(engine) as http:
        for path in ("/", "/web/main.js", "/web/vendor/purify.js"):
            headers = (await http.get(path)).headers
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy
            assert headers["x-content-type-options"] == "nosniff"


async def test_files_are_not_sent_again_while_they_are_the_same(serve: Serve, engine: FakeEngine):
    async with serve(engine) as http:
        first = await http.get("/web/main.js")
        again = await http.get("/web/main.js", headers={"If-None-Match": first.headers["etag"]})
        assert first.status_code == 200 and again.status_code == 304 and not again.content


async def test_nothing_but_the_page_can_be_read(serve: Serve, engine: FakeEngine):
    async with serve(engine) as http:
        for path in ("/web/", "/web/nothing.js", "/web/../page.py", "/web/%2e%2e/page.py"):
            assert (await http.get(path)).status_code in (404, 405), path
        assert (await http.get("/web/vendor/LICENSES.md")).status_code == 404


def test_every_module_and_picture_that_is_named_is_there():
    files = read_files()
    for path in (*WEB.glob("*.js"), *WEB.glob("*.css"), *WEB.glob("*.html")):
        for name in re.findall(r"""["'(]/web/([\w./-]+)["')]""", path.read_text()):
            assert name in files, f"{path.name} names {name}"


def test_what_is_vendored_is_small_and_licensed():
    vendored = [path for path in (WEB / "vendor").iterdir() if path.suffix != ".md"]
    assert sum(path.stat().st_size for path in vendored) <= MAX_VENDORED_BYTES
    licences = (WEB / "vendor" / "LICENSES.md").read_text()
    assert all(path.name in licences for path in vendored)
