"""Retrieval: a fact hidden in a long text and asked for at the end; right or wrong, by length.

The prompts are the held-out set of `jaxserve.embedded.retrieval`; their lengths are counted by the
tokenizer of the model in process, or by the embedded model's when another server is asked.
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jaxserve
from jaxserve.embedded import checkpoint_path
from jaxserve.embedded.retrieval import RetrievalPrompt, heldout_prompts, score
from jaxserve.llm import LLM
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import SamplingParams

MAX_ANSWER_TOKENS = 32
BUCKET_TOKENS = 128


class Ask(Protocol):
    """Gives the greedy answer to each of several chats, in order."""

    model_name: str

    def __call__(self, chats: Sequence[list[dict[str, str]]], max_tokens: int) -> list[str]: ...


class InProcess:
    """Asks a model in this process."""

    def __init__(self, llm: LLM):
        self.model_name = llm.engine.model_name
        self._llm = llm

    def __call__(self, chats: Sequence[list[dict[str, str]]], max_tokens: int) -> list[str]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        return [output.outputs[0].text for output in self._llm.chat(chats, sampling)]


@dataclass(frozen=True, slots=True)
class Tally:
    """How many prompts of a kind there were, and how many were answered right."""

    num_right: int = 0
    num_prompts: int = 0

    def add(self, right: bool) -> "Tally":
        return Tally(self.num_right + right, self.num_prompts + 1)

    @property
    def accuracy(self) -> float:
        return self.num_right / max(self.num_prompts, 1)


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """Accuracy in all, by length of the prompt in tokens, and by kind of fact."""

    model_name: str
    total: Tally
    by_length: dict[str, Tally]
    by_kind: dict[str, Tally]

    def table(self) -> str:
        lines = [f"retrieval, {self.model_name}", f"{'prompt':>24}  {'right':>12}  accuracy"]
        for name, tally in {**self.by_length, **self.by_kind, "all": self.total}.items():
            right = f"{tally.num_right} of {tally.num_prompts}"
            lines.append(f"{name:>24}  {right:>12}  {tally.accuracy:8.1%}")
        return "\n".join(lines)

    def json_line(self) -> str:
        def accuracies(tallies: dict[str, Tally]) -> dict[str, float]:
            return {name: round(tally.accuracy, 4) for name, tally in tallies.items()}

        return json.dumps(
            {
                "eval": "retrieval",
                "model": self.model_name,
                "accuracy": round(self.total.accuracy, 4),
                "num_prompts": self.total.num_prompts,
                "by_length": accuracies(self.by_length),
                "by_kind": accuracies(self.by_kind),
                "jaxserve": jaxserve.__version__,
                "python": platform.python_version(),
            }
        )


def run(ask: Ask, count_tokens: Callable[[str], int], num_prompts: int) -> RetrievalReport:
    """Ask all prompts and score the answers."""
    prompts = list(heldout_prompts(count_tokens, num_prompts))
    replies = ask([prompt.messages for prompt in prompts], MAX_ANSWER_TOKENS)
    right = [score(prompt.answer, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    return _report(ask.model_name, prompts, right)


def counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def embedded_counter() -> Callable[[str], int]:
    return counter(Tokenizer.from_folder(checkpoint_path()))


def _report(
    model_name: str, prompts: Sequence[RetrievalPrompt], right: Sequence[bool]
) -> RetrievalReport:
    def tallies(key: Callable[[RetrievalPrompt], Any]) -> dict[Any, Tally]:
        found: dict[Any, Tally] = {}
        for prompt, is_right in zip(prompts, right, strict=True):
            found[key(prompt)] = found.get(key(prompt), Tally()).add(is_right)
        return dict(sorted(found.items()))

    def first_of_bucket(prompt: RetrievalPrompt) -> int:
        return (prompt.num_tokens - 1) // BUCKET_TOKENS * BUCKET_TOKENS + 1

    by_length = {
        f"{first}-{first + BUCKET_TOKENS - 1} tokens": tally
        for first, tally in tallies(first_of_bucket).items()
    }
    return RetrievalReport(
        model_name,
        Tally(sum(right), len(prompts)),
        by_length,
        tallies(lambda prompt: prompt.kind),
    )
