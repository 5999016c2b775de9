"""The requests of lm_eval, LangChain, LiteLLM and others, as they send them, and what they read.

`make lm-eval` runs lm_eval itself; here its requests are sent without it.
"""

import asyncio
from operator import itemgetter
from typing import Any

import pytest

from tests.fake_engine import REPLY, FakeEngine


@pytest.fixture
def post(serve: Any, engine: FakeEngine) -> Any:
    def run(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            async with serve(engine) as http:
                response = await http.post(path, json=body)
                assert response.status_code == 200, response.text
                return response.json()

        return asyncio.run(main())

    return run


def test_lm_eval_scores_continuations_by_token_ids(post: Any, engine: FakeEngine):
    """lm_eval's local-completions: token ids in, log-probabilities of the prompt's end out."""
    prompts, context_lengths = [[40, 41, 42, 43], [50, 51, 52]], [2, 1]
    body = {
        "model": "fake",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = sorted(post("/v1/completions", body)["choices"], key=itemgetter("index"))
    for choice, ids, context in zip(choices, prompts, context_lengths, strict=True):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        scores = found["token_logprobs"][context:-1]
        assert scores == [-0.5] * (len(ids) - context)
        for token, score, top in zip(
            found["tokens"][context:-1], scores, found["top_logprobs"][context:-1], strict=True
        ):
            assert max(top.values()) == score and top[token] == score


def test_lm_eval_generates_from_texts_token_ids_and_chats(post: Any, engine: FakeEngine):
    common = {"model": "fake", "max_tokens": 32, "temperature": 0, "seed": 1234}
    raw = {**common, "prompt": ["Hello"], "stop": ["story", "<|end|>"]}
    for prompt in (["Hello"], [[40, 41]]):
        (choice,) = post("/v1/completions", {**raw, "prompt": prompt})["choices"]
        assert choice["text"] == "Hello world, a " and choice["index"] == 0
    messages = [{"role": "user", "content": "Hello", "type": "text"}]
    chat = post("/v1/chat/completions", {**common, "messages": messages, "stop": ["story"]})
    assert chat["choices"][0]["message"]["content"] == "Hello world, a "


CHATS: dict[str, dict[str, Any]] = {
    "langchain": {
        "model": "fake",
        "messages": [
            {"content": "Be brief.", "role": "system"},
            {"content": "Hello", "role": "user"},
        ],
        "stream": False,
        "temperature": 0.7,
        "n": 1,
        "parallel_tool_calls": None,
    },
    "litellm": {
        "model": "fake",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "max_tokens": 200,
        "user": "u",
        "extra_body": {},
        "metadata": {"trace": "1"},
    },
    "open webui": {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": False,
        "max_tokens": 100,
        "features": {},
        "chat_id": "local",
        "session_id": "s",
        "background_tasks": {},
    },
    "vercel ai sdk": {
        "model": "fake",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": "", "tool_calls": None},
            {"role": "user", "content": "Go on"},
        ],
        "temperature": 0,
        "tool_choice": "none",
    },
    "continue": {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4096 - 4000,
        "temperature": None,
        "top_p": None,
        "frequency_penalty": None,
        "presence_penalty": None,
        "stop": [],
        "stream": False,
    },
    "aider": {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "stream": False,
        "num_ctx": 8192,
        "cache_control": {"type": "ephemeral"},
    },
}


@pytest.mark.parametrize("client", CHATS)
def test_chats_are_answered_as_each_client_sends_them(post: Any, client: str):
    answer = post("/v1/chat/completions", CHATS[client])
    assert answer["choices"][0]["message"]["content"] == REPLY


def test_completions_are_answered_as_langchain_sends_them(post: Any):
    body = {
        "model": "fake",
        "prompt": ["Hello"],
        "max_tokens": 256 - 100,
        "temperature": 0.7,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "n": 1,
        "best_of": 1,
        "logit_bias": {},
        "suffix": None,
        "user": None,
    }
    assert post("/v1/completions", body)["choices"][0]["text"] == REPLY
