"""What a client gets for a request that cannot be served: an OpenAI error, never a 5xx, never more
than a few characters of its own input."""

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from jaxserve.config import Config, SchedulerConfig, ServerConfig
from jaxserve.server import guard
from tests.fake_engine import FakeEngine, make_tokenizer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]


def ask(serve: Any, engine: FakeEngine, *requests: dict[str, Any], **client: Any) -> list[Any]:
    """Responses to requests sent one after the other."""

    async def main() -> list[httpx.Response]:
        async with serve(engine, **client) as http:
            return [await http.request(**{"method": "POST", **request}) for request in requests]

    return asyncio.run(main())


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert len(response.content) < 16_384
    (key,) = response.json()
    error = response.json()[key]
    assert key == "error" and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    return error


TOOL = {"type": "function", "function": {"name": "f"}}


def tool(**parameters: Any) -> dict[str, Any]:
    return {**TOOL, "function": {"name": "f", "parameters": parameters}}


BAD_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [3]}, "messages.0"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"content": "Hello"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "prompt"),
    ({"messages": USER, "temperature": "hot"}, "temperature"),
    ({"messages": USER, "temperature": True}, "temperature"),
    ({"messages": USER, "temperature": -1}, "temperature"),
    ({"messages": USER, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": USER, "max_tokens": True}, "max_tokens"),
    ({"messages": USER, "max_tokens": 0}, "max_tokens"),
    ({"messages": USER, "n": 10**30}, "n"),
    ({"messages": USER, "n": 0}, "n"),
    ({"messages": USER, "stop": ["x"] * 17}, "stop"),
    ({"messages": USER, "stop": [3]}, "stop"),
    ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": USER, "bad_words": "story"}, "bad_words"),
    ({"messages": USER, "bad_words": ["a"] * 129}, "bad_words"),
    ({"messages": USER, "bad_words": [5]}, "bad_words.0"),
    ({"messages": USER, "bad_words": [" "]}, "bad_words.0"),
    ({"messages": USER, "bad_words": ["qwertzuiop asdfghjkl"]}, "bad_words.0"),
    ({"messages": USER, "logit_bias": [1]}, "logit_bias"),
    ({"messages": USER, "stop_token_ids": ["x"]}, "stop_token_ids.0"),
    ({"messages": USER, "allowed_token_ids": 3}, "allowed_token_ids"),
    ({"messages": USER, "logprobs": 3}, "logprobs"),
    ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": USER, "stream": "yes"}, "stream"),
    ({"messages": USER, "seed": 2**64}, "seed"),
    ({"messages": USER, "priority": 2**40}, "priority"),
    ({"messages": USER, "cache_salt": "a" * 500}, "cache_salt"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools.0"),
    ({"messages": USER, "tools": [TOOL, TOOL]}, "tools.1.function.name"),
    ({"messages": USER, "tools": 3}, "tools"),
    ({"messages": USER, "tools": [TOOL] * 200}, "tools"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
    ({"messages": USER, "tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    (
        {
            "messages": USER,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        "tool_choice",
    ),
    (
        {
            "messages": USER,
            "tools": [{**TOOL, "function": {"name": "f", "parameters": {"uniqueItems": True}}}],
            "tool_choice": "required",
        },
        "tools.0.function.parameters",
    ),
    (
        {"messages": USER, "tools": [tool(required=[["a"]])]},
        "tools.0.function.parameters.required",
    ),
    (
        {"messages": USER, "tools": [tool(properties={"a": {"type": [["string"]]}})]},
        "tools.0.function.parameters.properties.a.type",
    ),
    (
        {"messages": USER, "tools": [tool(properties={"a": {"anyOf": [{"oneOf": 5}]}})]},
        "tools.0.function.parameters.properties.a.anyOf.0.oneOf",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "messages.0.tool_calls.0.function.name",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
    ),
    ({"messages": USER, "response_format": {"type": "yaml"}}, "response_format.type"),
    ({"messages": USER, "response_format": "json"}, "response_format.type"),
    (
        {"messages": USER, "response_format": {"type": "json_schema"}},
        "response_format.json_schema",
    ),
    (
        {
            "messages": USER,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "x",
                    "schema": {"properties": {"a": {"items": {"type": "strange"}}}},
                },
            },
        },
        "response_format.json_schema.schema.properties.a.items",
    ),
    ({"messages": USER, "structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"messages": USER, "structured_outputs": {"yaml": "x"}}, "structured_outputs"),
    ({"messages": USER, "guided_regex": "("}, "guided_regex"),
    ({"messages": USER, "guided_regex": "a\ud800"}, "guided_regex"),
    ({"messages": USER, "guided_choice": "a"}, "guided_choice"),
    (
        {"messages": USER, "guided_regex": "a", "response_format": {"type": "json_object"}},
        "guided_regex",
    ),
    ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"messages": USER, "chat_template_kwargs": 3}, "chat_template_kwargs"),
    ({"messages": USER, "max_tokens": 300}, "max_tokens"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHAT, ids=lambda value: repr(value)[-40:])
def test_a_bad_chat_body_is_a_400_that_names_the_field(serve: Any, body: Any, param: str | None):
    engine = FakeEngine()
    content = json.dumps(body)
    headers = {"content-type": "application/json"}
    (response,) = ask(serve, engine, {"url": CHAT, "content": content, "headers": headers})
    error = check_error(response, 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert not engine.added


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt.1"),
    ({"prompt": [3, "a"]}, "prompt.1"),
    ({"prompt": [[3], [10**9]]}, "prompt.1.0"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type"),
    ({"prompt": "a", "structured_outputs": {"choice": [1]}}, "structured_outputs.choice.0"),
    ({"prompt": "a " * 400}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), BAD_COMPLETIONS, ids=lambda value: repr(value)[:40])
def test_a_bad_completions_body_is_a_400_that_names_the_field(serve: Any, body: Any, param: str):
    (response,) = ask(serve, FakeEngine(), {"url": COMPLETIONS, "json": body})
    assert check_error(response, 400)["param"] == param


def test_a_prompt_too_long_says_by_how_much(serve: Any):
    (response,) = ask(serve, FakeEngine(), {"url": COMPLETIONS, "json": {"prompt": [5] * 300}})
    error = check_error(response, 400)
    assert error["code"] == "context_length_exceeded" and "by 45 tokens" in error["message"]


def test_validation_comes_before_a_stream_begins(serve: Any):
    body = {"messages": USER, "stream": True, "max_tokens": 1000}
    (response,) = ask(serve, FakeEngine(), {"url": CHAT, "json": body})
    assert check_error(response, 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"messages": ' + b"[" * 100_000,
        b'{"n": ' + b"9" * 6000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "logit_bias": {"3": Infinity}}',
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_body_that_is_no_json_object_is_a_400(serve: Any, content: bytes):
    headers = {"content-type": "application/json"}
    request = {"url": COMPLETIONS, "content": content, "headers": headers}
    (response,) = ask(serve, FakeEngine(), request)
    check_error(response, 400)


def test_another_content_type_is_a_415_and_none_at_all_is_taken(serve: Any):
    content = json.dumps({"prompt": "a"}).encode()
    form = {"content-type": "application/x-www-form-urlencoded"}
    refused, taken = ask(
        serve,
        FakeEngine(),
        {"url": COMPLETIONS, "content": content, "headers": form},
        {"url": COMPLETIONS, "content": content},
    )
    check_error(refused, 415)
    assert taken.status_code == 200


def test_a_body_too_large_is_a_413_with_or_without_a_length(
    serve: Any, monkeypatch: pytest.MonkeyPatch
):
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 1000

    monkeypatch.setattr(guard.Guard.__init__, "__kwdefaults__", {"max_body_bytes": 10_000})
    headers = {"content-type": "application/json"}
    for content in (b" " * 20_000, chunks()):
        request = {"url": COMPLETIONS, "content": content, "headers": headers}
        (response,) = ask(serve, FakeEngine(), request)
        check_error(response, 413)


def test_unknown_models_paths_and_methods(serve: Any):
    body = {"model": "x" * 5000, "messages": USER}
    model, path, method = ask(
        serve,
        FakeEngine(),
        {"url": CHAT, "json": body},
        {"url": "/v1/nothing", "json": {}},
        {"url": CHAT, "method": "GET"},
    )
    error = check_error(model, 404)
    assert error["code"] == "model_not_found" and len(error["message"]) < 400
    check_error(path, 404)
    check_error(method, 405)


def test_large_input_is_not_echoed(serve: Any):
    text = "x" * 100_000
    bodies: list[dict[str, Any]] = [
        {"prompt": "a", "temperature": text},
        {"prompt": "a", "stop": {text: text}},
        {"prompt": "a", "logit_bias": {text: 1}},
        {"prompt": "a", "logit_bias": {str(i): text[:1000] for i in range(1000)}},
        {"prompt": "a", "cache_salt": text},
        {"prompt": [text, 3]},
        {"prompt": [3] + [text[:1000]] * 1000},
    ]
    for response in ask(serve, FakeEngine(), *({"url": COMPLETIONS, "json": b} for b in bodies)):
        check_error(response, 400)
        assert len(response.content) < 1000
    (response,) = ask(serve, FakeEngine(), {"url": CHAT, "json": {"messages": [3] * 100_000}})
    check_error(response, 400)


def test_a_checkpoint_without_chat_template_says_so(serve: Any):
    engine = FakeEngine(tokenizer=make_tokenizer(None))
    (response,) = ask(serve, engine, {"url": CHAT, "json": {"messages": USER}})
    assert "no chat template" in check_error(response, 400)["message"]


def test_a_key_is_required_everywhere_but_for_health(serve: Any):
    engine = FakeEngine(config=Config(server=ServerConfig(api_key="s3cret")))
    paths = ["/v1/models", "/openapi.json", "/v1/nothing", "//v1/models", "/health/", "/v1/models/"]
    requests = [{"url": path, "method": "GET"} for path in paths]
    for response in ask(serve, engine, *requests):
        assert check_error(response, 401)["code"] == "invalid_api_key"
    for key in ("Bearer wrong", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cret2"):
        refused = {"url": CHAT, "json": {"messages": USER}, "headers": {"Authorization": key}}
        check_error(ask(serve, engine, refused)[0], 401)
    health, models = ask(
        serve,
        FakeEngine(config=engine.config),
        {"url": "/health", "method": "GET"},
        {"url": "/v1/models", "method": "GET", "headers": {"Authorization": "bearer s3cret"}},
    )
    assert health.status_code == models.status_code == 200


def test_a_full_queue_is_a_429_and_recovers(serve: Any):
    scheduler = SchedulerConfig(max_num_seqs=2, max_num_waiting=1)
    engine = FakeEngine(config=Config(scheduler=scheduler), step_s=0.01)

    async def main() -> None:
        async with serve(engine) as http:
            body = {"messages": USER}
            many = [http.post(CHAT, json=body) for _ in range(6)]
            responses = await asyncio.gather(*many)
            statuses = sorted(response.status_code for response in responses)
            assert statuses == [200] * 3 + [429] * 3
            refused = next(r for r in responses if r.status_code == 429)
            error = check_error(refused, 429)
            assert error["type"] == "rate_limit_error" and refused.headers["retry-after"]
            check_error(await http.post(CHAT, json={**body, "n": 4}), 429)
            assert (await http.post(CHAT, json=body)).status_code == 200

    asyncio.run(main())


def test_an_engine_failure_is_a_500_without_details_and_health_says_so(
    serve: Any, caplog: pytest.LogCaptureFixture
):
    engine = FakeEngine(fail_at_step=5, step_s=0.01)

    async def main() -> None:
        async with serve(engine) as http:
            whole = http.post(CHAT, json={"messages": USER})
            stream = http.post(CHAT, json={"messages": USER, "stream": True})
            failed, streamed = await asyncio.gather(whole, stream)
            error = check_error(failed, 500)
            assert error["type"] == "server_error" and "10.0.0.7" not in failed.text
            assert streamed.status_code == 200
            lines = streamed.text.strip().split("\n\n")
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
            assert "10.0.0.7" not in streamed.text
            health = await http.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "dead"
            refused = await http.post(CHAT, json={"messages": USER})
            assert check_error(refused, 503) and refused.headers["retry-after"]

    asyncio.run(main())
    assert "10.0.0.7" in caplog.text and engine.closed


def test_a_bug_in_a_handler_is_a_500_with_a_request_id_only(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    engine = FakeEngine()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("secret detail")

    async def main() -> httpx.Response:
        async with serve(engine) as http:
            monkeypatch.setattr(engine.tokenizer, "render_chat", broken)
            return await http.post(CHAT, json={"messages": USER})

    response = asyncio.run(main())
    error = check_error(response, 500)
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert "secret detail" in caplog.text


def test_random_bodies_never_give_a_5xx(serve: Any):
    rng = random.Random(0)
    names = [
        *("prompt", "messages", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop"),
        *("stop_token_ids", "logit_bias", "allowed_token_ids", "logprobs", "max_tokens", "echo"),
        *("min_tokens", "stream", "stream_options", "cache_salt", "priority", "tools", "model"),
        *("chat_template_kwargs", "top_logprobs", "prompt_logprobs", "ignore_eos", "best_of"),
    ]
    values: list[Any] = [
        *(None, True, False, 0, 1, -1, 2, 1.5, 1e308, -(2**70), 2**31, "", "a", "fake", "\u0000"),
        *([], [1], ["a"], [[1]], [None], {}, {"a": 1}, {"1": 1}, USER, "x" * 3000, [3] * 600),
    ]

    async def main() -> None:
        async with serve(FakeEngine()) as http:
            for i in range(1500):
                picked = rng.sample(names, rng.randint(1, 4))
                body: dict[str, Any] = {name: rng.choice(values) for name in picked}
                if i % 2:
                    body = {"prompt": "a", "messages": USER} | body
                response = await http.post(rng.choice([CHAT, COMPLETIONS]), json=body)
                assert response.status_code in (200, 400, 404), (body, response.text)
                if response.status_code != 200:
                    check_error(response, response.status_code)

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 65 + b"]" * 65,
        b"[" * 40 + b"[" * 64 + b"]" * 64,  # deep in the middle, cut off at the end
        b"[" + b"[]," * 100_000 + b'{"a":' * 64 + b"1" + b"}" * 64 + b"]",
        b'["[\\"[[[[",' + b"[" * 64,
    ],
)
def test_a_body_that_is_too_deep_anywhere_is_told_so(serve: Any, engine: FakeEngine, body: bytes):
    (answer,) = ask(serve, engine, {"url": COMPLETIONS, "content": body})
    assert "more than 64 levels deep" in check_error(answer, 400)["message"]


def test_a_body_is_as_deep_as_may_be_and_long(serve: Any, engine: FakeEngine):
    long = b"[" * 63 + b"]" * 63 + b"," + b"[]," * 100_000 + b'"' + b"[" * 100 + b'"'
    (answer,) = ask(serve, engine, {"url": COMPLETIONS, "content": b"[" + long + b"]"})
    assert "deep" not in check_error(answer, 400)["message"]
