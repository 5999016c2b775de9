import math
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.requests import DrawSeed, default_sampling, make_requests
from jaxserve.sampling_bounds import Limits
from jaxserve.types import Request, SamplingParams

LIMITS = Limits(max_model_len=100, vocab_size=50, eos_token_ids=(1, 2))


def make(prompt: Any = (3, 4, 5), **sampling: Any) -> list[Request]:
    extra = {k: sampling.pop(k) for k in ("priority", "cache_salt", "no_store") if k in sampling}
    return make_requests(
        "id", prompt, SamplingParams(**sampling), LIMITS, draw_seed=DrawSeed(0), **extra
    )


def test_n_answers_become_n_requests_with_their_own_ids_and_seeds():
    requests = make(n=3, seed=7)
    assert [r.request_id for r in requests] == ["id-0", "id-1", "id-2"]
    assert [r.sampling.seed for r in requests] == [7, 8, 9]
    assert all(r.sampling.n == 1 and r.eos_token_ids == (1, 2) for r in requests)


def test_no_max_tokens_means_what_the_context_holds():
    assert make(max_tokens=None)[0].sampling.max_tokens == 97


def test_no_seed_draws_one_that_depends_on_the_first_seed_only():
    draws = [DrawSeed(5), DrawSeed(5), DrawSeed(6)]
    first = [[draw() for _ in range(4)] for draw in draws]
    assert first[0] == first[1] != first[2]
    assert isinstance(make()[0].sampling.seed, int)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_any_64_bit_seed_becomes_a_non_negative_31_bit_one(seed: int):
    for request in make(seed=seed, n=2):
        assert request.sampling.seed is not None and 0 <= request.sampling.seed < 2**31


def test_numpy_numbers_are_as_good_as_pythons():
    request = make(np.arange(3, 6), top_k=np.int32(4), temperature=np.float32(0.5))[0]
    assert request.prompt_ids == (3, 4, 5) and type(request.prompt_ids[0]) is int
    assert type(request.sampling.top_k) is int and type(request.sampling.temperature) is float


BAD = [
    ("temperature", -0.1),
    ("temperature", 101),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", True),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", True),
    ("min_p", -0.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 11),
    ("n", 0),
    ("n", 129),
    ("n", 10**5000),
    ("seed", 2**63),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", 21),
    ("logprobs", -1),
    ("prompt_logprobs", 21),
    ("ignore_eos", 1),
    ("stop", ("a",) * 17),
    ("stop", ("",)),
    ("stop", ("x" * 1025,)),
    ("stop", 5),
    ("stop_token_ids", (50,)),
    ("stop_token_ids", tuple(range(3, 18))),
    ("logit_bias", {50: 1.0}),
    ("logit_bias", {3: math.nan}),
    ("logit_bias", {3: 101}),
    ("logit_bias", {i: 0.0 for i in range(301)}),
    ("allowed_token_ids", ()),
    ("allowed_token_ids", (-1,)),
    ("banned_token_ids", (True,)),
    ("bad_words", ("a",)),
    ("bad_token_sequences", ((50,),)),
    ("bad_token_sequences", ((),)),
    ("bad_token_sequences", ((3,) * 9,)),
    ("bad_token_sequences", ((3,),) * 257),
    ("bad_token_sequences", "ab"),
    ("priority", 2**31),
    ("cache_salt", "a/b"),
    ("cache_salt", "x" * 129),
    ("cache_salt", "\ud800"),
    ("cache_salt", 3),
    ("no_store", "yes"),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: type(value).__name__)
def test_a_value_out_of_bounds_names_the_parameter_shortly(name: str, value: Any):
    with pytest.raises(RequestError) as caught:
        make(**{name: value})
    assert caught.value.param is not None and caught.value.param.split(".")[0] == name
    assert len(str(caught.value)) < 300


GOOD: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 100, "top_p": 1, "top_k": -1, "min_p": 1},
    {"stop": "one text"},
    {"stop": ["a", "b"], "stop_token_ids": [3, 4]},
    {"logit_bias": {49: -100, 0: 100}},
    {"allowed_token_ids": [3], "banned_token_ids": [4]},
    {"min_tokens": 16},
    {"priority": -5, "cache_salt": "tenant-1"},
]


@pytest.mark.parametrize("sampling", GOOD, ids=repr)
def test_values_at_the_bounds_are_taken(sampling: dict[str, Any]):
    request = make(**sampling)[0]
    assert isinstance(request.sampling.stop, tuple)
    hash(request.prompt_ids)


@pytest.mark.parametrize("prompt", [(), (50,), (-1,), (True, 3), (1.0,), "text", None, ("a",)])
def test_a_bad_prompt_is_refused(prompt: Any):
    with pytest.raises(RequestError, match="prompt"):
        make(prompt)


def test_a_prompt_too_long_says_by_how_much():
    with pytest.raises(RequestError, match="shorten the prompt by 1 tokens") as caught:
        make([3] * 100)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="lower max_tokens by 6 tokens"):
        make([3] * 90)
    assert make([3] * 84)[0].sampling.max_tokens == 16


def test_all_tokens_banned_or_not_allowed_is_refused():
    with pytest.raises(RequestError, match="leaves no token"):
        make(allowed_token_ids=(3, 4), banned_token_ids=(3, 4, 5))


def test_recommendations_of_a_checkpoint_are_taken_where_they_make_sense():
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": None, "min_p": 7, "do_sample": True}
    sampling = default_sampling(recommended, max_tokens=5)
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.6, 20, 5)
    assert (sampling.top_p, sampling.min_p) == (1.0, 0.0)


def test_min_tokens_with_nothing_allowed_but_ends_is_refused():
    with pytest.raises(RequestError, match="leaves only tokens that end the answer"):
        make(allowed_token_ids=(3, 4), stop_token_ids=(3, 4), min_tokens=1)
    make(allowed_token_ids=(3, 4), stop_token_ids=(3,), min_tokens=1)
    make(allowed_token_ids=(3, 4), stop_token_ids=(3, 4), min_tokens=0)
