"""/v1/responses through OpenAI's own client, over a real socket."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jaxserve.errors import RequestError
from jaxserve.server import response_store
from tests.fake_engine import REPLY, FakeEngine
from tests.server.live import Live


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live(FakeEngine(max_model_len=5000))
    yield server
    server.stop()


@pytest.fixture
def engine(live: Live) -> Iterator[FakeEngine]:
    live.engine.added.clear()
    yield live.engine
    live.engine.reply, live.engine.step_s = None, 0.0
    live.engine.fail_at_step = None


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt(engine: FakeEngine, i: int = -1) -> str:
    return engine.tokenizer.decode(engine.added[i].prompt_ids, False)


def test_a_text_is_answered(client: openai.OpenAI, engine: FakeEngine):
    response = client.responses.create(
        model="fake", input="Hello", instructions="Be brief.", temperature=0.5, metadata={"a": "b"}
    )
    assert response.output_text == REPLY and response.status == "completed"
    assert prompt(engine) == "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    assert engine.added[0].sampling.temperature == 0.5
    assert response.temperature == 0.5 and response.metadata == {"a": "b"}
    assert response.usage is not None and response.error is None
    assert response.usage.input_tokens == len(engine.added[0].prompt_ids)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    again = client.responses.create(model="fake", input="Hello", instructions="Be brief.")
    assert again.usage is not None and again.usage.input_tokens_details.cached_tokens > 0


def test_events_are_typed_numbered_and_join_to_the_response(
    client: openai.OpenAI, engine: FakeEngine
):
    engine.step_s = 0.002
    events = list(client.responses.create(model="fake", input="Hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 5 and "".join(event.delta for event in deltas) == REPLY
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    last: Any = events[-1]
    assert last.response.output_text == REPLY and last.response.usage.output_tokens > 5
    assert {event.item_id for event in deltas} == {last.response.output[0].id}


def test_the_clients_own_stream_helper_assembles_the_response(client: openai.OpenAI, engine: Any):
    with client.responses.stream(model="fake", input="Hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == REPLY


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI, engine: FakeEngine):
    response = client.responses.create(model="fake", input="Hello", max_output_tokens=3)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    events = list(
        client.responses.create(model="fake", input="a", max_output_tokens=3, stream=True)
    )
    assert events[-1].type == "response.incomplete"


def test_logprobs_come_with_text_and_deltas(client: openai.OpenAI, engine: FakeEngine):
    include: Any = ["message.output_text.logprobs"]
    response = client.responses.create(
        model="fake", input="Hello", include=include, top_logprobs=2, max_output_tokens=3
    )
    message: Any = response.output[0]
    assert [len(entry.top_logprobs) for entry in message.content[0].logprobs] == [2, 2, 2]
    events: Any = client.responses.create(
        model="fake", input="Hello", include=include, top_logprobs=1, stream=True
    )
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert all(delta.logprobs for delta in deltas)


def test_a_response_can_be_gone_on_from_and_asked_for_again(
    client: openai.OpenAI, engine: FakeEngine
):
    first = client.responses.create(model="fake", input="One", instructions="Be brief.")
    second = client.responses.create(model="fake", input="Two", previous_response_id=first.id)
    expected = f"<|user|>One<|end|><|assistant|>{REPLY}<|end|><|user|>Two<|end|><|assistant|>"
    assert prompt(engine) == "<|begin|>" + expected  # without the instructions of the first
    third = client.responses.create(model="fake", input="Three", previous_response_id=second.id)
    assert prompt(engine).count(REPLY) == 2
    assert client.responses.retrieve(third.id).output_text == REPLY
    items: Any = client.responses.input_items.list(third.id)
    assert items.data[0].content == "Three" and len(items.data) == 5
    client.responses.delete(third.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(third.id)


def test_what_is_not_stored_cannot_be_gone_on_from(client: openai.OpenAI, engine: FakeEngine):
    first = client.responses.create(model="fake", input="One", store=False)
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="fake", input="Two", previous_response_id=first.id)
    assert error.value.param == "previous_response_id"
    assert error.value.code == "previous_response_not_found"


def test_nobody_sees_the_responses_of_another_key(live: Live, client: openai.OpenAI, engine: Any):
    mine = client.responses.create(model="fake", input="One")
    other = client.with_options(api_key="other")
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(mine.id)


def test_items_of_all_kinds_become_messages(client: openai.OpenAI, engine: FakeEngine):
    items: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Two", "annotations": []}],
        },
        {"role": "user", "content": "Three"},
    ]
    client.responses.create(model="fake", input=items)
    assert prompt(engine) == (
        "<|begin|><|system|>Be brief.<|end|><|user|>One<|end|><|assistant|>Two<|end|>"
        "<|user|>Three<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": "a", "temperature": -1}, "temperature"),
        ({"input": "a", "n": 2}, "n"),
        ({"input": "a", "tool_choice": {"type": "mcp"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(live: Live, body: Any, param: str):
    for stream in (False, True):
        answer = httpx.post(f"{live.url}/v1/responses", json={**body, "stream": stream})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


def test_a_failure_in_the_middle_is_an_event(serve: Any):
    import asyncio

    async def main() -> str:
        engine = FakeEngine(fail_at_step=4)
        async with serve(engine) as http:
            response = await http.post("/v1/responses", json={"input": "Hello", "stream": True})
            return response.text

    events = [
        json.loads(part.split("data: ")[1]) for part in asyncio.run(main()).split("\n\n")[:-1]
    ]
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "10.0.0.7" not in json.dumps(events[-1])


def test_a_long_conversation_costs_as_much_to_store_as_what_is_new_in_it(
    monkeypatch: pytest.MonkeyPatch,
):
    sizes: list[int] = []
    dumps = json.dumps

    def measured(value: Any) -> str:
        text = dumps(value)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(response_store.json, "dumps", measured)
    store = response_store.ResponseStore(max_responses=1000, max_bytes=100_000)
    history: list[Any] = []
    before = None
    for i in range(40):
        output = [{"type": "message", "content": "y" * 100}]
        response = {"id": f"resp_{i}", "output": output, "previous_response_id": before}
        asked = [{"role": "user", "content": "x" * 100}]
        stored = response_store.StoredResponse(response, asked, history, "me")
        store.put(stored)
        history, before = stored.conversation, f"resp_{i}"
    assert sum(sizes) < 40 * 1000
    monkeypatch.undo()
    assert store.get("resp_39", "me").history == history[:-2]
    with pytest.raises(RequestError):  # histories count: old responses make room
        store.get("resp_0", "me")
