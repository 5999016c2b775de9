"""The admin routes and metrics over a real engine with all tiers, and who may call them."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.config import Config, ServerConfig
from jaxserve.errors import ConfigError
from tests.engine.tiers_harness import make_engine
from tests.fake_engine import FakeEngine
from tests.server.conftest import Serve, serving
from tests.server.random_bodies import ADMIN_BODIES, mutated

ADMIN = {"Authorization": "Bearer boss"}
PROMPT = [3 + (7 * i) % 200 for i in range(50)]
NUM_BODIES = 60
Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks a server that lives on a loop of its own, as administrator if not told otherwise."""
    folder = tmp_path_factory.mktemp("kv")
    store = f"file://{folder}/disk?max_bytes=16MiB"
    engine = make_engine(kv_host_bytes=1 << 20, kv_store=store, kv_load="load")
    engine.config = replace(engine.config, server=ServerConfig(api_key="all", admin_key="boss"))
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    clients: list[httpx.AsyncClient] = []

    async def main() -> None:
        async with serving(engine) as http:  # pyright: ignore[reportArgumentType]
            clients.append(http)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(60)

    def call(method: str, path: str, **how: Any) -> httpx.Response:
        how = {"headers": ADMIN, **how}
        request = clients[0].request(method, path, **how)
        return asyncio.run_coroutine_threadsafe(request, loop).result(60)

    yield call
    loop.call_soon_threadsafe(end.set)
    thread.join(60)
    loop.close()


def complete(ask: Ask, **body: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    answer = ask("POST", "/v1/completions", json=body, headers={"Authorization": "Bearer all"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(ask: Ask, what: str, **body: Any) -> dict[str, Any]:
    answer = ask("POST", f"/admin/kv/{what}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def num_blocks(ask: Ask) -> dict[str, int]:
    tiers = ask("GET", "/admin/kv/stat").json()["tiers"]
    return {tier["name"]: tier["num_blocks"] for tier in tiers}


def wait_until_stored(ask: Ask, count: int) -> None:
    deadline = threading.Event()
    for _ in range(200):
        if num_blocks(ask)["disk"] == count:
            return
        deadline.wait(0.05)
    raise AssertionError(f"the disk never got {count} blocks: {num_blocks(ask)}")


def test_a_prompts_way_through_the_tiers_over_http(ask: Ask):
    post(ask, "clear", tiers=["all"])
    first = complete(ask)
    wait_until_stored(ask, 6)
    assert num_blocks(ask) == {"device": 6, "host": 6, "disk": 6}
    cleared = post(ask, "clear", tiers=["device", "host"])
    assert cleared["device_blocks"] == cleared["host_blocks"] == 6 and cleared["is_complete"]
    again = complete(ask)
    assert again["choices"] == first["choices"]
    details = again["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == 48
    assert details["cached_tokens_by_source"] == {"device": 0, "disk": 48}
    (decision,) = details["load_decisions"]
    assert decision["choice"] == "load" and decision["num_blocks"] == 6
    listed = ask("GET", "/admin/kv/blocks?limit=4").json()
    assert len(listed["blocks"]) == 4 and not listed["is_complete"]
    one = ask("GET", f"/admin/kv/blocks?prefix={listed['blocks'][0]['name']}").json()
    assert [block["tiers"] for block in one["blocks"]] == [["device", "host", "disk"]]


def test_verify_pin_and_erase_over_http(ask: Ask):
    post(ask, "clear", tiers=["all"])
    complete(ask, cache_salt="tenant")
    wait_until_stored(ask, 6)
    report = post(ask, "verify", recompute=4, seed=1)
    assert not report["is_damaged"] and report["stores"][0]["verdicts"] == {"ok": 6}
    assert report["recompute"]["num_compared"] == report["recompute"]["num_equal"] == 8
    pins = post(ask, "pin", prompt=PROMPT, cache_salt="tenant")
    assert pins["by_tier"] == {"host": 6, "disk": 6}
    receipt = post(ask, "erase", cache_salt="tenant")
    assert receipt["is_complete"] and receipt["stores"][0]["num_records"] == 6
    assert num_blocks(ask) == {"device": 0, "host": 0, "disk": 0}


def test_metrics_are_prometheus_text_and_tell_of_every_tier(ask: Ask):
    post(ask, "clear", tiers=["all"])
    before = metrics(ask)
    complete(ask)
    wait_until_stored(ask, 6)
    after = metrics(ask)
    found = {name for name, _ in after}
    for name in ("requests_running", "steps_total", "tokens_total", "preemptions_total"):
        assert f"jaxserve_{name}" in found
    resident = {labels: v for (n, labels), v in after.items() if n == "jaxserve_kv_resident_bytes"}
    assert {tier for ((_, tier),) in resident} == {"device", "host", "disk"}
    assert all(value > 0 for value in resident.values())
    moved = ("jaxserve_kv_moved_bytes_total", (("direction", "host_to_store"), ("tier", "disk")))
    assert after[moved] > before[moved]
    puts = (
        "jaxserve_kv_operation_seconds_bucket",
        (("le", "+Inf"), ("operation", "put"), ("store", "disk")),
    )
    assert after[puts] > before[puts]
    counted = {(name, labels) for name, labels in after if name.endswith("_total")}
    assert all(after[key] >= before.get(key, 0) for key in counted)


def metrics(ask: Ask) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = ask("GET", "/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


ROUTES = [
    ("GET", "/admin/kv/stat"),
    ("GET", "/admin/kv/blocks"),
    ("POST", "/admin/kv/verify"),
    ("POST", "/admin/kv/clear"),
    ("POST", "/admin/kv/pin"),
    ("POST", "/admin/kv/erase"),
    ("GET", "/admin"),
    ("GET", "/admin/kv/nothing"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("key", ["all", "", "bos", "boss2", None])
def test_no_key_but_the_admin_key_opens_an_admin_route(
    ask: Ask, method: str, path: str, key: str | None
):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {} if method == "GET" else {"json": {"tiers": ["all"], "cache_salt": "x"}}
    answer = ask(method, path, headers=headers, **body)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_the_admin_key_opens_metrics_but_no_models(ask: Ask):
    assert ask("GET", "/metrics").status_code == 200
    assert ask("GET", "/metrics", headers={"Authorization": "Bearer all"}).status_code == 200
    assert ask("GET", "/metrics", headers={}).status_code == 401
    assert ask("GET", "/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("what", "body", "message"),
    [
        ("clear", {}, "tiers"),
        ("clear", {"tier": ["host"]}, "tier"),
        ("clear", {"tiers": ["dsik"]}, "expected device, host, disk"),
        ("erase", {"cache_salt": ""}, "cache_salt"),
        ("pin", {"hashes": ["zz"]}, "no block hash"),
        ("pin", {"prompt": {"a": 1}}, "prompt"),
        ("pin", {"prompt": "x" * 10, "cache_salt": 3}, "cache_salt"),
        ("verify", {"recompute": "many"}, "recompute"),
        ("verify", {"recompute": 10**9}, "recompute"),
        ("verify", {"recompute": 1, "prompts": [[10**9]]}, "token id"),
        ("verify", {"recompute": 1, "prompts": [{"cache_salt": "a"}]}, "prompt"),
    ],
)
def test_a_bad_admin_request_is_told_so(ask: Ask, what: str, body: dict[str, Any], message: str):
    answer = ask("POST", f"/admin/kv/{what}", json=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ADMIN_BODIES)
def test_random_admin_bodies_get_an_answer_or_a_short_error(ask: Ask, path: str):
    rng = random.Random(path)
    for _ in range(NUM_BODIES):
        content = json.dumps(mutated(ADMIN_BODIES[path], rng))
        answer = ask("POST", path, content=content)
        assert answer.status_code < 500 and len(answer.content) < 4096, (content, answer.text)


def talk(serve: Serve, engine: FakeEngine, method: str, path: str, **how: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with serve(engine) as http:
            return await http.request(method, path, **how)

    return asyncio.run(main())


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_an_admin_key_there_are_no_admin_routes(
    serve: Serve, engine: FakeEngine, method: str, path: str
):
    engine.config = Config(server=ServerConfig(api_key="all"))
    for headers in ({}, {"Authorization": "Bearer all"}, {"Authorization": "Bearer "}):
        assert talk(serve, engine, method, path, headers=headers).status_code == 404


def test_an_engine_without_tiers_says_so_and_has_metrics_all_the_same(
    serve: Serve, engine: FakeEngine
):
    engine.config = Config(server=ServerConfig(admin_key="boss"))
    answer = talk(serve, engine, "GET", "/admin/kv/stat", headers=ADMIN)
    assert answer.status_code == 501
    assert "jaxserve_requests_live 0.0" in talk(serve, engine, "GET", "/metrics").text


def test_the_admin_key_must_be_a_key_of_its_own():
    with pytest.raises(ConfigError, match="admin_key equals api_key"):
        Config(server=ServerConfig(api_key="same", admin_key="same"))
    with pytest.raises(ConfigError, match="is empty"):
        Config(server=ServerConfig(admin_key=""))
