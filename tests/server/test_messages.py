"""/v1/messages through Anthropic's own client, over a real socket."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from jaxserve.config import Config, ServerConfig
from tests.fake_engine import REPLY, FakeEngine
from tests.server.live import Live

USER: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    config = Config(server=ServerConfig(api_key="key"))
    server = Live(FakeEngine(config=config, max_model_len=5000))
    yield server
    server.stop()


@pytest.fixture
def engine(live: Live) -> Iterator[FakeEngine]:
    live.engine.added.clear()
    yield live.engine
    live.engine.step_s = 0.0


@pytest.fixture
def client(live: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key="key", max_retries=0) as client:
        yield client


def prompt(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.added[-1].prompt_ids, False)


def test_a_message_is_answered(client: anthropic.Anthropic, engine: FakeEngine):
    message = client.messages.create(
        model="fake",
        max_tokens=100,
        system="Be brief.",
        messages=USER,
        metadata={"user_id": "me"},
        extra_body={"temperature": 0.3, "top_k": 5},
    )
    assert prompt(engine) == "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    (block,) = message.content
    assert block.type == "text" and block.text == REPLY
    assert message.stop_reason == "end_turn" and message.role == "assistant"
    assert engine.added[0].sampling.top_k == 5 and engine.added[0].sampling.max_tokens == 100
    num_prompt = len(engine.added[0].prompt_ids)
    assert message.usage.input_tokens == num_prompt and message.usage.output_tokens > 5
    again = client.messages.create(model="fake", max_tokens=5, system="Be brief.", messages=USER)
    assert again.usage.cache_read_input_tokens == num_prompt - 1 and again.usage.input_tokens == 1
    assert again.stop_reason == "max_tokens"


def test_a_stream_has_anthropics_events(client: anthropic.Anthropic, engine: FakeEngine):
    engine.step_s = 0.002
    events: Any = list(
        client.messages.create(model="fake", max_tokens=100, messages=USER, stream=True)
    )
    kinds = [event.type for event in events if event.type != "ping"]
    num_deltas = kinds.count("content_block_delta")
    assert num_deltas > 5
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * num_deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == REPLY
    assert events[-2].delta.stop_reason == "end_turn" and events[-2].usage.output_tokens > 5


def test_the_clients_own_stream_helper_assembles_the_message(
    client: anthropic.Anthropic, engine: FakeEngine
):
    with client.messages.stream(model="fake", max_tokens=100, messages=USER) as stream:
        assert "".join(stream.text_stream) == REPLY
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == len(
        engine.added[0].prompt_ids
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_named(client: anthropic.Anthropic, engine: FakeEngine, stream: bool):
    with client.messages.stream(
        model="fake", max_tokens=100, messages=USER, stop_sequences=["story"]
    ) as events:
        message = events.get_final_message()
    (block,) = message.content
    assert block.type == "text" and block.text == "Hello world, a "
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == "story"


def test_blocks_become_messages(client: anthropic.Anthropic, engine: FakeEngine):
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "One"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Three", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Four"},
            ],
        },
    ]
    system: Any = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    client.messages.create(model="fake", max_tokens=5, messages=messages, system=system)
    assert prompt(engine) == (
        "<|begin|><|system|>A\nB<|end|><|user|>One<|end|><|assistant|>Two<|end|>"
        "<|user|>Three\nFour<|end|><|assistant|>"
    )


def test_an_answer_that_was_begun_is_gone_on_with(client: anthropic.Anthropic, engine: FakeEngine):
    begun: Any = [*USER, {"role": "assistant", "content": "Hello wor"}]
    client.messages.create(model="fake", max_tokens=5, messages=begun)
    assert prompt(engine).endswith("<|assistant|>Hello wor")


def test_tokens_are_counted_as_the_answer_would_count_them(
    client: anthropic.Anthropic, engine: FakeEngine
):
    counted = client.messages.count_tokens(model="fake", messages=USER, system="Be brief.")
    client.messages.create(model="fake", max_tokens=5, messages=USER, system="Be brief.")
    assert counted.input_tokens == len(engine.added[0].prompt_ids)


def test_the_model_is_listed_as_anthropics_client_reads_it(client: anthropic.Anthropic):
    (model,) = client.models.list().data
    assert model.id == "fake" and model.type == "model" and model.created_at.year >= 2024
    assert client.models.retrieve("fake").display_name == "fake"


def test_errors_are_anthropics_own(live: Live, client: anthropic.Anthropic):
    with pytest.raises(anthropic.NotFoundError) as not_found:
        client.messages.create(model="other", max_tokens=5, messages=USER)
    error: Any = not_found.value.body
    assert error["type"] == "error" and error["error"]["type"] == "not_found_error"
    assert error["request_id"] and not_found.value.request_id == error["request_id"]
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(
            model="fake", max_tokens=5, messages=USER
        )
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="fake", max_tokens=0, messages=USER)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(model="fake", max_tokens=5, messages=image)
    keyed = {"x-api-key": "key"}  # as older clients send it
    assert httpx.get(f"{live.url}/v1/models", headers=keyed).status_code == 200
    assert httpx.get(f"{live.url}/v1/models", headers={"x-api-key": "no"}).status_code == 401
    plain = httpx.post(f"{live.url}/v1/messages", json={}, headers={"x-api-key": "key"})
    assert plain.status_code == 400 and plain.json()["error"]["type"] == "invalid_request_error"


def test_a_failure_in_the_middle_is_an_event(serve: Any):
    async def main() -> str:
        async with serve(FakeEngine(fail_at_step=4)) as http:
            body = {"messages": USER, "max_tokens": 50, "stream": True}
            return (await http.post("/v1/messages", json=body)).text

    assert "event: error\ndata: " in asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [], "max_tokens": 5},
        {"messages": [5], "max_tokens": 5},
        {"messages": [{"role": "tool", "content": "x"}], "max_tokens": 5},
        {"messages": [{"role": "user", "content": 5}], "max_tokens": 5},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}], "max_tokens": 5},
        {"messages": [{"role": "user", "content": [5]}], "max_tokens": 5},
        {"messages": USER, "max_tokens": 5, "system": 5},
        {"messages": USER, "max_tokens": 5, "tools": [{"type": "web_search_20250305"}]},
        {"messages": USER, "max_tokens": 5, "tools": [{"name": "f"}], "tool_choice": {"type": "x"}},
        {"messages": USER, "max_tokens": 5, "stop_sequences": ["a"] * 17},
        {"messages": USER},
    ],
)
def test_bad_bodies_are_refused(live: Live, body: Any):
    answer = httpx.post(f"{live.url}/v1/messages", json=body, headers={"x-api-key": "key"})
    assert answer.status_code == 400 and answer.json()["type"] == "error", answer.text
