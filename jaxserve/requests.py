"""From a prompt and sampling parameters to the Requests an engine takes, within all bounds.

`make_requests` is what `llm` and the server share, so both refuse the same things in the same
words. Parameters are named in errors as the caller spells them. Knows nothing of the engine.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.sampling_bounds import (
    FLOATS,
    INTS,
    Bound,
    Limits,
    check_int,
    check_sampling,
    check_token_ids,
    show,
)
from jaxserve.structured import grammar_of
from jaxserve.types import (
    MAX_BAD_SEQUENCES,
    MAX_BAD_TOKENS,
    POOLINGS,
    Request,
    SamplingParams,
)

MAX_BAD_WORDS = MAX_BAD_SEQUENCES // 2
MAX_CACHE_SALT_CHARS = 128
MAX_PRIORITY = 2**31 - 1
SEED_MODULUS = 2**31

FORBIDDEN_SALT_CHARS = "@/\\\0"

GENERATION_CONFIG_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def make_requests(
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    limits: Limits,
    *,
    draw_seed: Callable[[], int],
    priority: int = 0,
    cache_salt: str = "",
    no_store: bool = False,
    grammar: str = "",
    param: str = "prompt",
) -> list[Request]:
    """One Request for each of the `n` answers, ids `{request_id}-{i}`, seeds `seed + i`.

    Args:
        draw_seed: gives a seed to a request that brings none.
        no_store: keep nothing of it for other requests, in no tier.
        grammar: of the answer, compiled before; default: what `sampling` asks for.
        param: what errors call the prompt.

    Raises:
        RequestError: anything out of bounds, naming the parameter.
    """
    ids = check_token_ids(prompt_ids, param, limits.vocab_size)
    if not ids:
        raise RequestError(f"{param} is empty; expected at least one token", param=param)
    sampling = check_sampling(sampling, limits)
    max_tokens = _fit_context(len(ids), sampling.max_tokens, limits.max_model_len, param)
    if sampling.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {sampling.min_tokens}, more than the {max_tokens} tokens that can be "
            "generated (max_tokens, or what the context leaves)",
            param="min_tokens",
        )
    check_int("priority", priority, Bound(-MAX_PRIORITY, MAX_PRIORITY))
    _check_salt(cache_salt)
    if not isinstance(no_store, bool):
        raise RequestError(
            f"no_store is {show(no_store)}; expected true or false", param="no_store"
        )
    if sampling.structured_outputs is not None and not grammar:
        grammar = grammar_of(sampling.structured_outputs)
    seed = draw_seed() if sampling.seed is None else sampling.seed
    arrival_s = time.monotonic()
    return [
        Request(
            request_id=f"{request_id}-{i}",
            prompt_ids=ids,
            sampling=replace(sampling, n=1, max_tokens=max_tokens, seed=(seed + i) % SEED_MODULUS),
            eos_token_ids=limits.eos_token_ids,
            priority=priority,
            arrival_s=arrival_s,
            cache_salt=cache_salt,
            no_store=no_store,
            grammar=grammar,
        )
        for i in range(sampling.n)
    ]


def make_pooling_request(
    request_id: str,
    prompt_ids: Sequence[int],
    limits: Limits,
    *,
    pooling: str = "last",
    priority: int = 0,
    cache_salt: str = "",
    no_store: bool = False,
    param: str = "prompt",
) -> Request:
    """A Request that ends after its prompt, with its pooled hidden state.

    Args:
        pooling: one of POOLINGS.
        param: what errors call the prompt.

    Raises:
        RequestError: anything out of bounds, naming the parameter.
    """
    if pooling not in POOLINGS:
        raise RequestError(
            f"pooling is {show(pooling)}; expected one of {', '.join(POOLINGS)}", param="pooling"
        )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
    (request,) = make_requests(
        request_id,
        prompt_ids,
        sampling,
        limits,
        draw_seed=lambda: 0,
        priority=priority,
        cache_salt=cache_salt,
        no_store=no_store,
        param=param,
    )
    return replace(request, pooling=pooling)


def check_dimensions(dimensions: int | None, limits: Limits) -> int | None:
    """How many numbers of an embedding to keep; None keeps all.

    Raises:
        RequestError: more than there are, or no positive number.
    """
    if dimensions is None:
        return None
    return check_int("dimensions", dimensions, Bound(1, limits.hidden_size or 2**31 - 1))


def without_bad_words(
    sampling: SamplingParams, encode: Callable[[str], list[int]]
) -> SamplingParams:
    """The same parameters, with bad words as sequences of token ids.

    As in vLLM, a word is bad at the start of a text and after a blank.

    Args:
        encode: gives the token ids of a text, special tokens not included.

    Raises:
        RequestError: no list of texts, too many, or one of too many tokens.
    """
    words = sampling.bad_words
    if not words and isinstance(words, (tuple, list)):
        return sampling
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise RequestError(f"bad_words is {show(words)}; expected texts", param="bad_words")
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words has {len(words)} texts; expected at most {MAX_BAD_WORDS}", param="bad_words"
        )
    sequences: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise RequestError(
                f"bad_words.{i} is {show(word)}; expected a text", param=f"bad_words.{i}"
            )
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(encode(text))
            if not 1 <= len(ids) <= MAX_BAD_TOKENS:
                raise RequestError(
                    f"bad_words.{i} has {len(ids)} tokens; expected at most {MAX_BAD_TOKENS}",
                    param=f"bad_words.{i}",
                )
            sequences[ids] = None
    given = tuple(sampling.bad_token_sequences)
    return replace(sampling, bad_words=(), bad_token_sequences=(*given, *sequences))


class DrawSeed:
    """Seeds for requests that bring none; a function of the first seed and the order of calls."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def __call__(self) -> int:
        return self._random.randrange(SEED_MODULUS)


def default_sampling(generation_config: Mapping[str, Any], **changes: Any) -> SamplingParams:
    """SamplingParams with what a checkpoint's generation_config.json recommends, then `changes`.

    Values there that are null, of another type or out of bounds are not taken.
    """
    values: dict[str, Any] = {}
    for name in GENERATION_CONFIG_FIELDS:
        value = generation_config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if (FLOATS.get(name) or INTS[name]).holds(value):
            values[name] = int(value) if name in INTS else float(value)
    return SamplingParams(**(values | changes))


SAMPLING_FIELDS = tuple(spec.name for spec in fields(SamplingParams))


def _fit_context(num_prompt: int, max_tokens: int | None, max_model_len: int, param: str) -> int:
    """How many tokens may be generated; says by how much a prompt does not fit."""
    room = max_model_len - num_prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {num_prompt} tokens; this model's context holds {max_model_len}, one "
            f"of which must be left for the answer: shorten the prompt by {1 - room} tokens",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
            f"{num_prompt + max_tokens}; this model's context holds {max_model_len}: shorten the "
            f"prompt or lower max_tokens by {max_tokens - room} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max_tokens


def _check_salt(cache_salt: Any) -> None:
    if (
        not isinstance(cache_salt, str)
        or len(cache_salt) > MAX_CACHE_SALT_CHARS
        or any(char in FORBIDDEN_SALT_CHARS for char in cache_salt)
        or not cache_salt.isprintable()
    ):
        raise RequestError(
            f"cache_salt is {show(cache_salt)}; expected at most {MAX_CACHE_SALT_CHARS} printable "
            "characters without '@', '/' or '\\'",
            param="cache_salt",
        )
