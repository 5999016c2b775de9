"""Bounds of what a request may ask of sampling: every parameter, checked and of the right type.

Parameters are named in errors as the caller spells them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.types import (
    MAX_BAD_SEQUENCES,
    MAX_BAD_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    StructuredOutputsParams,
)

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_SEED = 2**63


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can take.

    Attributes:
        max_model_len: longest prompt plus answer, in tokens.
        vocab_size: token ids are below this.
        eos_token_ids: the model's end-of-sequence ids.
        hidden_size: numbers in an embedding; None: not known.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    hidden_size: int | None = None


@dataclass(frozen=True, slots=True)
class Bound:
    """A number's range; the low end is exclusive if `open_low`."""

    low: float
    high: float
    open_low: bool = False

    def __str__(self) -> str:
        left = "above" if self.open_low else "from"
        return f"{left} {self.low:g} to {self.high:g}"

    def holds(self, value: float) -> bool:
        return value <= self.high and (value > self.low if self.open_low else value >= self.low)


FLOATS = {
    "temperature": Bound(0, 100),
    "top_p": Bound(0, 1, open_low=True),
    "min_p": Bound(0, 1),
    "presence_penalty": Bound(-2, 2),
    "frequency_penalty": Bound(-2, 2),
    "repetition_penalty": Bound(0, 10, open_low=True),
}

INTS = {
    "n": Bound(1, MAX_N),
    "top_k": Bound(-1, 2**31 - 1),
    "min_tokens": Bound(0, 2**31 - 1),
    "seed": Bound(-MAX_SEED, MAX_SEED - 1),
    "max_tokens": Bound(1, 2**31 - 1),
    "logprobs": Bound(0, MAX_LOGPROBS),
    "prompt_logprobs": Bound(0, MAX_LOGPROBS),
}

_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "allowed_token_ids")

_BOOLS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "return_logits",
    "return_hidden_states",
    "return_prompt_states",
)


def check_sampling(sampling: SamplingParams, limits: Limits) -> SamplingParams:
    """Check every parameter; return them with sequences as tuples and numbers of the right type.

    Raises:
        RequestError: the first parameter that is out of bounds.
    """
    if not isinstance(sampling, SamplingParams):
        raise RequestError(
            f"expected SamplingParams, not {type(sampling).__name__}", param="sampling_params"
        )
    checked: dict[str, Any] = {}
    for name, bound in FLOATS.items():
        checked[name] = _check_float(name, getattr(sampling, name), bound)
    for name, bound in INTS.items():
        value = getattr(sampling, name)
        checked[name] = (
            None if value is None and name in _OPTIONAL else check_int(name, value, bound)
        )
    for name in _BOOLS:
        if not isinstance(getattr(sampling, name), bool):
            raise RequestError(
                f"{name} is {show(getattr(sampling, name))}; expected true or false", param=name
            )
    if sampling.return_prompt_states and not (
        sampling.return_logits or sampling.return_hidden_states
    ):
        raise RequestError(
            "return_prompt_states needs return_logits or return_hidden_states",
            param="return_prompt_states",
        )
    checked["stop"] = _check_stop(sampling.stop)
    checked["stop_token_ids"] = check_token_ids(
        sampling.stop_token_ids, "stop_token_ids", limits.vocab_size
    )
    num_stop_ids = len(set(checked["stop_token_ids"]) | set(limits.eos_token_ids))
    if num_stop_ids > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids and the model's {len(limits.eos_token_ids)} end-of-sequence ids are "
            f"{num_stop_ids} together; expected at most {MAX_STOP_TOKEN_IDS}",
            param="stop_token_ids",
        )
    if not isinstance(sampling.structured_outputs, (StructuredOutputsParams, type(None))):
        raise RequestError(
            f"structured_outputs is of type {type(sampling.structured_outputs).__name__}; expected "
            "StructuredOutputsParams",
            param="structured_outputs",
        )
    checked["logit_bias"] = _check_logit_bias(sampling.logit_bias, limits.vocab_size)
    checked["banned_token_ids"] = check_token_ids(
        sampling.banned_token_ids, "banned_token_ids", limits.vocab_size
    )
    checked["allowed_token_ids"] = _check_allowed(
        sampling.allowed_token_ids, checked["banned_token_ids"], limits.vocab_size
    )
    checked["bad_token_sequences"] = _check_bad(sampling, limits.vocab_size)
    if checked["allowed_token_ids"] is not None and checked["min_tokens"]:
        ends = {*checked["stop_token_ids"], *(() if sampling.ignore_eos else limits.eos_token_ids)}
        if not set(checked["allowed_token_ids"]) - {*checked["banned_token_ids"], *ends}:
            raise RequestError(
                f"min_tokens is {checked['min_tokens']}, but allowed_token_ids leaves only tokens "
                "that end the answer; allow others, or set min_tokens to 0",
                param="min_tokens",
            )
    return replace(sampling, **checked)


def check_token_ids(token_ids: Any, param: str, vocab_size: int) -> tuple[int, ...]:
    """Token ids as a tuple of ints in [0, vocab_size)."""
    if isinstance(token_ids, (str, bytes, Mapping, set)) or not isinstance(token_ids, Iterable):
        raise RequestError(
            f"{param} is {show(token_ids)}; expected a list of token ids", param=param
        )
    ids = tuple(token_ids)
    if all(type(token_id) is int for token_id in ids):  # the common case, at C speed
        if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
            return ids
    return tuple(
        _check_token_id(token_id, f"{param}.{i}", vocab_size) for i, token_id in enumerate(ids)
    )


def _check_float(param: str, value: Any, bound: Bound) -> float:
    number = _as_number(value)
    if number is None or not math.isfinite(number) or not bound.holds(number):
        raise RequestError(f"{param} is {show(value)}; expected a number {bound}", param=param)
    return float(number)


def check_int(param: str, value: Any, bound: Bound) -> int:
    number = _as_index(value)
    if number is None or not bound.holds(number):
        raise RequestError(f"{param} is {show(value)}; expected an integer {bound}", param=param)
    return number


def _check_token_id(value: Any, param: str, vocab_size: int) -> int:
    token_id = _as_index(value)
    if token_id is None or not 0 <= token_id < vocab_size:
        raise RequestError(
            f"{param} is {show(value)}; expected a token id from 0 to {vocab_size - 1}",
            param=param,
        )
    return token_id


def _check_stop(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise RequestError(f"stop is {show(stop)}; expected a text or a list of them", param="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop has {len(strings)} strings; expected at most {MAX_STOP_STRINGS}", param="stop"
        )
    for i, text in enumerate(strings):
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise RequestError(
                f"stop.{i} has {len(text)} characters; expected 1 to {MAX_STOP_STRING_CHARS}",
                param=f"stop.{i}",
            )
    return tuple(strings)


def _check_logit_bias(logit_bias: Any, vocab_size: int) -> dict[int, float]:
    if not isinstance(logit_bias, Mapping):
        raise RequestError(
            f"logit_bias is {show(logit_bias)}; expected token ids with a number each",
            param="logit_bias",
        )
    if len(logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(logit_bias)} entries; expected at most {MAX_LOGIT_BIAS}",
            param="logit_bias",
        )
    return {
        _check_token_id(token_id, "logit_bias", vocab_size): _check_float(
            f"logit_bias.{token_id}", bias, Bound(-100, 100)
        )
        for token_id, bias in logit_bias.items()
    }


def _check_allowed(
    allowed_token_ids: Any, banned_token_ids: tuple[int, ...], vocab_size: int
) -> tuple[int, ...] | None:
    if allowed_token_ids is None:
        return None
    allowed = check_token_ids(allowed_token_ids, "allowed_token_ids", vocab_size)
    if not set(allowed) - set(banned_token_ids):
        raise RequestError(
            "allowed_token_ids leaves no token that can be sampled; give at least one that is not "
            "banned",
            param="allowed_token_ids",
        )
    return allowed


def _check_bad(sampling: SamplingParams, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    param, given = "bad_token_sequences", sampling.bad_token_sequences
    if sampling.bad_words:
        raise RequestError(
            "bad_words need a tokenizer; give bad_token_sequences instead", param="bad_words"
        )
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise RequestError(f"{param} is {show(given)}; expected lists of token ids", param=param)
    if len(given) > MAX_BAD_SEQUENCES:
        raise RequestError(
            f"{param} has {len(given)} entries; expected at most {MAX_BAD_SEQUENCES}", param=param
        )
    checked = tuple(check_token_ids(ids, f"{param}.{i}", vocab_size) for i, ids in enumerate(given))
    for i, ids in enumerate(checked):
        if not 1 <= len(ids) <= MAX_BAD_TOKENS:
            raise RequestError(
                f"{param}.{i} has {len(ids)} tokens; expected 1 to {MAX_BAD_TOKENS}",
                param=f"{param}.{i}",
            )
    return checked


def _as_index(value: Any) -> int | None:
    """The int that a value is (numpy's too), but not a bool or a float."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return None
    try:
        return value.__index__()
    except TypeError:
        return None


def _as_number(value: Any) -> float | None:
    if isinstance(value, (bool, str, bytes)) or not hasattr(type(value), "__float__"):
        return None
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None


def show(value: Any, limit: int = 60) -> str:
    """A value for a message: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, set, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:limit]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
