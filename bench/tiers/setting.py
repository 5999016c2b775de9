"""What all workloads of a run have in common: the model, the folder, and how much is asked."""

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.checkpoint import Shape

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths in tokens, and how often; see the workloads."""

    prompt: int = 4000
    num_prompts: int = 5
    rounds: int = 4
    users: int = 12
    turns: int = 6
    opening: int = 800
    turn: int = 160
    answer: int = 32
    short: int = 16
    long: int = 3000
    suffix: int = 24
    num_short: int = 16
    num_long: int = 5
    num_varied: int = 32
    faulty: tuple[int, ...] = (4000, 1000)
    unique: tuple[int, int] = (500, 1500)
    num_unique: int = 8
    unique_rounds: int = 12


TINY = Sizes(
    prompt=100,
    num_prompts=3,
    rounds=1,
    users=3,
    turns=2,
    opening=60,
    turn=24,
    answer=4,
    short=16,
    long=96,
    suffix=4,
    num_short=2,
    num_long=2,
    num_varied=2,
    faulty=(100, 50),
    unique=(20, 60),
    num_unique=3,
    unique_rounds=1,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """Of one run.

    Attributes:
        folder: for stores; each workload makes and removes its own.
        seed: of prompts.
    """

    model: Path
    shape: Shape
    dtype: str
    sizes: Sizes
    folder: Path
    seed: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return self.shape.kv_values_per_token * (4 if self.dtype == "float32" else 2)

    def engine(self, num_tokens: int, **more: Any) -> dict[str, Any]:
        """Settings of an engine whose device pool holds so many tokens, at least one context."""
        num_pages = max(-(-num_tokens // PAGE_SIZE), self.shape.context // PAGE_SIZE + 1)
        limits: dict[str, Any] = {"max_num_seqs": 16}
        if self.sizes is TINY:
            limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "warmup": False}
        return {
            "model": str(self.model),
            "num_pages": num_pages,
            "page_size": PAGE_SIZE,
            **limits,
            **more,
        }

    def disk_url(self, name: str, scheme: str = "file", **options: Any) -> str:
        """A store in an own folder below the run's."""
        given = "".join(f"&{key}={value}" for key, value in options.items())
        return f"{scheme}://{self.folder / name}?max_bytes=8GiB{given}"

    def clear(self, name: str) -> None:
        """Remove a store's folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ms(values: Sequence[float]) -> list[float]:
    return [round(1e3 * value, 1) for value in values]
