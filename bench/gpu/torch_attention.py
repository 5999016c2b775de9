"""Part `torch-attention`: torch's SDPA and flex attention on the shapes of the kernel table.

Both read keys and values that lie side by side, without pages, so they have the easier task.
"""

from collections.abc import Callable, Iterator
from typing import Any

# pyright: reportMissingImports=false
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.report import Context
from bench.gpu.torch_timing import time_torch, torch_device

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODES = ((64, 8192), (1, 8192), (16, 2048))
PREFILLS = (8192,)


def run(context: Context) -> None:
    torch.manual_seed(0)
    decodes = ((2, 40),) if context.is_tiny else DECODES
    prefills = (64,) if context.is_tiny else PREFILLS
    for batch, kv_len in decodes:
        _time(context, f"attention decode {batch}x{kv_len}", batch, 1, kv_len)
    for length in prefills:
        _time(context, f"attention prefill {length}", 1, length, length)


def _time(context: Context, job: str, batch: int, q_len: int, kv_len: int) -> None:
    heads, kv_heads = (4, 2) if context.is_tiny else (HEADS, KV_HEADS)
    sets = 1 if q_len > 1 or batch > 16 else 8  # more than the cache holds
    about = {"job": job, "heads": [heads, kv_heads], "head_dim": HEAD_DIM}
    q_bqth = _random(batch, heads, q_len)
    pairs = [
        (_random(batch, kv_heads, kv_len), _random(batch, kv_heads, kv_len)) for _ in range(sets)
    ]
    is_causal = q_len > 1
    num_pairs = q_len * (q_len + 1) // 2 if is_causal else kv_len
    flops = 4 * batch * heads * HEAD_DIM * num_pairs
    num_bytes = 2 * batch * HEAD_DIM * (2 * kv_heads * kv_len + 2 * heads * q_len)
    for name, attend in _ways(context, is_causal, q_len, kv_len):
        with context.attempt(about | {"backend": name}):
            functions = [lambda k=k, v=v, attend=attend: attend(q_bqth, k, v) for k, v in pairs]
            seconds = time_torch(functions)
            least_s = context.limits.seconds(num_bytes, flops)
            context.line(
                **about,
                backend=name,
                us=round(seconds * 1e6, 2),
                bytes=num_bytes,
                flops=flops,
                fraction=round(least_s / seconds, 4) if least_s else None,
            )


def _ways(
    context: Context, is_causal: bool, q_len: int, kv_len: int
) -> "Iterator[tuple[str, Callable[..., Any]]]":
    def sdpa(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    yield "torch sdpa", sdpa
    mask = None
    if is_causal:

        def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
            return q >= k

        mask = create_block_mask(causal, None, None, q_len, kv_len, device=torch_device())
    # On a CPU only that it is called rightly is shown, and without a compiler.
    flex = flex_attention if context.is_tiny else torch.compile(flex_attention, dynamic=False)

    def flexible(q: Any, k: Any, v: Any) -> Any:
        return flex(q, k, v, block_mask=mask, enable_gqa=True)

    yield "torch flex", flexible


def _random(*shape: int) -> Any:
    return torch.randn(*shape, HEAD_DIM, dtype=torch.bfloat16, device=torch_device())
