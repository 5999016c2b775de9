"""/v1/embeddings, /tokenize and what load balancers ask, in process."""

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fake_engine import HIDDEN_SIZE, FakeEngine, pooled

EMBEDDINGS = "/v1/embeddings"


def ask(serve: Any, engine: FakeEngine, method: str, path: str, body: Any = None) -> httpx.Response:
    async def main() -> httpx.Response:
        async with serve(engine) as http:
            return await http.request(method, path, json=body)

    return asyncio.run(main())


@pytest.fixture
def post(serve: Any, engine: FakeEngine) -> Any:
    def run(path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        response = ask(serve, engine, "POST", path, body)
        assert response.status_code == status, response.text
        return response.json()

    return run


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("given", ["Hello", ["Hello", "world"], [40, 41, 42], [[40, 41], [50]]])
def test_every_input_gets_its_embedding_in_order(post: Any, engine: FakeEngine, given: Any):
    response = post(EMBEDDINGS, {"model": "fake", "input": given, "user": "me"})
    prompts = [request.prompt_ids for request in engine.added]
    assert len(prompts) == (2 if isinstance(given[0], (str, list)) and len(given) == 2 else 1)
    assert [entry["index"] for entry in response["data"]] == list(range(len(prompts)))
    for entry, ids in zip(response["data"], prompts, strict=True):
        assert entry["object"] == "embedding"
        assert np.allclose(entry["embedding"], unit(pooled(ids, "last")), atol=1e-6)
    num_tokens = sum(map(len, prompts))
    assert response["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_base64_holds_the_same_numbers(post: Any):
    floats = post(EMBEDDINGS, {"input": "Hello"})["data"][0]["embedding"]
    text = post(EMBEDDINGS, {"input": "Hello", "encoding_format": "base64"})["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == floats


def test_pooling_scaling_and_dimensions_can_be_chosen(post: Any, engine: FakeEngine):
    body = {"input": [40, 41], "pooling": "mean", "normalize": False}
    vector = post(EMBEDDINGS, body)["data"][0]["embedding"]
    assert np.allclose(vector, pooled([40, 41], "mean"), atol=1e-6)
    few = post(EMBEDDINGS, {"input": [40, 41], "dimensions": 3})["data"][0]["embedding"]
    assert np.allclose(few, unit(pooled([40, 41], "last")[:3]), atol=1e-6)


def test_more_inputs_than_the_queue_holds_at_once_are_served(post: Any, engine: FakeEngine):
    response = post(EMBEDDINGS, {"input": [[40 + i % 9] for i in range(2000)]})
    assert len(response["data"]) == 2000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 5]}, "input.1"),
        ({"input": [[40], [10**6]]}, "input.1.0"),
        ({"input": [[40]] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": [40] * 300}, "input"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(post: Any, body: Any, param: str):
    error = post(EMBEDDINGS, body, 400)["error"]
    assert error["param"] == param and len(error["message"]) < 400


def test_a_text_can_be_cut_to_its_last_tokens(post: Any, engine: FakeEngine):
    post(EMBEDDINGS, {"input": [list(range(40, 60))], "truncate_prompt_tokens": 5})
    post("/v1/completions", {"prompt": [40] * 500, "truncate_prompt_tokens": -1, "max_tokens": 1})
    assert engine.added[0].prompt_ids == (55, 56, 57, 58, 59)
    assert len(engine.added[1].prompt_ids) == 255
    assert post("/v1/completions", {"prompt": "a", "truncate_prompt_tokens": 0}, 400)


def test_tokenize_and_detokenize_are_inverse(post: Any, engine: FakeEngine):
    told = post("/tokenize", {"prompt": "Hello world", "return_token_strs": True})
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 256 and "Hello" in told["token_strs"]
    assert post("/detokenize", {"tokens": told["tokens"]}) == {"prompt": "Hello world"}


def test_tokenize_gives_the_ids_that_chat_would_see(post: Any, engine: FakeEngine):
    messages = [{"role": "user", "content": "Hello"}]
    told = post("/tokenize", {"model": "fake", "messages": messages})
    post("/v1/chat/completions", {"messages": messages})
    assert tuple(told["tokens"]) == engine.added[0].prompt_ids and told["token_strs"] is None
    assert post("/tokenize", {"messages": messages, "prompt": "a"}, 400)["error"]["param"]
    assert post("/tokenize", {}, 400)
    assert post("/detokenize", {"tokens": [-1]}, 400)["error"]["param"] == "tokens.0"


def test_who_renders_chats_itself_gets_the_template_and_special_tokens(serve: Any, engine: Any):
    info = ask(serve, engine, "GET", "/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>" and info["pad_token"] is None
    assert "message['role']" in info["chat_template"] and info["model_max_length"] == 256


def test_load_balancers_get_their_answers(serve: Any, engine: FakeEngine):
    for method in ("GET", "POST"):
        assert ask(serve, engine, method, "/ping").status_code == 200
    assert ask(serve, engine, "GET", "/version").json()["version"]
    assert ask(serve, engine, "GET", "/load").json() == {"server_load": 0}
