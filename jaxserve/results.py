"""What `LLM` returns: finished answers, with vLLM's names. Values only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from jaxserve.outputs import OutputProcessor, PositionLogprobs
from jaxserve.result_html import ShownAnswer, ShownToken, result_html
from jaxserve.types import LoadDecision

MAX_SHOWN = 20
"""Results of one call that a notebook shows."""


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
        logits: what each token was sampled from, before penalties and temperature.
        hidden_states: the states behind these, after the final norm.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    logits: Float32[np.ndarray, "T V"] | None = None
    hidden_states: Float32[np.ndarray, "T D"] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All answers to one prompt.

    Attributes:
        prompt: None when token ids were given.
        num_cached_tokens: prompt tokens that the first answer found in the KV cache.
        cached_tokens_by_source: these by tier: "device", "host", or a store's name.
        load_decision: what was decided about blocks that lower tiers had, with both estimates;
            None if they had none that the device lacked.
        prompt_logits: at each position of the prompt, about the token that follows.
        prompt_hidden_states: the states behind these, after the final norm.
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
    prompt_logits: Float32[np.ndarray, "P V"] | None = None
    prompt_hidden_states: Float32[np.ndarray, "P D"] | None = None

    def _repr_html_(self) -> str:
        """For notebooks: where the prompt came from; tokens coloured by log-probability."""
        return result_html(
            self.prompt,
            len(self.prompt_token_ids),
            self.cached_tokens_by_source or {"device": self.num_cached_tokens},
            [_shown(answer) for answer in self.outputs],
        )


class RequestOutputs(list[RequestOutput]):
    """A list of results that a notebook shows one below the other."""

    def _repr_html_(self) -> str:
        shown = [output._repr_html_() for output in self[:MAX_SHOWN]]
        if len(self) > MAX_SHOWN:
            shown.append(f"<p>and {len(self) - MAX_SHOWN:,} more</p>")
        return "".join(shown)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A pooled hidden state, of length 1 unless that was turned off."""

    embedding: Float32[np.ndarray, " D"]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt; `prompt` is None when token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int
    finished: bool = True


def embedding_of(
    processor: OutputProcessor, *, normalize: bool = True, dimensions: int | None = None
) -> Float32[np.ndarray, " D"]:
    """The embedding that a finished pooling request gave.

    Args:
        normalize: scale it to length 1.
        dimensions: keep the first so many numbers (before scaling).
    """
    hidden = processor.states[0].hidden
    assert hidden is not None, "a pooling request ends with a hidden state"
    vector = hidden if dimensions is None else hidden[:dimensions]
    if not normalize:
        return vector
    norm = np.linalg.norm(vector.astype(np.float64))
    return (vector / max(norm, 1e-12)).astype(np.float32)


def embedding_output(
    request_id: str, prompt: str | None, processor: OutputProcessor, vector: np.ndarray
) -> EmbeddingRequestOutput:
    """The result of one prompt, from its finished processor."""
    return EmbeddingRequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=list(processor.request.prompt_ids),
        outputs=EmbeddingOutput(vector),
        num_cached_tokens=processor.num_cached_tokens,
    )


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
        prompt_logits=_first(state.prompt_logits for state in first.states),
        prompt_hidden_states=_first(state.prompt_hidden for state in first.states),
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
        logits=_stack(state.logits for state in processor.states),
        hidden_states=_stack(state.hidden for state in processor.states),
    )


def _shown(answer: CompletionOutput) -> ShownAnswer:
    tokens = None
    if answer.logprobs is not None:
        tokens = [
            ShownToken(
                entry[token_id].decoded_token,
                entry[token_id].logprob,
                tuple(
                    (other.decoded_token, other.logprob)
                    for other_id, other in entry.items()
                    if other_id != token_id
                ),
            )
            for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
    return ShownAnswer(answer.text, tokens, len(answer.token_ids), answer.finish_reason)


def _first(arrays: Iterable[np.ndarray | None]) -> np.ndarray | None:
    return next((array for array in arrays if array is not None), None)


def _stack(arrays: Iterable[np.ndarray | None]) -> np.ndarray | None:
    rows = [array for array in arrays if array is not None]
    return np.stack(rows) if rows else None


def _by_token(entry: PositionLogprobs) -> dict[int, Logprob]:
    token = entry.token
    ranked = {
        other.token_id: Logprob(other.logprob, rank, other.text)
        for rank, other in enumerate(entry.top, start=1)
    }
    return {token.token_id: Logprob(token.logprob, None, token.text), **ranked}
