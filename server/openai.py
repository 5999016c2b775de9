"""The bodies of OpenAI's completions and chat API: what is read, and what it means for sampling.

Types are checked here, strictly; bounds are checked by `jaxserve.requests`, for all front ends
alike. Unknown fields are accepted and logged once, since client libraries add some every month;
those that would change the answer and are not supported are refused. vLLM's extra fields have
vLLM's names.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, WithJsonSchema

from jaxserve.errors import RequestError
from jaxserve.outputs import OutputProcessor
from jaxserve.requests import default_sampling
from jaxserve.types import LoadDecision, SamplingParams

logger = logging.getLogger(__name__)

MAX_PROMPTS = 256
MAX_ANSWERS = 1024
"""Most answers to one HTTP request, over all prompts and `n`."""
MAX_UNKNOWN_FIELDS = 256
"""So many names of unknown fields are logged, once each."""

# These are checked by hand: pydantic would report an error for each element of a list, and for
# each alternative of a union.
TokenIdsField: TypeAlias = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "integer"}})
]
PromptField: TypeAlias = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
StopField: TypeAlias = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    ),
]
LogitBiasField: TypeAlias = Annotated[
    Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})
]

WITHOUT_EFFECT = frozenset(
    """user metadata store service_tier safety_identifier verbosity prediction
    web_search_options prompt_cache_key prompt_cache_retention prompt_cache_options
    function_call spaces_between_special_tokens length_penalty
    early_stopping request_id kv_transfer_params vllm_xargs media_io_kwargs
    mm_processor_kwargs""".split()
)
"""Fields that clients send and that need no answer here; they are not logged."""
FormField: TypeAlias = Annotated[Any, WithJsonSchema({})]
"""Checked where it is understood: see `forms` and `conversation`."""

UNSUPPORTED = {
    "functions": (None, []),
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "use_beam_search": (None, False),
    "prompt_embeds": (None,),
}
"""Fields that are not supported, each with the values that ask for nothing."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(BaseModel):
    """What both endpoints have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: StopField = None
    stop_token_ids: TokenIdsField = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    logit_bias: LogitBiasField = None
    allowed_token_ids: TokenIdsField = None
    banned_token_ids: TokenIdsField = None
    bad_words: StopField = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    cache_no_store: bool | None = None
    priority: int | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    response_format: FormField = None
    structured_outputs: FormField = None
    guided_json: FormField = None
    guided_regex: str | None = None
    guided_choice: FormField = None
    guided_grammar: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Every chunk of a stream says how many tokens there are so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class CompletionRequest(SamplingFields):
    prompt: PromptField = None
    logprobs: int | None = None
    best_of: int | None = None


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[dict[str, Any]], FailFast()]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: FormField = None
    tool_choice: FormField = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None


COPIED = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "banned_token_ids",
)


def check_supported(body: SamplingFields) -> None:
    """Refuse what would be ignored to the client's harm.

    Raises:
        RequestError: a field that is not supported, by name; or options that exclude each other.
    """
    extra = body.model_extra or {}
    if extra.get("tool_choice") == "none":
        extra = {name: value for name, value in extra.items() if name != "tools"}
    for name, harmless in UNSUPPORTED.items():
        if name in extra and extra[name] not in harmless:
            raise RequestError(
                f"{name} is not supported yet; leave it out", param=name, code="unsupported"
            )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")


def log_unknown(extra: Mapping[str, Any] | None, logged: set[str]) -> None:
    """Log each unknown field once.

    Args:
        extra: what a body has beyond the fields that are read.
        logged: names that have been, to which new ones are added.
    """
    for name in extra or ():
        known = name in WITHOUT_EFFECT or name in UNSUPPORTED or name in logged
        if not known and len(logged) < MAX_UNKNOWN_FIELDS:
            logged.add(name)
            logger.info("requests have a field %r that has no effect here", name[:60])


def truncated(token_ids: list[int], limit: int | None, max_model_len: int) -> list[int]:
    """vLLM's `truncate_prompt_tokens`: the last so many; -1 stands for as many as fit.

    Raises:
        RequestError: a limit that is neither.
    """
    if limit is None:
        return token_ids
    if not (limit == -1 or 1 <= limit <= max_model_len):
        raise RequestError(
            f"truncate_prompt_tokens is {limit}; expected -1, or 1 to {max_model_len}",
            param="truncate_prompt_tokens",
        )
    return token_ids[-(max_model_len - 1 if limit == -1 else limit) :]


def sampling_of(
    body: SamplingFields,
    generation_config: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """Sampling parameters of a body; what it leaves out is as the checkpoint recommends."""
    given: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs}
    for name in COPIED:
        if (value := getattr(body, name)) is not None:
            given[name] = value
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    return default_sampling(generation_config, **given)


def prompts_of(
    prompt: Any, *, param: str = "prompt", most: int = MAX_PROMPTS
) -> list[str | list[int]]:
    """The prompts of a body: a text, token ids, or a list of either.

    Raises:
        RequestError: something else, or more than `most`.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            f"{param} is missing or empty; expected a text, a list of token ids, or a list of "
            "those",
            param=param,
        )
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > most:
        raise RequestError(
            f"{param} has {len(prompt)} entries; expected at most {most}", param=param
        )
    for i, entry in enumerate(prompt):
        if not isinstance(entry, (str, list)):
            raise RequestError(
                f"{param}.{i} is neither a text nor a list of token ids", param=f"{param}.{i}"
            )
    return prompt


def check_num_answers(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_ANSWERS:
        raise RequestError(
            f"{num_prompts} prompts with n = {n} make {num_prompts * n} answers; expected at most "
            f"{MAX_ANSWERS}",
            param="n",
        )


def usage(firsts: Sequence[OutputProcessor], num_completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage. Beside `cached_tokens`: the same by tier, and what was done about blocks
    that lower tiers had.

    Args:
        firsts: the first answer to each prompt.
    """
    num_prompt_tokens = sum(len(first.request.prompt_ids) for first in firsts)
    details: dict[str, Any] = {"cached_tokens": sum(first.num_cached_tokens for first in firsts)}
    reuses = [first.reuse for first in firsts if first.reuse is not None]
    if reuses:
        by_source = Counter[str]()
        for reuse in reuses:
            by_source.update(reuse.cached)
        details["cached_tokens_by_source"] = dict(by_source)
    decisions = [reuse.decision for reuse in reuses if reuse.decision is not None]
    if decisions:
        details["load_decisions"] = [_load_decision(decision) for decision in decisions]
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": details,
    }


def _load_decision(decision: LoadDecision) -> dict[str, Any]:
    """JSON has no infinity, which estimates may be: null says that it cannot be done."""
    return {name: None if value == math.inf else value for name, value in asdict(decision).items()}


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def _logit_bias(logit_bias: Any) -> Any:
    """Token ids come as texts, since keys of JSON objects do."""
    if not isinstance(logit_bias, dict):
        return logit_bias
    return {_token_id(key): bias for key, bias in logit_bias.items()}


def _token_id(key: str) -> Any:
    return int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else key
