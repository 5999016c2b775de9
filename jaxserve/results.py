"""What `LLM` returns: finished answers, with vLLM's names. Values only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxserve.outputs import OutputProcessor, PositionLogprobs
from jaxserve.types import LoadDecision


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability; `rank` is 1 for the likeliest, None if not among the reported."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        logprobs: for each token, the log-probabilities of it and of the likeliest ones, by id.
        finish_reason: "stop", "length" or "abort".
        stop_reason: the stop string or stop token id that ended it, if one did.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All answers to one prompt.

    Attributes:
        prompt: None when token ids were given.
        num_cached_tokens: prompt tokens that the first answer found in the KV cache.
        cached_tokens_by_source: these by tier: "device", "host", or a store's name.
        load_decision: what was decided about blocks that lower tiers had, with both estimates;
            None if they had none that the device lacked.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True
    cached_tokens_by_source: Mapping[str, int] = field(default_factory=dict)
    load_decision: LoadDecision | None = None


def request_output(
    request_id: str, prompt: str | None, processors: Sequence[OutputProcessor]
) -> RequestOutput:
    """The result of one prompt, from the finished processors of its answers."""
    first = processors[0]
    prompt_logprobs = None
    if first.prompt_logprobs is not None:
        prompt_logprobs = [entry and _by_token(entry) for entry in first.prompt_logprobs]
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=list(first.request.prompt_ids),
        prompt_logprobs=prompt_logprobs,
        outputs=[_completion(i, processor) for i, processor in enumerate(processors)],
        num_cached_tokens=first.num_cached_tokens,
        cached_tokens_by_source=dict(first.reuse.cached) if first.reuse else {},
        load_decision=first.reuse.decision if first.reuse else None,
    )


def _completion(index: int, processor: OutputProcessor) -> CompletionOutput:
    wants_logprobs = processor.request.sampling.logprobs is not None
    return CompletionOutput(
        index=index,
        text=processor.text,
        token_ids=processor.token_ids,
        cumulative_logprob=processor.cumulative_logprob if wants_logprobs else None,
        logprobs=[_by_token(entry) for entry in processor.logprobs] if wants_logprobs else None,
        finish_reason=None if processor.finish_reason is None else processor.finish_reason.value,
        stop_reason=processor.stop_reason,
    )


def _by_token(entry: PositionLogprobs) -> dict[int, Logprob]:
    token = entry.token
    ranked = {
        other.token_id: Logprob(other.logprob, rank, other.text)
        for rank, other in enumerate(entry.top, start=1)
    }
    return {token.token_id: Logprob(token.logprob, None, token.text), **ranked}
