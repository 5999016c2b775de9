"""Engines over a Valkey server that dies, hangs, comes back, or is not there: no token changes."""

import random
import time
from pathlib import Path

import pytest

from jaxserve.engine import Engine
from jaxserve.types import Request
from tests.engine.tiers_harness import loaded, make_engine, renamed, requests, serve, settle
from tests.kv.stores.servers import Server, start_valkey

NUM_REQUESTS = 60
HOST_BYTES = 24 * 8192  # two dozen slots of the tiny model: the rest is in the store


def engine_on(server: Server) -> Engine:
    place = f"valkey://127.0.0.1:{server.port}/0?max_bytes=8MiB&timeout=200ms"
    return make_engine(kv_host_bytes=HOST_BYTES, kv_store=place, kv_load="load")


def serve_in_parts(engine: Engine, asked: list[Request], between: list) -> dict:
    """Serve, and do something to the server after each part, while requests are under way."""
    tokens: dict = {request.request_id: [] for request in asked}
    size, rng = -(-len(asked) // len(between)), random.Random(0)
    for index, action in enumerate(between):
        waiting = asked[index * size : (index + 1) * size]
        num_waiting = len(waiting)
        while waiting or engine.has_work:
            if waiting and rng.random() < 0.5:
                engine.add(waiting.pop(0))
            if action is not None and len(waiting) < num_waiting // 2:
                action()
                action = None
            for event in engine.step():
                tokens[event.request_id].append(event.token_id)
            engine.check_integrity()
    return tokens


@pytest.fixture(scope="module")
def right() -> dict:
    """What the engine says without lower tiers and reuse."""
    engine = make_engine(enable_prefix_caching=False)
    try:
        return serve(engine, requests(NUM_REQUESTS))
    finally:
        engine.close()


def check(right: dict, tokens: dict, suffix: str = "") -> None:
    wrong = [name for name, expected in right.items() if tokens[name + suffix] != expected]
    assert not wrong, f"{len(wrong)} answers differ: {wrong[:5]}"


def test_a_server_that_is_killed_hangs_and_comes_back_changes_no_token(tmp_path: Path, right: dict):
    server = start_valkey(tmp_path)
    engine = engine_on(server)
    try:
        check(right, serve(engine, requests(NUM_REQUESTS)))
        settle(engine)
        asked = renamed(requests(NUM_REQUESTS), "b")
        actions = [server.kill, server.start, server.pause, server.resume]
        check(right, serve_in_parts(engine, asked, actions), "b")
        time.sleep(1.5)  # the breaker stays open for a while
        for suffix in ("c", "d"):
            check(right, serve(engine, renamed(requests(NUM_REQUESTS), suffix)), suffix)
        settle(engine)
        assert loaded(engine)["valkey"] > 0, "the server was never used"
    finally:
        engine.close()
        server.kill()


def test_an_engine_starts_without_its_server_and_uses_it_once_it_is_there(
    tmp_path: Path, right: dict
):
    server = start_valkey(tmp_path)
    server.kill()
    engine = engine_on(server)
    try:
        check(right, serve(engine, requests(NUM_REQUESTS)))
        assert loaded(engine).get("valkey", 0) == 0
        server.start()
        until_s = time.monotonic() + 30
        number = 0
        while not loaded(engine).get("valkey", 0) and time.monotonic() < until_s:
            number += 1
            suffix = f"x{number}"
            check(right, serve(engine, renamed(requests(NUM_REQUESTS), suffix)), suffix)
        assert loaded(engine).get("valkey", 0) > 0, "it is back, but nobody asks it"
    finally:
        engine.close()
        server.kill()


def test_an_engine_ends_though_its_server_hangs(tmp_path: Path, right: dict):
    server = start_valkey(tmp_path)
    engine = engine_on(server)
    try:
        server.pause()
        check(right, serve(engine, requests(NUM_REQUESTS)))
        start_s = time.monotonic()
        engine.close()
        assert time.monotonic() - start_s < 90, "it waits for a server that hangs"
    finally:
        server.resume()
        server.kill()
