"""Part `steps`: the whole engine on the shapes of 8B models, with random weights.

Decode at three batch sizes against reading all weights and all keys and values once; prefill
against its arithmetic. Both as a client of the engine sees them, and decode also enqueued without
the host in between. The first profile says which kernels a decode step consists of.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from bench.gpu.engines import EngineSize, add_random, random_engine, replay, serve_batch
from bench.gpu.profile import kernel_times
from bench.gpu.report import Context
from bench.model_shapes import SHAPES, TINY, Counts
from jaxserve.engine import Engine

BATCHES = (64, 1, 16)
PROMPT_LEN = 2048
NUM_DECODES = 64
PROFILED_STEPS = 3


def run(context: Context) -> None:
    _run_shape(context, "Llama-3.1-8B")


def run_one(context: Context) -> None:
    """Part `steps-graphs`: one batch size, under other flags."""
    _run_shape(context, "Llama-3.1-8B", BATCHES[-1:])


def run_qwen3(context: Context) -> None:
    """Part `steps-qwen3`."""
    _run_shape(context, "Qwen3-8B")


def _run_shape(context: Context, name: str, batches: tuple[int, ...] = BATCHES) -> None:
    shape = TINY if context.is_tiny else SHAPES[name]
    batches = (2,) if context.is_tiny else batches
    prompt_len = 24 if context.is_tiny else PROMPT_LEN
    num_decodes = 4 if context.is_tiny else NUM_DECODES
    size = EngineSize(
        batch=max(batches),
        max_len=prompt_len + 2 * num_decodes + 32,
        chunk=32 if context.is_tiny else 2048,
    )
    about = {"model": name, "prompt_len": prompt_len, "page_size": size.page_size}
    start_s = time.perf_counter()
    with context.attempt(about), random_engine(shape, size, batches) as engine:
        report = engine.report
        context.line(
            **about,
            figure="start",
            seconds=round(time.perf_counter() - start_s, 1),
            weights_s=round(report.load_s, 1),
            compile_s=round(report.compile_s, 1),
            graphs=report.num_graphs,
            xla_flags=os.environ.get("XLA_FLAGS", ""),
            attention=engine.config.runtime.attention_backend,
        )
        counts = Counts(engine.model.config)
        add_random(engine, 1, prompt_len, 4, seed=99)  # the first run of each program
        serve_batch(engine, 1, 2)
        for batch in batches:
            with context.attempt(about | {"batch": batch}):
                _measure(context, engine, about, counts, batch, prompt_len, num_decodes)


def _measure(
    context: Context,
    engine: Engine,
    about: dict[str, Any],
    counts: Counts,
    batch: int,
    prompt_len: int,
    num_decodes: int,
) -> None:
    about = about | {"batch": batch}
    add_random(engine, batch, prompt_len, 2 * num_decodes, seed=batch)
    found = serve_batch(engine, batch, num_decodes)
    num_tokens = batch * prompt_len
    flops = counts.prefill_flops([prompt_len] * batch)
    rate = context.limits.bf16_flops
    context.line(
        **about,
        figure="prefill",
        seconds=round(found.prefill_s, 4),
        tokens_per_s=round(num_tokens / found.prefill_s, 1),
        flops=flops,
        fraction=round(flops / rate / found.prefill_s, 4) if rate else None,
    )
    if not found.decode_s or found.plan is None:
        context.line(**about, figure="decode", failed="no step in which all sequences decoded")
        return
    itemsize = jax.numpy.dtype(engine.config.model.dtype).itemsize
    kv_lens = [prompt_len + num_decodes // 2] * batch
    num_bytes = counts.decode_bytes(kv_lens, itemsize)
    step_s = statistics.median(found.decode_s)
    device_s = replay(engine, found.plan, 2 if context.is_tiny else 20)
    least_s = context.limits.seconds(num_bytes)
    context.line(
        **about,
        figure="decode",
        step_us=round(step_s * 1e6, 1),
        p90_us=round(sorted(found.decode_s)[len(found.decode_s) * 9 // 10] * 1e6, 1),
        device_us=round(device_s * 1e6, 1),
        tokens_per_s=round(batch / step_s, 1),
        bytes=num_bytes,
        limit_us=round(least_s * 1e6, 1) if least_s else None,
        fraction=round(least_s / step_s, 4) if least_s else None,
        device_fraction=round(least_s / device_s, 4) if least_s else None,
    )
    with context.attempt(about | {"figure": "profile"}), tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            replay(engine, found.plan, PROFILED_STEPS - 1)
        for entry in kernel_times(Path(folder), PROFILED_STEPS)[:20]:
            context.line(**about, figure="profile", **entry)
