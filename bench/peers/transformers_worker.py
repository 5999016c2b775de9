"""The `transformers` library in a process and an interpreter of its own.

It knows several ways to generate; the bench tries each and takes the fastest:

    loop        a greedy loop over the model with a dynamic KV cache
    generate    `model.generate`
    continuous  its continuous batching, which knows no time of single tokens

A ragged batch is padded on the left and runs until its longest answer is there, except in
`continuous`. Needs torch and transformers, and nothing of jaxserve.
"""

import time
from typing import Any

# pyright: reportMissingImports=false
import torch
import transformers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)

from bench.peers.protocol import Command, serve

CONTINUOUS_TIMEOUT_S = 120.0
CONTINUOUS_PAGE_TOKENS = 64
CONTINUOUS_BATCH_TOKENS = 1024
PRODUCT_SIZE = 2048


class Peer:
    """A loaded model and its ways to generate."""

    def __init__(self, model: str, dtype: str):
        torch.set_grad_enabled(False)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model: Any = loaded.eval()
        self.ways = {"loop": self.loop, "generate": self.generate, "continuous": self.continuous}

    def run(self, prompts: list[list[int]], answer_lens: list[int], way: str) -> dict[str, Any]:
        """The times and tokens of a batch."""
        start_s = time.perf_counter()
        times_s, tokens = self.ways[way](prompts, answer_lens)
        return {
            "times_s": [[at_s - start_s for at_s in times] for times in times_s],
            "tokens": tokens,
        }

    def loop(self, prompts: list[list[int]], answer_lens: list[int]) -> Any:
        ids, mask = _padded(prompts)
        cache = DynamicCache(config=self.model.config)
        steps_s, columns = [], []
        arguments: dict[str, Any] = {}
        for step in range(max(answer_lens)):
            if mask is not None:
                if step > 0:
                    mask = functional.pad(mask, (0, 1), value=1)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                arguments = {"attention_mask": mask, "position_ids": positions}
            out = self.model(
                ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments
            )
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            columns.append(ids[:, 0].tolist())
            steps_s.append(time.perf_counter())
        return _by_row(steps_s, columns, answer_lens)

    def generate(self, prompts: list[list[int]], answer_lens: list[int]) -> Any:
        ids, mask = _padded(prompts)
        steps_s: list[float] = []

        def note(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            steps_s.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            generation_config=_greedy(max(answer_lens)),
            stopping_criteria=[note],
        )
        columns = out[:, ids.shape[1] :].T.tolist()
        return _by_row(steps_s, columns, answer_lens)

    def continuous(self, prompts: list[list[int]], answer_lens: list[int]) -> Any:
        found: dict[int, Any] = {}
        deadline_s = time.perf_counter() + CONTINUOUS_TIMEOUT_S
        most = [len(prompt) + n for prompt, n in zip(prompts, answer_lens, strict=True)]
        config = ContinuousBatchingConfig(  # by itself it would take all memory for its cache
            page_size=CONTINUOUS_PAGE_TOKENS,
            num_blocks=sum(num_tokens // CONTINUOUS_PAGE_TOKENS + 2 for num_tokens in most),
            max_batch_tokens=CONTINUOUS_BATCH_TOKENS,
        )
        with self.model.continuous_batching_context_manager(
            generation_config=_greedy(max(answer_lens)), continuous_batching_config=config
        ) as manager:
            for i, (prompt, length) in enumerate(zip(prompts, answer_lens, strict=True)):
                manager.add_request(prompt, str(i), max_new_tokens=length, eos_token_id=-1)
            while len(found) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(f"continuous batching: {result.error}")
                    index = int(result.request_id)
                    found[index] = (time.perf_counter(), list(result.generated_tokens))
                elif not manager.is_running() or time.perf_counter() > deadline_s:
                    raise RuntimeError("continuous batching stopped, or took too long")
        times_s = [[found[i][0]] * len(found[i][1]) for i in range(len(prompts))]
        return times_s, [found[i][1] for i in range(len(prompts))]


def product_flops(dtype: str) -> float:
    """Floating-point operations per second of torch's matrix product, the best of a few."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(getattr(torch, dtype)) for _ in range(2))
    best_s = min(_seconds(lambda: a @ b.T) for _ in range(8))
    return 2 * PRODUCT_SIZE**3 / best_s


def _seconds(function: Any) -> float:
    start_s = time.perf_counter()
    function()
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


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts as one array, padded on the left; no mask if there is no padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    if all(len(prompt) == width for prompt in prompts):
        return ids, None
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _by_row(steps_s: list[float], columns: list[list[int]], answer_lens: list[int]) -> Any:
    """Of a batch that runs to its longest answer, what each prompt asked for."""
    rows = list(zip(*columns, strict=True))
    times_s = [steps_s[:length] for length in answer_lens]
    return times_s, [list(row[:length]) for row, length in zip(rows, answer_lens, strict=True)]


def start(model: str, dtype: str) -> dict[str, Command]:
    """Load the checkpoint."""
    peer = Peer(model, dtype)
    about = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "ways": list(peer.ways),
    }
    return {"run": peer.run, "describe": lambda: about, "product_flops": product_flops}


if __name__ == "__main__":
    serve(start)
