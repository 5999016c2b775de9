"""The speed of an engine in this process, through `LLM`, beside what the machine can do at most.

The yardsticks: a decode step reads every weight once and the keys and values of its sequences;
prefill multiplies every prompt token by every weight that is a matrix. Embedding rows are looked
up, not multiplied, and are left out of the products. Attention's own products are left out, too, so
the share that is reported is a little too low.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.benchmarks.machine import MachineLimits
from jaxserve.errors import ConfigError
from jaxserve.llm import LLM
from jaxserve.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Weights:
    """What a step must read and multiply."""

    num_bytes: int
    num_multiplied: int
    kv_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of each prompt and answer, in tokens."""

    num_prompts: int
    input_len: int
    output_len: int


def weights_of(engine: Any) -> Weights:
    """From the parameters of a built engine."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(engine.model.params)
    num_bytes = sum(leaf.nbytes for _, leaf in leaves)
    looked_up = sum(leaf.size for path, leaf in leaves if "embed" in jax.tree_util.keystr(path))
    if engine.model.config.tie_word_embeddings:
        looked_up = 0  # the same matrix makes the logits
    report = engine.report
    return Weights(
        num_bytes, report.num_params - looked_up, report.kv_bytes / max(1, report.num_cache_tokens)
    )


def check_lengths(lengths: Lengths, max_model_len: int) -> None:
    """Raises ConfigError if a request does not fit into the context."""
    if lengths.input_len + lengths.output_len > max_model_len:
        raise ConfigError(
            f"--input-len {lengths.input_len} and --output-len {lengths.output_len} make "
            f"{lengths.input_len + lengths.output_len} tokens, and the model's context is "
            f"{max_model_len}; lower one of them"
        )


def random_ids(llm: LLM, lengths: Lengths, seed: int) -> list[list[int]]:
    """Prompts that share nothing."""
    special = llm.tokenizer.special_ids
    vocab_size = llm.engine.model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    ordinary = [i for i in range(vocab_size) if i not in special]
    rng = random.Random(seed)
    return [rng.choices(ordinary, k=lengths.input_len) for _ in range(lengths.num_prompts)]


def measure_throughput(
    llm: LLM, lengths: Lengths, limits: MachineLimits, weights: Weights, seed: int
) -> dict[str, Any]:
    """All prompts at once, after one that warms up; names as in vLLM's benchmark."""
    warm_up = Lengths(1, lengths.input_len, min(lengths.output_len, 8))
    _generate(llm, random_ids(llm, warm_up, seed + 1), warm_up.output_len)
    prompts = random_ids(llm, lengths, seed)
    elapsed_s = _timed(lambda: _generate(llm, prompts, lengths.output_len, use_tqdm=True))
    num_output = lengths.num_prompts * lengths.output_len
    num_total = num_output + lengths.num_prompts * lengths.input_len
    batch = min(lengths.num_prompts, llm.engine.config.scheduler.max_num_seqs)
    least_s = _prefill_least_s(lengths, limits, weights) + _decode_least_s(
        lengths, batch, limits, weights
    )
    return {
        "elapsed_time": round(elapsed_s, 4),
        "num_requests": lengths.num_prompts,
        "total_num_tokens": num_total,
        "requests_per_second": round(lengths.num_prompts / elapsed_s, 4),
        "tokens_per_second": round(num_total / elapsed_s, 2),
        "output_tokens_per_second": round(num_output / elapsed_s, 2),
        "share_of_limit": round(least_s / elapsed_s, 4),
    }


def measure_latency(
    llm: LLM,
    lengths: Lengths,
    limits: MachineLimits,
    weights: Weights,
    *,
    num_warmups: int,
    num_iters: int,
    percentiles: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """One batch again and again, with and without its answers; nothing is found in a cache."""

    def seconds(output_len: int, round_index: int) -> float:
        prompts = random_ids(llm, lengths, seed + 1000 * round_index + output_len)
        return _timed(lambda: _generate(llm, prompts, output_len))

    for index in range(num_warmups):
        seconds(lengths.output_len, -1 - index)
    whole = [seconds(lengths.output_len, index) for index in range(num_iters)]
    prefill_s = float(np.median([seconds(1, index) for index in range(min(num_iters, 5))]))
    line: dict[str, Any] = {
        "avg_latency": round(float(np.mean(whole)), 6),
        "median_latency": round(float(np.median(whole)), 6),
        "percentiles": {f"{p:g}": round(float(np.percentile(whole, p)), 6) for p in percentiles},
        "prefill_s": round(prefill_s, 6),
        "prefill_tokens_per_second": round(
            lengths.num_prompts * lengths.input_len / max(prefill_s, 1e-9), 1
        ),
        "prefill_share_of_limit": round(
            _prefill_least_s(lengths, limits, weights) / max(prefill_s, 1e-9), 4
        ),
    }
    if lengths.output_len > 1:
        decode_s = max(float(np.median(whole)) - prefill_s, 1e-9)
        num_tokens = lengths.num_prompts * (lengths.output_len - 1)
        least_s = _decode_least_s(lengths, lengths.num_prompts, limits, weights)
        line |= {
            "decode_tokens_per_second": round(num_tokens / decode_s, 1),
            "decode_step_ms": round(1e3 * decode_s / (lengths.output_len - 1), 4),
            "decode_share_of_limit": round(least_s / decode_s, 4),
        }
    return line


def limits_line(limits: MachineLimits, weights: Weights) -> dict[str, Any]:
    """What the shares are shares of."""
    return {
        "limit_read_gb_s": round(limits.read_bytes_per_s / 1e9, 2),
        "limit_gflop_s": round(limits.flops / 1e9, 1),
        "weights_gb": round(weights.num_bytes / 1e9, 4),
        "kv_bytes_per_token": round(weights.kv_bytes_per_token, 1),
    }


def _prefill_least_s(lengths: Lengths, limits: MachineLimits, weights: Weights) -> float:
    num_tokens = lengths.num_prompts * lengths.input_len
    return 2 * weights.num_multiplied * num_tokens / limits.flops


def _decode_least_s(lengths: Lengths, batch: int, limits: MachineLimits, weights: Weights) -> float:
    """Of all steps but the first, which prefill does."""
    steps = (lengths.output_len - 1) * -(-lengths.num_prompts // batch)
    context = lengths.input_len + lengths.output_len / 2
    kv_bytes = weights.kv_bytes_per_token * context * min(batch, lengths.num_prompts)
    return steps * (weights.num_bytes + kv_bytes) / limits.read_bytes_per_s


def _generate(
    llm: LLM, prompts: list[list[int]], output_len: int, *, use_tqdm: bool = False
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    llm.generate(prompts, sampling, use_tqdm=use_tqdm)


def _timed(function: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s
