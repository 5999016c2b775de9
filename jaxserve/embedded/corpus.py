"""Rows of training tokens: conversations end to end, with a weight for each token's loss.

Knows nothing of models. The batch of a step depends on the seed and the step alone, so that an
interrupted training goes on with the batches it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from tokenizers import Tokenizer

from jaxserve.embedded import tasks
from jaxserve.embedded.retrieval import Message
from jaxserve.embedded.tokenizer_training import BEGIN, END

ANSWER_WEIGHT = 1.0  # short replies: what the model is for
STORY_WEIGHT = 0.3  # long replies have many tokens and more than one right continuation
MAX_SHORT_REPLY = 60  # characters


@dataclass(frozen=True)
class Phase:
    """One stage of the curriculum.

    Attributes:
        num_steps: optimiser steps.
        rows, row_tokens: size of a batch.
        short_share: share of conversations that are not retrieval.
        short_weights: how often each of `tasks.SHORT_CHATS` comes.
        max_facts, max_questions: of one retrieval conversation; 3 at least while its length allows.
        text_weight: of the tokens that the user writes, against 1 for those of a short reply.
        same_kind_share: see `retrieval.make_facts`.
    """

    num_steps: int
    rows: int
    row_tokens: int
    short_share: float
    short_weights: tuple[float, ...]
    max_facts: int
    max_questions: int
    text_weight: float
    same_kind_share: float

    @property
    def num_tokens(self) -> int:
        """Tokens that one step reads."""
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one more token than the model reads, and the weight of each as a target."""

    tokens: np.ndarray
    weights: np.ndarray


class Encoder:
    """Turns conversations into tokens and weights; counts tokens, remembering what it counted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {
            role: _special_id(tokenizer, f"<|{role}|>") for role in ("system", "user", "assistant")
        }
        self._begin = _special_id(tokenizer, BEGIN)
        self._end = _special_id(tokenizer, END)
        self.count_tokens = lru_cache(maxsize=200_000)(self._count)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def chat(
        self, messages: Sequence[Message], text_weight: float = 0.0
    ) -> tuple[list[int], list[float]]:
        """The rendered chat as tokens, and the weight of predicting each."""
        tokens, weights = [self._begin], [0.0]
        for message in messages:
            content, is_reply = message["content"], message["role"] == "assistant"
            ids = self._tokenizer.encode(content, add_special_tokens=False).ids
            weight = text_weight
            if is_reply:
                weight = ANSWER_WEIGHT if len(content) <= MAX_SHORT_REPLY else STORY_WEIGHT
            tokens += [self._special[message["role"]], *ids, self._end]
            weights += [0.0, *[weight] * len(ids), weight if is_reply else 0.0]
        return tokens, weights

    def row(self, rng: Random, phase: Phase) -> tuple[list[int], list[float]]:
        """One row of a phase: conversations until it is full, the last one cut off."""
        tokens: list[int] = []
        weights: list[float] = []
        while (left := phase.row_tokens + 1 - len(tokens)) > 0:
            if left < 100 or rng.random() < phase.short_share:
                messages = tasks.short_chat(rng, phase.short_weights)
            else:
                messages = self._retrieval(rng, phase, left)
            more_tokens, more_weights = self.chat(messages, phase.text_weight)
            tokens += more_tokens
            weights += more_weights
        return tokens[: phase.row_tokens + 1], weights[: phase.row_tokens + 1]

    def _retrieval(self, rng: Random, phase: Phase, left: int) -> list[Message]:
        num_tokens = left if left < 200 or rng.random() < 0.7 else rng.randint(100, left)
        most = num_tokens // 24
        num_facts = max(2, min(rng.randint(3, phase.max_facts), most))
        num_questions = max(1, min(rng.randint(3, phase.max_questions), num_facts, most))
        messages = tasks.retrieval_chat(
            rng,
            num_tokens,
            num_facts,
            num_questions,
            self.count_tokens,
            phase.same_kind_share,
        )
        return tasks.with_system(rng, messages)

    def batch(self, seed: int, step: int, phase: Phase) -> TokenBatch:
        """The batch of one step."""
        rng = Random(f"corpus/{seed}/{step}")
        rows = [self.row(rng, phase) for _ in range(phase.rows)]
        return TokenBatch(
            np.array([tokens for tokens, _ in rows], np.int32),
            np.array([weights for _, weights in rows], np.float32),
        )


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    """The phase that a step belongs to; the last one goes on for ever."""
    for phase in phases:
        if step < phase.num_steps:
            return phase
        step -= phase.num_steps
    return phases[-1]


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id
