"""Log-probabilities of a step's result, in the shape that clients get."""

import numpy as np

from jaxserve.plan import PrefillChunk, StepResult
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import TokenLogprobs


def sampled_logprobs(result: StepResult, row: int, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of the token that a row sampled."""
    assert result.logprobs is not None, "the plan wanted logprobs, the result has none"
    assert result.top_ids is not None and result.top_logprobs is not None
    return TokenLogprobs(
        token_id,
        float(result.logprobs[row]),
        _top(result.top_ids[row], result.top_logprobs[row], num_top),
    )


def collect_prompt_logprobs(
    seq: Sequence, chunk: PrefillChunk, result: StepResult, first_token: int
) -> None:
    """Add a chunk's prompt log-probabilities to the sequence's.

    Positions that were collected before a preemption are left out.

    Args:
        first_token: index of the chunk's first token in the step.
    """
    collected, num_top = seq.prompt_logprobs, seq.request.sampling.prompt_logprobs
    if collected is None or num_top is None or chunk.targets is None:
        return
    assert result.prompt_logprobs is not None, "the plan wanted prompt logprobs"
    assert result.prompt_top_ids is not None and result.prompt_top_logprobs is not None
    for offset, target in enumerate(chunk.targets.tolist()):
        if target < 0 or chunk.start + offset + 1 != len(collected):
            continue
        token = first_token + offset
        top = _top(result.prompt_top_ids[token], result.prompt_top_logprobs[token], num_top)
        collected.append(TokenLogprobs(target, float(result.prompt_logprobs[token]), top))


def _top(
    top_ids: np.ndarray, top_logprobs: np.ndarray, num_top: int
) -> tuple[tuple[int, float], ...]:
    pairs = zip(top_ids[:num_top].tolist(), top_logprobs[:num_top].tolist(), strict=True)
    return tuple(pairs)
