"""Engines over lower tiers, and a load that moves blocks through all of them."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.config import (
    CacheConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from jaxserve.engine import Engine, build_engine
from jaxserve.types import Request, SamplingParams
from tests.parity.harness import few_buckets

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tiny"
MAX_LEN, VOCAB, PAGE_SIZE = 96, 250, 8
NUM_SHARED = 6


def make_engine(
    folder: Path | None = FIXTURES / "llama31-v0",
    *,
    num_pages: int = 40,
    page_size: int = PAGE_SIZE,
    tensor_parallel_size: int = 1,
    native_cpu: bool = False,
    max_model_len: int = MAX_LEN,
    dtype: str = "float32",
    warmup: bool = False,
    **cache: Any,
) -> Engine:
    """Few pages for 6 slots: blocks leave the device all the time. Compiles when needed, or all."""
    return build_engine(
        Config(
            model=ModelConfig(
                model=str(folder) if folder else None, dtype=dtype, max_model_len=max_model_len
            ),
            cache=CacheConfig(page_size=page_size, num_pages=num_pages, **cache),
            scheduler=SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64),
            parallel=ParallelConfig(tensor_parallel_size=tensor_parallel_size),
            runtime=RuntimeConfig(warmup=warmup, native_cpu=native_cpu),
        ),
        buckets=few_buckets(6, 64),
    )


def requests(count: int, seed: int = 0, num_shared: int = NUM_SHARED) -> list[Request]:
    """Prompts that share heads, greedy and sampled, of two tenants."""
    rng = random.Random(seed)
    heads = [[rng.randrange(3, VOCAB) for _ in range(60)] for _ in range(num_shared)]
    made = []
    for i in range(count):
        head = rng.choice(heads)[: rng.choice([0, 24, 40, 60])]
        prompt = head + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 12))]
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.8]),
            seed=rng.randrange(2**30),
            max_tokens=rng.randint(2, 12),
            ignore_eos=True,
        )
        made.append(Request(f"r{i}", tuple(prompt), sampling, cache_salt=rng.choice(["", "", "a"])))
    return made


def serve(engine: Engine, asked: list[Request], seed: int = 0) -> dict[str, list[int | None]]:
    """Tokens of each request; arrivals are random, and the books are checked after each step."""
    rng = random.Random(seed)
    waiting, tokens = list(asked), {request.request_id: [] for request in asked}
    while waiting or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 1, 4])):
            if waiting:
                engine.add(waiting.pop(0))
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
        engine.check_integrity()
    return tokens


def renamed(asked: list[Request], suffix: str) -> list[Request]:
    """The same requests under other ids."""
    return [replace(request, request_id=request.request_id + suffix) for request in asked]


def loaded(engine: Engine) -> dict[str, int]:
    """Blocks that came from lower tiers, by source."""
    assert engine.lower is not None
    return engine.lower.tiers.counters.loaded


def settle(engine: Engine) -> None:
    """Wait until nothing is on its way to lower tiers."""
    assert engine.lower is not None
    assert engine.lower.flush(engine.step, 20), "the stores did not take everything in time"
    engine.check_integrity()
