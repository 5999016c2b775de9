import json
from collections.abc import Sequence

import httpx
import pytest

from jaxserve.embedded.retrieval import heldout_prompts
from jaxserve.errors import JaxserveError
from jaxserve.evals import retrieval
from jaxserve.evals.endpoint import Endpoint
from tests.fake_engine import make_tokenizer

COUNT = retrieval.counter(make_tokenizer())


class Oracle:
    """Knows the answers to all prompts of some kinds."""

    model_name = "oracle"

    def __init__(self, kinds: set[str], num_prompts: int):
        prompts = heldout_prompts(COUNT, num_prompts)
        self._answers = {
            prompt.messages[-1]["content"]: prompt.answer if prompt.kind in kinds else "?"
            for prompt in prompts
        }

    def __call__(self, chats: Sequence[list[dict[str, str]]], max_tokens: int) -> list[str]:
        return [self._answers[chat[-1]["content"]] for chat in chats]


def test_accuracy_is_counted_in_all_by_length_and_by_kind():
    kinds = {prompt.kind for prompt in heldout_prompts(COUNT, 40)}
    known = set(sorted(kinds)[:2])
    report = retrieval.run(Oracle(known, 40), COUNT, 40)
    assert set(report.by_kind) == kinds
    for kind, tally in report.by_kind.items():
        assert tally.accuracy == (1.0 if kind in known else 0.0)
    assert sum(tally.num_prompts for tally in report.by_length.values()) == 40
    assert sum(tally.num_right for tally in report.by_length.values()) == report.total.num_right
    assert json.loads(report.json_line())["accuracy"] == round(report.total.accuracy, 4)
    assert f"{report.total.num_right} of 40" in report.table().split("\n")[-1]


def answer(request: httpx.Request) -> httpx.Response:
    assert request.headers["authorization"] == "Bearer key"
    if request.method == "GET":
        return httpx.Response(200, json={"data": [{"id": "some-model"}]})
    body = json.loads(request.content)
    assert body["temperature"] == 0 and body["model"] == "some-model"
    content = body["messages"][-1]["content"].upper()
    return httpx.Response(200, json={"choices": [{"message": {"content": content}}]})


def test_an_endpoint_answers_in_the_order_of_the_questions():
    endpoint = Endpoint("http://test/v1/", "key", httpx.MockTransport(answer))
    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(40)]
    assert endpoint(chats, 5) == [f"QUESTION {i}" for i in range(40)]


def test_an_endpoint_that_refuses_is_told_in_one_line():
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={"error": {"message": "no key"}})

    with pytest.raises(JaxserveError, match=r"HTTP 401.*no key"):
        Endpoint("http://test/v1", None, httpx.MockTransport(refuse))


def test_an_endpoint_that_is_not_there_is_told_in_one_line():
    with pytest.raises(JaxserveError, match="127.0.0.1:9"):
        Endpoint("http://127.0.0.1:9/v1")
