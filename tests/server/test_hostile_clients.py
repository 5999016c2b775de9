"""Clients that break off, trickle, send what is no request or read nothing, against a socket."""

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxserve.config import Config, SchedulerConfig
from jaxserve.server import guard, protocol
from tests.engine.tiers_harness import make_engine
from tests.fake_engine import FakeEngine
from tests.server.broken_streams import break_off_streams
from tests.server.hostile import BROKEN, ODD, Kinds, Maker
from tests.server.live import Live, wait_for
from tests.server.random_bodies import BODIES

NUM_STREAMS = 30
NUM_OF_A_KIND = 4
NUM_SLOW = 4
PATH = "/v1/completions"


@pytest.fixture
def live() -> Iterator[Live]:
    config = Config(scheduler=SchedulerConfig(max_num_seqs=64, max_num_waiting=64))
    engine = FakeEngine(config=config, max_model_len=20_000, step_s=0.001)
    engine.reply = lambda request: [40] * 10_000
    server = Live(engine, send_bytes=4096)
    yield server
    server.stop()


def post(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    return head % (PATH.encode(), size) + body


def status_of(client: socket.socket) -> int | None:
    """The status that the server answers with; None: it closed the connection."""
    try:
        data = client.recv(4096)
    except ConnectionError:
        return None
    return int(data.split(b" ", 2)[1]) if data else None


def break_off(live: Live, seed: int, body: dict[str, Any]) -> None:
    request = post(json.dumps(body).encode())
    rng = random.Random(seed)
    outcomes = asyncio.run(break_off_streams(live.port, rng, lambda: request, NUM_STREAMS)).outcomes
    assert outcomes["in its middle"], "nobody had begun to read"


def test_streams_that_clients_break_off_leave_no_request_and_no_connection(live: Live):
    body = {"prompt": "Hello", "max_tokens": 10_000, "stream": True}
    break_off(live, 0, body)
    wait_for(lambda: not live.engine.has_work and live.num_connections == 0)
    assert httpx.get(f"{live.url}/load").json() == {"server_load": 0}


def test_requests_of_clients_that_leave_before_their_turn_never_reach_the_engine(live: Live):
    first = post(json.dumps({"prompt": "a", "max_tokens": 1, "stream": True}).encode())
    render = live.engine.tokenizer.encode
    is_busy, may_go_on = threading.Event(), threading.Event()

    def encode(*args: Any) -> Any:
        is_busy.set()
        assert may_go_on.wait(10)
        return render(*args)

    live.engine.tokenizer.encode = encode
    with live.connect() as client:
        client.sendall(first)
        assert is_busy.wait(10)
        for _ in range(NUM_STREAMS):  # they come while the server cannot look, and are gone then
            with live.connect() as gone:
                gone.sendall(first)
        may_go_on.set()
        assert status_of(client) == 200
    wait_for(lambda: live.num_connections == 0 and not live.engine.has_work)
    assert len(live.engine.added) < NUM_STREAMS / 2


def test_streams_that_clients_break_off_leave_every_page_free():
    engine: Any = make_engine()
    live = Live(engine)
    try:
        body = {"prompt": [5, 6, 7] * 5, "max_tokens": 50, "stream": True, "ignore_eos": True}
        first = httpx.post(f"{live.url}{PATH}", json={**body, "stream": False}, timeout=60)
        assert first.json()["usage"]["completion_tokens"] == 50  # and the programs are compiled
        break_off(live, 1, body)
        wait_for(lambda: httpx.get(f"{live.url}/load").json() == {"server_load": 0})
        wait_for(lambda: not engine.has_work, timeout_s=30)
        assert [pages.num_in_use for pages in engine.stats().pages] == [0]
        engine.check_integrity()
    finally:
        live.stop()


@pytest.mark.parametrize("kinds", [BROKEN, ODD], ids=["broken", "odd"])
def test_what_is_no_request_gets_a_4xx_or_a_closed_connection(live: Live, kinds: Kinds):
    live.engine.reply = lambda request: [40] * 3
    rng = random.Random(1)
    for kind, make in list(kinds.items()) * NUM_OF_A_KIND:
        path = rng.choice(list(BODIES))
        broken = make(Maker(rng, path, BODIES[path]))
        with live.connect() as client:
            with contextlib.suppress(ConnectionError):  # it may have seen enough
                client.sendall(broken.data)
                if not broken.is_whole:
                    client.shutdown(socket.SHUT_WR)
            status = status_of(client)
        lowest = 400 if kinds is BROKEN else 100
        assert status is None or lowest <= status < 500, (kind, broken)
    wait_for(lambda: live.num_connections == 0 and not live.engine.has_work)
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_headers_and_bodies_that_trickle_are_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(guard, "BODY_PAUSE_S", 0.3)
    with live.connect() as headers, live.connect() as body, live.connect() as silent:
        headers.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        body.sendall(post(b'{"prompt"', length=100))
        assert [status_of(client) for client in (headers, body, silent)] == [408, 408, 408]
    wait_for(lambda: live.num_connections == 0)


def test_readers_that_trickle_are_cut_off_and_hold_nobody_up(
    live: Live, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(protocol, "SLOW_READER_S", 0.5)
    slow = [live.connect(receive_bytes=1024) for _ in range(NUM_SLOW)]
    for client in slow:
        client.sendall(post(b'{"prompt": "a", "max_tokens": 10000, "stream": true, "logprobs": 5}'))
    wait_for(lambda: len(live.engine.added) == NUM_SLOW)
    body = {"prompt": "a", "max_tokens": 5}
    answer = httpx.post(f"{live.url}{PATH}", json=body, timeout=20)
    assert answer.json()["usage"]["completion_tokens"] == 5

    def all_cut_off() -> bool:
        for client in slow:  # one byte now and then is not reading
            try:
                client.recv(1, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionError):
                pass
        return not live.engine.has_work and live.num_connections == 0

    wait_for(all_cut_off, timeout_s=30)
    assert len(live.engine.aborted) == NUM_SLOW
    for client in slow:
        client.close()
