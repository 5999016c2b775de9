"""Part `generate`: `transformers` on the shape of Llama-3.1-8B with random weights.

Its `generate` with a static cache (which it compiles), and its continuous batching, on prompts of
the length that the part `steps` has. Decode is the difference of a long and a short answer.
"""

import time
from typing import Any

# pyright: reportMissingImports=false
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from bench.gpu.report import Context
from bench.gpu.torch_timing import torch_device
from bench.model_shapes import LLAMA_31_8B, TINY

BATCHES = (1, 16, 64)
PROMPT_LEN = 2048
ANSWER_LENS = (8, 72)
WAITS_S = 60.0


def run(context: Context) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    shape = TINY if context.is_tiny else LLAMA_31_8B
    config = LlamaConfig(**{k: v for k, v in shape.items() if k != "architectures"})
    with torch.device(torch_device()):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    prompt_len = 24 if context.is_tiny else PROMPT_LEN
    answer_lens = (2, 4) if context.is_tiny else ANSWER_LENS
    for batch in (2,) if context.is_tiny else BATCHES:
        ids = torch.randint(3, shape["vocab_size"], (batch, prompt_len), device=torch_device())
        for way in (_static, _continuous):
            about = {"way": way.__name__.strip("_"), "batch": batch, "prompt_len": prompt_len}
            if context.left_s < 10 and not context.is_tiny:
                context.line(**about, failed="no time left")
                continue
            with context.attempt(about):
                way(model, ids, answer_lens[0])  # compiles
                short_s, long_s = (_seconds(way, model, ids, length) for length in answer_lens)
                step_s = (long_s - short_s) / (answer_lens[1] - answer_lens[0])
                context.line(
                    **about,
                    step_us=round(step_s * 1e6, 1),
                    tokens_per_s=round(batch / step_s, 1) if step_s > 0 else None,
                    short_s=round(short_s, 4),
                    long_s=round(long_s, 4),
                )


def _seconds(way: Any, model: Any, ids: Any, num_tokens: int) -> float:
    start_s = time.perf_counter()
    way(model, ids, num_tokens)
    return time.perf_counter() - start_s


def _greedy(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )


def _static(model: Any, ids: Any, num_tokens: int) -> None:
    config = _greedy(num_tokens)
    config.cache_implementation = "static"
    # One cache length for all answers, or each would be compiled anew.
    config.max_length = None
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _continuous(model: Any, ids: Any, num_tokens: int) -> None:
    """The whole batch through its scheduler; all requests are there at the start."""
    config = _greedy(num_tokens)
    config.eos_token_id = -1
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        until_s = time.monotonic() + WAITS_S  # it is warm by now
        for index, prompt in enumerate(ids.tolist()):
            manager.add_request(prompt, str(index), max_new_tokens=num_tokens, eos_token_id=-1)
        left = len(ids)
        while left:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"continuous batching: {result.error}")
                left -= 1
            elif time.monotonic() > until_s or not manager.is_running():
                raise RuntimeError(f"continuous batching did not end within {WAITS_S:.0f} s")
