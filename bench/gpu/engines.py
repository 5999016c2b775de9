"""Engines with random weights, for the parts that time whole steps; and replays of a step.

The checkpoint is a folder with a config and the embedded model's tokenizer, whose words mean
nothing here: prompts are random token ids, and no text is made.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from jaxserve.embedded import checkpoint_path
from jaxserve.engine import Engine, build_engine
from jaxserve.plan import Bucket, StepPlan
from jaxserve.types import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class EngineSize:
    """What an engine is made for: that many sequences of that many tokens."""

    batch: int
    max_len: int
    chunk: int = 2048
    page_size: int = 16
    host_bytes: int = 0
    backend: str = "auto"
    dtype: str = "bfloat16"


@contextmanager
def random_engine(
    shape: dict[str, Any], size: EngineSize, decode_rows: tuple[int, ...] | None = None
) -> Iterator[Engine]:
    """An engine with few graphs: decode with so many rows, and one mixed step."""
    rows = decode_rows or (size.batch,)
    buckets = (
        *(Bucket(n, n, True) for n in rows),
        Bucket(size.chunk, min(size.batch, size.chunk), False),
    )
    with tempfile.TemporaryDirectory() as folder:
        for path in checkpoint_path().glob("tokenizer*"):
            shutil.copy(path, folder)
        Path(folder, "config.json").write_text(json.dumps(shape))
        num_pages = size.batch * -(-size.max_len // size.page_size) + 8
        engine = build_engine(
            Config(
                model=ModelConfig(
                    model=folder,
                    dtype=size.dtype,
                    load_format="dummy",
                    max_model_len=size.max_len,
                    served_model_name="random",
                ),
                cache=CacheConfig(
                    page_size=size.page_size,
                    num_pages=num_pages,
                    kv_host_bytes=size.host_bytes,
                    kv_offload="lazy" if size.host_bytes else "auto",
                ),
                scheduler=SchedulerConfig(
                    max_num_seqs=size.batch, max_num_batched_tokens=size.chunk
                ),
                # On a CPU, what a GPU would run, interpreted or not: no C++ kernels.
                runtime=RuntimeConfig(attention_backend=size.backend, native_cpu=False),
            ),
            buckets=buckets,
        )
        try:
            yield engine
        finally:
            engine.close()


def add_random(engine: Engine, count: int, prompt_len: int, max_tokens: int, seed: int) -> None:
    """Requests with prompts that share nothing, greedy, without an end."""
    rng = random.Random(seed)
    vocab_size = engine.model.config.vocab_size
    for index in range(count):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(prompt_len))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=0, ignore_eos=True)
        engine.add(Request(f"{seed}-{index}", prompt, sampling))


@dataclass(frozen=True, slots=True)
class Run:
    """What a batch of requests took.

    Attributes:
        prefill_s: until every sequence had its first token.
        decode_s: of each step after that in which all sequences ran.
        plan: one of these steps, to be replayed; None if there was none.
    """

    prefill_s: float
    decode_s: "list[float]"
    plan: StepPlan | None


def serve_batch(engine: Engine, batch: int, num_decodes: int) -> Run:
    """Step the engine until all sequences have decoded together so many times; then stop them."""
    started: set[str] = set()
    decode_s: list[float] = []
    start_s = last_s = time.perf_counter()
    prefill_s, plan = 0.0, None
    while engine.has_work and len(decode_s) < num_decodes:
        events = engine.step()
        now_s = time.perf_counter()
        started.update(event.request_id for event in events)
        if len(started) == batch:
            if not prefill_s:
                prefill_s = now_s - start_s
            elif len(events) == batch:
                decode_s.append(now_s - last_s)
                plan = _plan_in_flight(engine) or plan
        last_s = now_s
    for request_id in started:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    return Run(prefill_s, decode_s, plan)


def _plan_in_flight(engine: Engine) -> StepPlan | None:
    """The plan of the step that runs now, if it is a plain decode."""
    handle = engine._in_flight
    if handle is None or not handle.plan.bucket.is_decode or handle.plan.slot_loads:
        return None
    return handle.plan


def replay(engine: Engine, plan: StepPlan, count: int) -> float:
    """Seconds of a step that is enqueued again and again, so that the host's work is hidden.

    It computes the same positions each time; what it writes is of no use afterwards.
    """
    runner = engine._runner
    handle = runner.dispatch(plan)
    jax.block_until_ready(handle.outputs)
    start_s = time.perf_counter()
    for _ in range(count):
        handle = runner.dispatch(plan)
    jax.block_until_ready(handle.outputs)
    return (time.perf_counter() - start_s) / count
