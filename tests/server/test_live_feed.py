"""What people see of a running engine over HTTP, and what watching costs."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from jaxserve.config import Config, ServerConfig
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.server.live import LiveFeed
from tests.fake_engine import FakeEngine
from tests.server.conftest import Serve
from tests.web.watched_engine import WatchedEngine

pytestmark = pytest.mark.anyio

SECRETS = ("tenant", "hash", "folder", "file://", "prompt_ids")


class Camera:
    """Takes pictures, and counts them."""

    def __init__(self):
        self.num_taken = 0
        self.value = 0
        self.is_dead = False
        self.is_broken = False

    async def __call__(self) -> dict[str, Any]:
        self.num_taken += 1
        if self.is_dead:
            raise EngineDeadError("the engine has stopped")
        if self.is_broken:
            raise ValueError("no film")
        return {"at_s": self.num_taken, "value": self.value}


def data_of(frame: bytes) -> dict[str, Any]:
    assert frame.startswith(b"data: ") and frame.endswith(b"\n\n")
    return json.loads(frame[6:])


async def test_pictures_say_what_runs_and_what_the_tiers_hold(serve: Serve):
    engine = WatchedEngine()
    async with serve(engine) as http:
        await http.post("/v1/completions", json={"prompt": "Hello world", "max_tokens": 5})
        answer = await http.get("/v1/kv/stat")
    shown = answer.json()
    assert answer.status_code == 200 and shown["tokens"]["decode"] >= 5
    assert shown["requests"] == {
        "live": 0,
        "running": 0,
        "waiting": 0,
        "max_running": 64,
        "max_waiting": 1024,
    }
    assert [tier["name"] for tier in shown["tiers"]] == ["device", "host", "disk"]
    assert shown["tiers"][2]["store"]["load_breaker"] == "closed"
    assert shown["tiers"][2]["store"]["get_p99_s"] == 0.01
    assert sum(shown["prompt_tokens"]["cached"].values()) < shown["prompt_tokens"]["looked_up"]
    assert not [word for word in SECRETS if word in answer.text.lower()]


async def test_an_engine_without_figures_still_tells_its_requests(serve: Serve, engine: FakeEngine):
    async with serve(engine) as http:
        shown = (await http.get("/v1/kv/stat")).json()
    assert shown["requests"]["live"] == 0 and "tiers" not in shown


async def test_watching_needs_the_api_key_and_no_admin_key(serve: Serve):
    engine = WatchedEngine(config=Config(server=ServerConfig(api_key="all", admin_key="boss")))
    async with serve(engine) as http:
        for path in ("/v1/kv/stat", "/v1/kv/stream"):
            assert (await http.get(path)).status_code == 401
        headers = {"Authorization": "Bearer all"}
        assert (await http.get("/v1/kv/stat", headers=headers)).status_code == 200


async def test_a_feed_begins_at_once_and_goes_on_when_something_changes():
    camera = Camera()
    feed = LiveFeed(camera, interval_s=0.001)
    watcher = feed.watch()
    assert data_of(await anext(watcher))["value"] == 0
    await anext(watcher)
    camera.value = 7
    while data_of(await anext(watcher))["value"] != 7:
        pass
    await watcher.aclose()
    assert feed.num_watchers == 0


async def test_many_watchers_cost_one_picture_each_time_and_none_cost_nothing():
    camera = Camera()
    feed = LiveFeed(camera, interval_s=0.001)
    watchers = [feed.watch() for _ in range(20)]
    for watcher in watchers:
        await anext(watcher)
    before = camera.num_taken
    camera.value += 1
    frames = await asyncio.gather(*(anext(watcher) for watcher in watchers))
    assert len(set(frames)) == 1 and camera.num_taken - before <= 2
    for watcher in watchers:
        await watcher.aclose()
    await asyncio.sleep(0.01)
    before = camera.num_taken
    await asyncio.sleep(0.02)
    assert camera.num_taken == before


async def test_a_picture_that_has_not_changed_is_not_sent_again():
    camera = Camera()
    feed = LiveFeed(camera, interval_s=0.001)
    watcher = feed.watch()
    await anext(watcher)
    await anext(watcher)  # the sampler's first
    before, following = camera.num_taken, asyncio.ensure_future(anext(watcher, None))
    await asyncio.wait({following}, timeout=0.05)
    assert not following.done() and camera.num_taken > before
    feed.close()
    assert await following is None


async def test_a_watcher_too_many_is_told_so_and_leaves_room_when_it_goes():
    feed = LiveFeed(Camera(), max_watchers=2, interval_s=0.001)
    watchers = [feed.watch(), feed.watch()]
    for watcher in watchers:
        await anext(watcher)
    with pytest.raises(RequestError, match="2 watch this engine and 2 may") as refused:
        feed.watch()
    assert refused.value.code == "too_many_watchers"
    await watchers.pop().aclose()
    await anext(feed.watch())


async def test_watchers_that_have_not_asked_for_a_picture_yet_count_until_they_go():
    feed = LiveFeed(Camera(), max_watchers=2, interval_s=0.001)
    first, second = feed.watch(), feed.watch()
    with pytest.raises(RequestError, match="2 may"):
        feed.watch()
    await second.aclose()
    await anext(feed.watch())
    await first.aclose()
    feed.watch()


async def test_a_feed_ends_with_its_server():
    feed = LiveFeed(Camera(), interval_s=60)
    watcher = feed.watch()
    await anext(watcher)
    rest = asyncio.ensure_future(anext(watcher, None))
    await asyncio.sleep(0)
    feed.close()
    assert await asyncio.wait_for(rest, 5) is None


async def test_a_dead_engine_ends_the_feed_with_a_word():
    camera = Camera()
    feed = LiveFeed(camera, interval_s=0.001)
    watcher = feed.watch()
    await anext(watcher)
    camera.is_dead = True
    frames = [frame async for frame in watcher]
    assert frames == [] or data_of(frames[-1])["error"]["code"] == "engine_dead"
    again = [frame async for frame in feed.watch()]
    assert data_of(again[0])["error"]["code"] == "engine_dead"


async def test_a_picture_that_cannot_be_taken_ends_the_feed_instead_of_leaving_it_silent(
    caplog: pytest.LogCaptureFixture,
):
    camera = Camera()
    feed = LiveFeed(camera, interval_s=0.001)
    watchers = [feed.watch(), feed.watch()]
    for watcher in watchers:
        await anext(watcher)
    camera.is_broken = True
    for watcher in watchers:
        rest = asyncio.ensure_future(_all(watcher))
        await asyncio.wait_for(rest, 5)
    assert "no film" in caplog.text and feed.num_watchers == 0
    camera.is_broken = False
    assert data_of(await anext(feed.watch()))["value"] == 0


async def _all(watcher: AsyncIterator[bytes]) -> list[bytes]:
    return [frame async for frame in watcher]


async def test_the_stream_is_server_sent_events(serve: Serve):
    """ASGITransport would wait for the end of the stream: the route is called by hand."""
    engine = WatchedEngine()
    async with serve(engine) as http:
        transport = http._transport
        assert isinstance(transport, httpx.ASGITransport)
        app, sent, gone = transport.app, [], asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                gone.set()

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/kv/stream",
            "raw_path": b"/v1/kv/stream",
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
        }
        await asyncio.wait_for(app(scope, receive, send), 10)
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-accel-buffering"] == b"no"
    assert data_of(sent[1]["body"])["requests"]["running"] == 0
