"""What is measured: the batches of each round, and the figure that their runs come to.

Every round has fresh prompts, so that nothing is cached but what a measure is about. The prompts of
a round are the same for all engines.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.peers.checkpoint import Shape
from bench.peers.machine import Limits
from bench.peers.workload import Batch, Run, Sizes, even_batch, ragged_batch, random_prompt


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a measure; `resource` is the limit that it is held against, if any."""

    name: str
    unit: str
    more_is_better: bool
    resource: str = ""  # "read" or "flops"
    per_unit: float = 0.0  # bytes or operations behind one unit


@dataclass(frozen=True, slots=True)
class Measure:
    """`batches` are run one after the other; `evaluate` makes the figures' values of the runs.

    One turn of an engine does `repeats` of them, for measures that are over quickly.
    """

    name: str
    figures: tuple[Figure, ...]
    batches: Callable[[random.Random], Sequence[Batch]]
    evaluate: Callable[[Sequence[Run]], tuple[float, ...]]
    repeats: int = 1


class TooFast(Exception):
    """There is no time between tokens to measure."""


def decode_rate(run: Run) -> float:
    """Tokens per second while all answers of the batch are being generated.

    A server may send several tokens in one piece: pieces count for the tokens they stand for.

    Raises:
        TooFast: the answers came all at once.
    """
    start_s = max(times[0] for times in run.times_s)
    end_s = max(times[-1] for times in run.times_s)
    if end_s <= start_s:
        raise TooFast("the answers came all at once: this model is too small to time")
    num_after = sum(
        sum(at_s > start_s for at_s in times) * num_tokens / len(times)
        for times, num_tokens in zip(run.times_s, run.num_tokens, strict=True)
    )
    return num_after / (end_s - start_s)


def total_rate(run: Run) -> float:
    """Tokens per second from submission to the last one."""
    return sum(run.num_tokens) / max(times[-1] for times in run.times_s)


def first_token_s(run: Run) -> float:
    return run.times_s[0][0]


def all_measures(sizes: Sizes, shape: Shape, dtype: str) -> dict[str, Measure]:
    """By name."""
    bytes_each = {"float32": 4, "bfloat16": 2}[dtype]
    vocab = shape.vocab

    def decode(name: str, num: int) -> Measure:
        # Halfway through the answers, what a step reads: the weights once, and each one's keys.
        context = sizes.prompt + sizes.answer // 2
        step_values = shape.step_params + num * context * shape.kv_values_per_token
        figure = Figure("rate", "tok/s", True, "read", step_values * bytes_each / num)
        return Measure(
            name,
            (figure,),
            lambda rng: [even_batch(rng, num, sizes.prompt, sizes.answer, vocab)],
            lambda runs: (decode_rate(runs[0]),),
        )

    def first(
        name: str, figure: Figure, length: int, value: Callable[[float], float], repeats: int
    ) -> Measure:
        return Measure(
            name,
            (figure,),
            lambda rng: [even_batch(rng, 1, length, 1, vocab)],
            lambda runs: (value(first_token_s(runs[0])),),
            repeats=repeats,
        )

    def prefix_batches(rng: random.Random) -> list[Batch]:
        prefix = random_prompt(rng, sizes.prefix, vocab)
        suffixes = [random_prompt(rng, sizes.suffix, vocab) for _ in range(2)]
        return [Batch((prefix + suffix,), (1,)) for suffix in suffixes]

    def prefix_values(runs: Sequence[Run]) -> tuple[float, ...]:
        cold_s, warm_s = map(first_token_s, runs)
        return cold_s * 1e3, warm_s * 1e3, cold_s / warm_s

    flops_per_token = shape.prefill_flops(sizes.prefill) / sizes.prefill
    prefill_rate = Figure("rate", "tok/s", True, "flops", flops_per_token)
    measures = (
        decode("decode_1", 1),
        decode(f"decode_{sizes.batch}", sizes.batch),
        Measure(
            f"ragged_{sizes.ragged}",
            (Figure("rate", "tok/s", True),),
            lambda rng: [ragged_batch(rng, sizes, vocab)],
            lambda runs: (total_rate(runs[0]),),
        ),
        first(
            f"prefill_{sizes.prefill}", prefill_rate, sizes.prefill, lambda s: sizes.prefill / s, 3
        ),
        first("ttft", Figure("time", "ms", False), sizes.prompt, lambda s: s * 1e3, 8),
        Measure(
            f"prefix_{sizes.prefix}",
            (
                Figure("cold", "ms", False),
                Figure("warm", "ms", False),
                Figure("gain", "x", True),
            ),
            prefix_batches,
            prefix_values,
        ),
    )
    return {measure.name: measure for measure in measures}


def fraction_of_limit(figure: Figure, value: float, limits: Limits, dtype: str) -> float | None:
    """How much of the machine's own limit a value stands for."""
    if figure.resource == "read":
        return value * figure.per_unit / limits.read_bytes_per_s
    if figure.resource == "flops":
        return value * figure.per_unit / limits.flops[dtype]
    return None
