"""Who is let in, with what and for how long: keys, origins, limits of a request, its deadline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.config import Config, ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.server import guard
from jaxserve.server.app import create_app
from tests.fake_engine import FakeEngine
from tests.server.live import Live
from tests.server.test_bad_requests import CHAT, USER, ask, check_error

MODELS = {"method": "GET", "url": "/v1/models"}
LONG = {"messages": USER, "max_tokens": 200}


def engine_of(**server: Any) -> FakeEngine:
    return FakeEngine(config=Config(server=ServerConfig(**server)))


def slow_engine() -> FakeEngine:
    """Takes far longer for `LONG` than a request may take."""
    config = Config(server=ServerConfig(request_timeout_s=1.5))
    return FakeEngine(config=config, step_s=0.05, reply=lambda request: [40] * 200)


def statuses_of_keys(serve: Any, engine: FakeEngine, *keys: str) -> list[int]:
    requests = [{**MODELS, "headers": {"Authorization": f"Bearer {key}"}} for key in keys]
    return [response.status_code for response in ask(serve, engine, *requests)]


def test_each_of_several_keys_is_let_in_and_their_list_is_not(serve: Any):
    engine = engine_of(api_key="one, two")
    assert statuses_of_keys(serve, engine, "one", "two") == [200, 200]
    engine = engine_of(api_key="one, two")
    assert statuses_of_keys(serve, engine, "one, two", "three", "") == [401, 401, 401]


def test_keys_of_a_file_are_let_in_beside_the_others_and_its_comments_are_not(
    serve: Any, tmp_path: Path
):
    file = tmp_path / "keys"
    file.write_text("# of the team\n\nalice-key  \nbob-key\n")
    settings = {"api_key": "mine", "api_key_file": str(file)}
    keys = ["mine", "alice-key", "bob-key"]
    assert statuses_of_keys(serve, engine_of(**settings), *keys) == [200, 200, 200]
    others = ["# of the team", "alice", ""]
    assert statuses_of_keys(serve, engine_of(**settings), *others) == [401, 401, 401]


@pytest.mark.parametrize("text", ["", "# nobody yet\n", None])
def test_a_key_file_without_a_key_is_refused_instead_of_letting_everybody_in(
    tmp_path: Path, text: str | None
):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file"):
        create_app(engine_of(api_key_file=str(file)))


def from_page(origin: str) -> dict[str, Any]:
    return {"url": CHAT, "json": {"messages": USER}, "headers": {"Origin": origin}}


FOREIGN = [
    "https://evil.example",
    "null",
    "http://localhost.evil.example",
    "http://127.0.0.1.nip.io",
]


def test_without_a_key_a_foreign_page_is_refused_and_one_of_this_machine_is_answered(serve: Any):
    engine = engine_of()
    for response in ask(serve, engine, *(from_page(origin) for origin in FOREIGN)):
        assert check_error(response, 403)["code"] == "origin_not_allowed"
    assert engine.added == []
    own = ["http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:8000"]
    responses = ask(serve, engine_of(), *(from_page(origin) for origin in own))
    assert [response.status_code for response in responses] == [200, 200, 200]


def test_an_allowed_page_is_answered_with_what_its_browser_asks_for_and_no_other_page(serve: Any):
    page = "https://chat.example.com"
    preflight = {
        "method": "OPTIONS",
        "url": CHAT,
        "headers": {"Origin": page, "Access-Control-Request-Method": "POST"},
    }
    engine = engine_of(allowed_origins=f"https://b.example, {page}")
    asked, answer, refused = ask(
        serve, engine, preflight, from_page(page), from_page("https://evil.example")
    )
    assert asked.status_code == answer.status_code == 200
    for response in (asked, answer):
        assert response.headers["access-control-allow-origin"] == page
    check_error(refused, 403)
    assert "access-control-allow-origin" not in refused.headers


def test_an_answer_that_takes_too_long_is_a_408_and_its_request_ends(serve: Any):
    engine = slow_engine()
    (response,) = ask(serve, engine, {"url": CHAT, "json": LONG})
    error = check_error(response, 408)
    assert error["code"] == "deadline_exceeded" and "--request-timeout-s" in error["message"]
    assert len(engine.aborted) == 1 and not engine.has_work


def test_a_stream_that_takes_too_long_ends_with_an_error_and_its_request_ends(serve: Any):
    engine = slow_engine()
    (response,) = ask(serve, engine, {"url": CHAT, "json": {**LONG, "stream": True}})
    *chunks, error, done = response.text.strip().split("\n\n")
    assert response.status_code == 200 and len(chunks) > 1 and done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert len(engine.aborted) == 1 and not engine.has_work


def test_a_response_that_takes_too_long_ends_with_an_event_that_is_numbered_on(serve: Any):
    body = {"input": "Hello", "max_output_tokens": 200, "stream": True}
    (response,) = ask(serve, slow_engine(), {"url": "/v1/responses", "json": body})
    frames = [part.split("\n") for part in response.text.strip().split("\n\n")]
    assert frames[-1][0] == "event: error"
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "error" and events[-1]["code"] == "deadline_exceeded"
    assert "--request-timeout-s" in events[-1]["message"]


def test_anthropics_clients_are_told_in_their_own_form_that_it_took_too_long(serve: Any):
    requests = [{"url": "/v1/messages", "json": {**LONG, "stream": on}} for on in (False, True)]
    whole, stream = ask(serve, slow_engine(), *requests)
    assert whole.status_code == 408 and stream.status_code == 200
    name, data = stream.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    for told, response in ((whole.json(), whole), (json.loads(data[len("data: ") :]), stream)):
        assert told["type"] == "error" and "--request-timeout-s" in told["error"]["message"]
        assert told["request_id"] == response.headers["x-request-id"]


Nest = Callable[[int], bytes]


@pytest.mark.parametrize(
    "nest",
    [
        lambda depth: b"[" * depth + b"]" * depth,
        lambda depth: b'{"a":' * depth + b"1" + b"}" * depth,
        lambda depth: b"[" * (2 * depth),
    ],
)
def test_json_that_is_nested_too_deep_is_refused(serve: Any, nest: Nest):
    body = b'{"messages": %s}' % nest(guard.MAX_DEPTH)
    (response,) = ask(serve, FakeEngine(), {"url": CHAT, "content": body})
    assert "levels deep" in check_error(response, 400)["message"]


def test_brackets_in_strings_and_side_by_side_are_no_depth(serve: Any):
    content = '\\"[{' * 1000
    body = {"messages": [{"role": "user", "content": content[:80]}, *USER * 40], "max_tokens": 1}
    engine = FakeEngine(max_model_len=5000)
    (response,) = ask(serve, engine, {"url": CHAT, "json": body})
    assert response.status_code == 200


def test_too_many_headers_are_refused(serve: Any):
    headers = {f"X-{i}": "y" for i in range(guard.MAX_HEADERS + 1)}
    (response,) = ask(serve, FakeEngine(), {**MODELS, "headers": headers})
    check_error(response, 431)


@pytest.mark.parametrize("end", [b"", b"\r\nHost: x\r\n\r\n"], ids=["open", "in one piece"])
def test_headers_that_are_too_large_are_refused_and_the_next_client_is_served(end: bytes):
    live = Live(FakeEngine())
    try:
        with live.connect() as client:
            headers = b"GET /health HTTP/1.1\r\nX: " + b"y" * guard.MAX_HEADER_BYTES
            client.sendall(headers + end)
            assert client.recv(4096).startswith(b"HTTP/1.1 431 ")
        assert httpx.get(f"{live.url}/health").status_code == 200
    finally:
        live.stop()
