"""What is asked of an engine, and what comes back. Standard library only: peers import it too."""

import random
from dataclasses import dataclass

FIRST_TEXT_ID = 3
"""Smaller ids are the special tokens of the checkpoint that `checkpoint.make` writes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts submitted at once; `answer_lens` tokens are generated for each, whatever they are."""

    prompts: tuple[tuple[int, ...], ...]
    answer_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A batch that was run.

    `times_s` are seconds after submission, for each prompt the times at which its tokens (or, from
    a server, pieces) came. `tokens` may be empty where the engine sends text only.
    """

    times_s: tuple[tuple[float, ...], ...]
    num_tokens: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of the workload, in tokens; ranges are inclusive."""

    prompt: int = 128
    answer: int = 64
    prefill: int = 1024
    prefix: int = 2000
    suffix: int = 16
    batch: int = 8
    ragged: int = 32
    ragged_prompt: tuple[int, int] = (16, 512)
    ragged_answer: tuple[int, int] = (16, 128)


TINY = Sizes(
    prompt=8,
    answer=6,
    prefill=48,
    prefix=64,
    suffix=4,
    batch=3,
    ragged=4,
    ragged_prompt=(4, 24),
    ragged_answer=(2, 8),
)


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    """Token ids without special tokens."""
    return tuple(rng.choices(range(FIRST_TEXT_ID, vocab_size), k=length))


def even_batch(
    rng: random.Random, num: int, prompt_len: int, answer_len: int, vocab_size: int
) -> Batch:
    """Prompts of one length."""
    prompts = tuple(random_prompt(rng, prompt_len, vocab_size) for _ in range(num))
    return Batch(prompts, (answer_len,) * num)


def ragged_batch(rng: random.Random, sizes: Sizes, vocab_size: int) -> Batch:
    """Mixed lengths, the same ones each time; the tokens are the rng's."""
    lengths = random.Random(7)
    shapes = [
        (lengths.randint(*sizes.ragged_prompt), lengths.randint(*sizes.ragged_answer))
        for _ in range(sizes.ragged)
    ]
    return Batch(
        tuple(random_prompt(rng, prompt_len, vocab_size) for prompt_len, _ in shapes),
        tuple(answer_len for _, answer_len in shapes),
    )
