"""The endpoints in process: what a request asks for is what comes back."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from jaxserve.types import LoadDecision, PromptReuse, Request
from tests.fake_engine import REPLY, FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]

Talk = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture
def talk(serve: Any, engine: FakeEngine) -> Callable[[Talk], Any]:
    """Runs a conversation with a server over `engine`."""

    def run(conversation: Talk) -> Any:
        async def main() -> Any:
            async with serve(engine) as http:
                return await conversation(http)

        return asyncio.run(main())

    return run


@pytest.fixture
def post(talk: Any) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    def run(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async def conversation(http: httpx.AsyncClient) -> dict[str, Any]:
            response = await http.post(path, json=body)
            assert response.status_code == 200, response.text
            if not body.get("stream"):
                return response.json()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.text.split("\n\n") if line]
            assert all(line.startswith("data: ") for line in lines)
            assert lines[-1] == "data: [DONE]"
            return {"chunks": [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]}

        return talk(conversation)

    return run


def test_health_and_models(talk: Any):
    async def conversation(http: httpx.AsyncClient) -> None:
        assert (await http.get("/health")).json() == {"status": "ok"}
        (model,) = (await http.get("/v1/models")).json()["data"]
        assert model["id"] == "fake" and model["max_model_len"] == 256
        assert (await http.get("/v1/models/fake")).json() == model
        missing = await http.get("/v1/models/other/name")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"

    talk(conversation)


def test_chat_answers_with_text_and_usage(post: Any, engine: FakeEngine):
    body = {"model": "fake", "messages": USER}
    response = post(CHAT, body)
    (choice,) = response["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    num_prompt = len(engine.added[0].prompt_ids)
    assert response["usage"]["prompt_tokens"] == num_prompt
    total = num_prompt + response["usage"]["completion_tokens"]
    assert response["usage"]["total_tokens"] == total
    assert engine.tokenizer.decode(engine.added[0].prompt_ids, False).endswith("<|assistant|>")


def test_cached_prompt_tokens_are_reported(talk: Any):
    async def conversation(http: httpx.AsyncClient) -> list[int]:
        details = []
        for _ in range(2):
            response = await http.post(CHAT, json={"messages": USER})
            details.append(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        return details

    first, second = talk(conversation)
    assert first == 0 and second > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_says_which_tier_cached_tokens_came_from(
    post: Any, engine: FakeEngine, path: str, stream: bool
):
    decision = LoadDecision("recompute", 3, 0, math.inf, 0.25)
    engine.reuse = PromptReuse({"device": 16, "disk": 32}, decision)
    body: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": ["Hello", "world"]}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    response = post(path, body)
    usage = response["chunks"][-1]["usage"] if stream else response["usage"]
    details, num_prompts = usage["prompt_tokens_details"], 1 if path == CHAT else 2
    assert details["cached_tokens_by_source"] == {
        "device": 16 * num_prompts,
        "disk": 32 * num_prompts,
    }
    told = {"choice": "recompute", "num_blocks": 3, "num_loaded": 0}
    assert details["load_decisions"] == [{**told, "load_s": None, "compute_s": 0.25}] * num_prompts


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_can_ask_that_nothing_is_kept_of_its_request(
    post: Any, engine: FakeEngine, path: str
):
    body: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "Hello"}
    post(path, body)
    post(path, {**body, "cache_no_store": True})
    assert [request.no_store for request in engine.added] == [False, True]


def test_a_chat_stream_has_role_text_finish_and_usage(post: Any):
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    chunks = post(CHAT, body)["chunks"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == REPLY
    assert [c["choices"][0]["finish_reason"] for c in chunks[-3:-1]] == [None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 10
    assert "usage" not in post(CHAT, {"messages": USER, "stream": True})["chunks"][0]


def test_n_streams_are_told_apart_by_index(post: Any):
    chunks = post(CHAT, {"messages": USER, "stream": True, "n": 3, "seed": 4})["chunks"]
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: REPLY, 1: REPLY, 2: REPLY}


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_text_bytes_and_alternatives(post: Any, stream: bool):
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    response = post(CHAT, {**body, "stream": stream})
    if stream:
        chosen = [chunk["choices"][0]["logprobs"] for chunk in response["chunks"]]
        entries = [entry for logprobs in chosen if logprobs for entry in logprobs["content"]]
    else:
        entries = response["choices"][0]["logprobs"]["content"]
    assert len(entries) == 4
    assert entries[0]["logprob"] == -0.5 and len(entries[0]["top_logprobs"]) == 2
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]


def test_no_alternatives_need_no_logprobs(post: Any):
    response = post(CHAT, {"messages": USER, "logprobs": False, "top_logprobs": 0})
    assert response["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_work(post: Any, engine: FakeEngine, stream: bool):
    engine.step_s, engine.max_model_len = 0.002, 5000
    engine.reply = lambda request: engine.tokenizer.encode(REPLY) * 50
    body = {"messages": USER, "stop": "story", "stream": stream}
    response = post(CHAT, body)
    if stream:
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in response["chunks"])
        last = response["chunks"][-1]["choices"][0]
    else:
        (last,) = response["choices"]
        text = last["message"]["content"]
    assert text == REPLY.split("story")[0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "story")
    assert engine.aborted and not engine.has_work


def test_sampling_fields_reach_the_engine_under_vllms_names(post: Any, engine: FakeEngine):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "allowed_token_ids": [5, 6, 7],
        "banned_token_ids": [6],
        "logit_bias": {"7": 1.5},
        "include_stop_str_in_output": True,
        "prompt_logprobs": 1,
    }
    extra = {"cache_salt": "tenant", "priority": 3, "max_completion_tokens": 4, "max_tokens": 9}
    response = post(CHAT, {"messages": USER, **fields, **extra, "some_new_field": {"x": 1}})
    (request,) = engine.added
    expected = {
        **fields,
        "stop_token_ids": (5,),
        "allowed_token_ids": (5, 6, 7),
        "banned_token_ids": (6,),
        "logit_bias": {7: 1.5},
        "max_tokens": 4,
    }
    for name, value in expected.items():
        assert getattr(request.sampling, name) == value, name
    assert (request.cache_salt, request.priority) == ("tenant", 3)
    assert response["prompt_logprobs"][0] is None


def test_nulls_mean_the_default(post: Any, engine: FakeEngine):
    names = ("temperature", "n", "stop", "max_tokens", "logit_bias", "stream", "seed", "tools")
    post(CHAT, {"messages": USER, **dict.fromkeys(names)})
    assert engine.added[0].sampling.temperature == 1.0


def test_the_checkpoints_recommendation_is_the_default(post: Any, engine: FakeEngine):
    engine.tokenizer.generation_config = {"temperature": 0.25, "top_k": 7}
    post(CHAT, {"messages": USER, "top_k": 3})
    sampling = engine.added[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.25, 3)


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [40, 41], [[40, 41]]])
def test_a_prompt_may_have_any_form(post: Any, prompt: Any):
    response = post(COMPLETIONS, {"prompt": prompt, "max_tokens": 100})
    assert [choice["text"] for choice in response["choices"]] == [REPLY]


def test_several_prompts_with_n_are_numbered_prompt_by_prompt(post: Any, engine: FakeEngine):
    def reply(request: Request) -> list[int]:
        return list(request.prompt_ids)

    engine.reply = reply
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 10, "seed": 0}
    response = post(COMPLETIONS, body)
    assert [c["text"] for c in response["choices"]] == ["one", "one", "two", "two"]
    assert [c["index"] for c in response["choices"]] == [0, 1, 2, 3]
    num_prompt = sum(len(engine.tokenizer.encode(text)) for text in ("one", "two"))
    assert response["usage"]["prompt_tokens"] == num_prompt


def test_completions_default_to_16_tokens(post: Any):
    response = post(COMPLETIONS, {"prompt": "Hello"})
    assert response["usage"]["completion_tokens"] == 16
    assert response["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hello world", [40, 41, 42]])
def test_echo_with_logprobs_covers_prompt_and_answer(
    post: Any, engine: FakeEngine, prompt: Any, stream: bool
):
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 5, "stream": stream}
    response = post(COMPLETIONS, body)
    choices = [c["choices"][0] for c in response["chunks"]] if stream else response["choices"]
    text = "".join(choice["text"] for choice in choices)
    joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for choice in choices:
        for name, values in joined.items():
            values += choice["logprobs"][name]
    prompt_ids = engine.added[0].prompt_ids
    assert text.startswith(engine.tokenizer.decode(prompt_ids, False))
    assert len(joined["tokens"]) == len(prompt_ids) + 5
    assert joined["token_logprobs"][0] is None and joined["token_logprobs"][1] == -0.5
    assert "".join(joined["tokens"]).startswith(text)
    assert joined["text_offset"][1] == len(joined["tokens"][0])


def test_echo_with_no_tokens_scores_the_prompt_only(post: Any):
    body = {"prompt": "Hello world", "echo": True, "logprobs": 0, "max_tokens": 0}
    response = post(COMPLETIONS, body)
    (choice,) = response["choices"]
    assert choice["text"] == "Hello world" and choice["finish_reason"] == "length"
    assert "".join(choice["logprobs"]["tokens"]) == "Hello world"
    assert response["usage"]["completion_tokens"] == 0


def test_a_completion_stream_joins_to_the_text(post: Any):
    body = {"prompt": ["a", "b"], "max_tokens": 100, "stream": True}
    texts = ["", ""]
    for chunk in post(COMPLETIONS, body)["chunks"]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [REPLY, REPLY]


def test_a_long_prompt_is_tokenised_beside_the_event_loop(post: Any, engine: FakeEngine):
    engine.max_model_len = 100_000
    post(COMPLETIONS, {"prompt": "Hello " * 3000, "max_tokens": 1})
    assert len(engine.added[0].prompt_ids) > 3000


def test_every_response_has_a_request_id_of_its_own(talk: Any):
    async def conversation(http: httpx.AsyncClient) -> set[str]:
        return {(await http.get("/health")).headers["x-request-id"] for _ in range(3)}

    assert len(talk(conversation)) == 3


def test_token_ids_come_back_on_request(post: Any, engine: FakeEngine):
    body = {"prompt": "Hello", "max_tokens": 3, "return_token_ids": True}
    (choice,) = post(COMPLETIONS, body)["choices"]
    assert choice["prompt_token_ids"] == list(engine.added[0].prompt_ids)
    assert choice["token_ids"] == engine.tokenizer.encode(REPLY)[:3]
    streamed = post(COMPLETIONS, {**body, "stream": True})["chunks"]
    assert [i for c in streamed for i in c["choices"][0]["token_ids"]] == choice["token_ids"]
    chat = {"messages": USER, "max_tokens": 3, "return_token_ids": True}
    whole = post(CHAT, chat)
    assert whole["choices"][0]["token_ids"] == choice["token_ids"]
    chunks = post(CHAT, {**chat, "stream": True})["chunks"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    told = [i for c in chunks for i in c["choices"][0].get("token_ids", [])]
    assert told == choice["token_ids"]


def test_tokens_can_be_named_by_their_ids(post: Any, engine: FakeEngine):
    body = {"prompt": "Hello", "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = post(COMPLETIONS, {**body, "echo": True})["choices"][0]["logprobs"]
    ids = [*engine.added[0].prompt_ids, *engine.tokenizer.encode(REPLY)[:2]]
    assert logprobs["tokens"] == [f"token_id:{i}" for i in ids]
    assert logprobs["text_offset"][-1] < len("Hello" + REPLY)
    chat = {"messages": USER, "max_tokens": 1, "logprobs": True, "return_tokens_as_token_ids": True}
    (entry,) = post(CHAT, chat)["choices"][0]["logprobs"]["content"]
    assert entry["token"] == f"token_id:{ids[-2]}"


def test_every_chunk_can_say_how_much_was_used(post: Any, engine: FakeEngine):
    engine.step_s = 0.01
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 4, "stream": True, "stream_options": options}
    for path, prompt in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "Hello"})):
        chunks = post(path, {**prompt, **body})["chunks"]
        counts = [c["usage"]["completion_tokens"] for c in chunks if c["usage"]]
        # Steps that come while the loop is busy make one chunk.
        assert counts == sorted(counts) and counts[-1] == 4 and len(counts) >= 2


def test_an_answer_that_was_begun_is_continued(post: Any, engine: FakeEngine):
    messages = [*USER, {"role": "assistant", "content": "Hello wor"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    response = post(CHAT, {**body, "echo": True})
    prompt = engine.tokenizer.decode(engine.added[0].prompt_ids, False)
    assert prompt.endswith("<|assistant|>Hello wor")
    assert response["choices"][0]["message"]["content"].startswith("Hello worHello world")
    chunks = post(CHAT, {**body, "echo": True, "stream": True})["chunks"]
    assert chunks[0]["choices"][0]["delta"]["content"] == "Hello wor"


def test_messages_of_every_kind_of_client_reach_the_template(post: Any, engine: FakeEngine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}], "name": "me"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]},
        {"role": "user", "content": "Hello"},
    ]
    post(CHAT, {"messages": messages})
    prompt = engine.tokenizer.decode(engine.added[0].prompt_ids, False)
    assert prompt.startswith("<|begin|><|system|>Be brief.<|end|><|user|>One<|end|>")
    assert "<|assistant|><|end|><|assistant|>No<|end|>" in prompt


def test_fields_of_many_clients_are_accepted_and_unknown_ones_logged_once(
    talk: Any, caplog: pytest.LogCaptureFixture
):
    body = {
        "messages": USER,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "none",
        "logit_bias": {"40": -5},
        "prompt_cache_key": "k",
        "reasoning_effort": "low",
        "verbosity": "low",
        "a_new_field": 1,
        "max_completion_tokens": 5,
        "stop": None,
        "seed": None,
        "n": 1,
    }

    async def conversation(http: httpx.AsyncClient) -> None:
        for _ in range(3):
            response = await http.post(CHAT, json=body)
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == 5

    with caplog.at_level("INFO", logger="jaxserve.server.openai"):
        talk(conversation)
    told = [record.message for record in caplog.records if "has no effect" in record.message]
    assert len(told) == 1 and "'a_new_field'" in told[0]


def test_bad_words_reach_the_engine_as_tokens_with_and_without_a_blank(
    post: Any, engine: FakeEngine
):
    for path, prompt in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "Hello"})):
        post(path, {**prompt, "bad_words": ["story", " owl"]})
        texts = [
            engine.tokenizer.decode(ids) for ids in engine.added[-1].sampling.bad_token_sequences
        ]
        assert texts == ["story", " story", "owl", " owl"]
