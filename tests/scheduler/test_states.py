"""Collecting hidden states and logits over chunks, some of which are computed twice."""

import numpy as np
import pytest

from jaxserve.plan import PrefillChunk, StepResult
from jaxserve.scheduler.states import StateCollector, collector_for, states_wanted
from jaxserve.types import Request, SamplingParams

ALL = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
"""The hidden state of each position."""


def collect(collector: StateCollector, chunks: list[tuple[int, int]], num_before: int = 3) -> None:
    """Steps in which so many other tokens precede the chunk."""
    for start, end in chunks:
        chunk = PrefillChunk(0, start, end, np.zeros(end - start, np.int32), end == 40)
        tokens = np.concatenate([np.full((num_before, 8), np.nan, np.float32), ALL[start:end]])
        result = StepResult(np.zeros(1, np.int32), token_hidden=tokens, token_logits=2 * tokens)
        collector.collect_prompt(chunk, result, num_before)


def same(found: np.ndarray | None, expected: np.ndarray) -> bool:
    return found is not None and np.array_equal(found, expected)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 40)],
        [(0, 16), (16, 32), (32, 40)],
        [(0, 16), (16, 32), (0, 8), (8, 40)],  # preempted, and everything is computed again
        [(0, 16), (16, 32), (16, 40)],  # preempted, and resumed from what was kept
        [(0, 16), (8, 12), (12, 40)],
    ],
)
def test_each_position_is_collected_once_however_the_prompt_was_computed(
    chunks: list[tuple[int, int]],
):
    collector = StateCollector(hidden=True, logits=True, prompt=True, pooling=None)
    collect(collector, chunks)
    last = StepResult(np.zeros(2, np.int32), hidden=ALL[-2:], logits=2 * ALL[-2:])
    states = collector.take(last, 1)
    assert same(states.prompt_hidden, ALL) and same(states.prompt_logits, 2 * ALL)
    assert same(states.hidden, ALL[-1]) and same(states.logits, 2 * ALL[-1])
    again = collector.take(last, 0)
    assert again.prompt_hidden is None and same(again.hidden, ALL[-2])


@pytest.mark.parametrize("chunks", [[(0, 40)], [(0, 16), (16, 40)], [(0, 30), (0, 10), (10, 40)]])
def test_a_mean_starts_again_when_the_prompt_does(chunks: list[tuple[int, int]]):
    collector = StateCollector(hidden=True, logits=False, prompt=False, pooling="mean")
    assert collector.must_not_resume
    collect(collector, chunks)
    states = collector.take(StepResult(np.zeros(1, np.int32)), 0)
    assert states.hidden is not None
    assert np.allclose(states.hidden, ALL.mean(axis=0), atol=1e-6)


def test_a_step_hands_out_what_anybody_wants_and_no_more():
    def of(
        params: SamplingParams | None = None, pooling: str | None = None
    ) -> StateCollector | None:
        return collector_for(Request("r", (1,), params or SamplingParams(), pooling=pooling))

    assert of() is None
    last, mean = of(pooling="last"), of(pooling="mean")
    logits = of(SamplingParams(return_logits=True))
    assert last and mean and logits
    assert states_wanted([last]) == (True, False, False, False)
    assert states_wanted([mean]) == (False, False, True, False)
    assert states_wanted([logits, mean]) == (False, True, True, False)
    params = SamplingParams(
        return_hidden_states=True, return_logits=True, return_prompt_states=True
    )
    both = of(params)
    assert both and states_wanted([both]) == (True, True, True, True)
