"""Runs a tiny checkpoint through the engine and holds it against the `transformers` oracle.

A checkpoint folder has `expected.npz` beside it (see make_tiny_checkpoints.py): logits of a prompt,
and greedy continuations of it and of a shorter one. The engine reports log-probabilities, not
logits; the two differ by a constant per position, so they are compared as log-probabilities.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxserve.config import (
    CacheConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from jaxserve.engine import Engine, build_engine
from jaxserve.plan import Bucket
from jaxserve.types import Request, SamplingParams, TokenEvent

TOLERANCE = 1e-4
"""Largest difference of log-probabilities from the oracle, float32."""

TOP = 20


@dataclass(frozen=True)
class Settings:
    """How the engine is set up: what parity must not depend on."""

    page_size: int = 16
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    num_pages: int | None = None
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    native_cpu: bool = True
    few_shapes: bool = False
    """Compile two shapes of steps instead of six: most of the time is compiling."""


_DEFAULT = Settings()


def make_engine(folder: Path, settings: Settings = _DEFAULT) -> Engine:
    """An engine that compiles what it needs when it needs it (few buckets of the many are used)."""
    return build_engine(
        Config(
            model=ModelConfig(model=str(folder), dtype="float32", max_model_len=128),
            cache=CacheConfig(
                page_size=settings.page_size,
                num_pages=settings.num_pages or 4 * 128 // settings.page_size + 8,
                enable_prefix_caching=settings.enable_prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
            ),
            parallel=ParallelConfig(tensor_parallel_size=settings.tensor_parallel_size),
            runtime=RuntimeConfig(warmup=False, native_cpu=settings.native_cpu),
        ),
        buckets=few_buckets(settings.max_num_seqs, settings.max_num_batched_tokens)
        if settings.few_shapes
        else None,
    )


def few_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[Bucket, ...]:
    """All decode, all do anything: the least that an engine needs."""
    return (
        Bucket(max_num_seqs, max_num_seqs, True),
        Bucket(max_num_batched_tokens, max_num_seqs, False),
    )


def greedy(request_id: str, prompt_ids: np.ndarray, max_tokens: int, **params: object) -> Request:
    """A greedy request that ignores the end of sequence, as the oracle did."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)
    ids = tuple(int(x) for x in prompt_ids)
    return Request(request_id, ids, replace(sampling, **params))


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    """Step until nothing is left to do; the events of each request."""
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def max_difference(expected: dict[str, np.ndarray], events: list[TokenEvent]) -> float:
    """Largest difference of any reported log-probability of the long request from the oracle's."""
    prompt, answer = log_softmax(expected["logits"]), log_softmax(expected["greedy_logits"])
    pairs = []
    reported = events[0].prompt_logprobs
    assert reported is not None and reported[0] is None and len(reported) == len(prompt)
    for position, found in enumerate(reported[1:]):
        assert found is not None
        pairs += [(prompt[position, i], value) for i, value in found.top]
        pairs.append((prompt[position, found.token_id], found.logprob))
    for position, event in enumerate(events):
        assert event.logprobs is not None
        pairs += [(answer[position, i], value) for i, value in event.logprobs.top]
    return max(abs(a - b) for a, b in pairs)


def check(folder: Path, settings: Settings, must_preempt: bool = False) -> float:
    """Run both prompts of a checkpoint at once, with company; returns the largest difference.

    Raises:
        AssertionError: a greedy token differs from the oracle's, or `must_preempt` and nothing
            was preempted.
    """
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    engine = make_engine(folder, settings)
    try:
        num_new = len(expected["greedy"])
        long_ids, short_ids = expected["input_ids"], expected["short_input_ids"]
        engine.add(greedy("company", long_ids[::-1], num_new))
        engine.step()
        engine.add(greedy("long", long_ids, num_new, logprobs=TOP, prompt_logprobs=TOP))
        engine.add(greedy("short", short_ids, num_new))
        engine.step()
        engine.add(greedy("again", long_ids, num_new))  # finds the prefix of "long", if cached
        events = drain(engine)
        answers = {"long": "greedy", "again": "greedy", "short": "short_greedy"}
        if "longrope" in (folder / "config.json").read_text():
            # transformers switches factors within the short answer, by the length of each call;
            # a server decides once for all lengths.
            del answers["short"]
        for name, key in answers.items():
            assert tokens(events[name]) == expected[key].tolist(), f"{folder.name}: {name} differs"
        stats = engine.stats()
        assert stats.num_running == 0 and all(group.num_in_use == 0 for group in stats.pages)
        assert stats.num_preemptions > 0 or not must_preempt
        return max_difference(expected, events["long"])
    finally:
        engine.close()
