"""The shapes of attention and of page moves that are compiled ahead of time, timed and tabulated.

What a workload must move and compute follows from its shape alone: each key and value that some
query sees is read once, everything else once; two FLOPs for each multiply-add of the two products.
No kernel can be faster than `bytes_moved` at the device's bandwidth and `flops` at its rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.reference import table_width
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows


@dataclass(frozen=True)
class Workload:
    """One step's attention in one layer.

    Attributes:
        decodes: keys of each row with one query.
        prefills: queries and keys of the others.
        heads: of queries, and of keys and values.
        dtype: of queries, and of pages unless these are `quantised`.
    """

    name: str
    decodes: tuple[int, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    quantised: str | None = None
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    needs_lse: bool = False
    num_layers: int = 32
    latent_dim: int | None = None
    spare_pages: int = 0
    """In the pool, beside those of the rows."""

    def __str__(self) -> str:
        stored = "" if self.quantised is None else f" {self.quantised}"
        lse = " lse" if self.needs_lse else ""
        return f"{self.name}{stored}{lse} P{self.page_size}"

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of each row."""
        return (*((1, kv_len) for kv_len in self.decodes), *self.prefills)

    @property
    def num_tokens(self) -> int:
        return sum(q_len for q_len, _ in self.rows)

    @property
    def num_pages(self) -> int:
        """Of the pool."""
        return self.spare_pages + sum(-(-kv_len // self.page_size) for _, kv_len in self.rows)

    @property
    def spec(self) -> AttentionSpec:
        scale, layer = self.head_dim**-0.5, self.num_layers // 2
        return AttentionSpec(
            scale,
            self.num_layers,
            layer,
            self.window,
            self.soft_cap,
            self.needs_lse,
            self.latent_dim,
        )

    @property
    def value_dim(self) -> int:
        return self.latent_dim or self.head_dim

    @property
    def kv_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.quantised or self.dtype)

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in one layer, with their scales."""
        scale_bytes = 0 if self.quantised is None else 4
        return (
            self.spec.parts * self.heads[1] * (self.head_dim * self.kv_dtype.itemsize + scale_bytes)
        )

    @property
    def flops(self) -> int:
        """Of the two products, where the mask lets something through."""
        num_q, _ = self.heads
        return (
            2
            * num_q
            * (self.head_dim + self.value_dim)
            * sum(self._num_pairs(*row) for row in self.rows)
        )

    @property
    def bytes_moved(self) -> int:
        """Keys and values, queries, outputs, page table, and log-sum-exps if they are wanted."""
        seen = [min(kv, self._reach + q - 1) for q, kv in self.rows]
        pages = sum(-(-count // self.page_size) for count in seen)
        width = self.head_dim + self.value_dim  # of a query and of what comes out
        q_bytes = self.num_tokens * self.heads[0] * width * jnp.dtype(self.dtype).itemsize
        lse_bytes = 4 * self.num_tokens * self.heads[0] if self.needs_lse else 0
        return sum(seen) * self.token_bytes + q_bytes + 4 * pages + lse_bytes

    @property
    def _reach(self) -> int:
        return 1 << 40 if self.window is None else self.window

    def _num_pairs(self, q_len: int, kv_len: int) -> int:
        """Of a query and a key that it sees."""
        first, last = kv_len - q_len + 1, kv_len  # keys up to the first and the last query
        full = max(0, min(last, self._reach) - first + 1)  # queries that see all before them
        return full * (first + min(last, self._reach)) // 2 + (q_len - full) * min(
            last, self._reach
        )

    def within(self, pool_bytes: int) -> "Workload":
        """With a pool of about that size: more pages, or else fewer layers, but at least one."""
        layer_bytes = self.page_size * self.token_bytes
        num_layers = min(self.num_layers, pool_bytes // (self.num_pages * layer_bytes))
        if num_layers < 1:
            raise ValueError(f"{self} does not fit into {pool_bytes} bytes")
        spare_pages = pool_bytes // (num_layers * layer_bytes) - self.num_pages
        return replace(self, num_layers=num_layers, spare_pages=spare_pages)

    def abstract_pages(self) -> KVPages:
        num_kv, width = self.heads[1], self.spec.parts * self.num_layers
        shape = (self.num_pages * width, num_kv, self.page_size, self.head_dim)
        rows: Any = jax.ShapeDtypeStruct(shape, self.kv_dtype)
        scales: Any = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
        return KVPages(rows, None if self.quantised is None else scales)

    def abstract_rows(self) -> RaggedRows:
        num_rows = len(self.rows)
        width = table_width(max(kv_len for _, kv_len in self.rows), self.page_size)

        def integers(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        return RaggedRows(
            num_decodes=integers(),
            num_rows=integers(),
            q_start=integers(num_rows),
            q_len=integers(num_rows),
            kv_len=integers(num_rows),
            page_table=integers(num_rows, width),
            has_prefills=bool(self.prefills),
        )

    def abstract_tokens(self, num_heads: int) -> jax.ShapeDtypeStruct:
        """[T, heads, H] in the compute dtype."""
        shape = (self.num_tokens, num_heads, self.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))


def _decode(batch: int, kv_len: int, **facts) -> Workload:
    return Workload(f"decode {batch}x{kv_len}", decodes=(kv_len,) * batch, **facts)


def _prefill(q_len: int, kv_len: int, **facts) -> Workload:
    name = f"prefill {q_len}" if q_len == kv_len else f"prefill {q_len} of {kv_len}"
    return Workload(name, prefills=((q_len, kv_len),), **facts)


def _both(model: str, **facts) -> Sequence[Workload]:
    work = (_decode(16, 8192, **facts), _prefill(2048, 4096, **facts))
    return [replace(x, name=f"{x.name} {model}") for x in work]


MAIN = (
    # Llama-3.1-8B and Qwen3-8B: 32 query heads, 8 KV heads of 128.
    _decode(64, 8192, page_size=16),
    _decode(64, 8192),
    _decode(64, 8192, page_size=256),
    _decode(64, 8192, needs_lse=True),
    _decode(1, 8192),
    _decode(16, 2048),
    _prefill(8192, 8192),
    _prefill(8192, 8192, page_size=16),
    _prefill(512, 16384),
    Workload("mixed", decodes=(4096,) * 32, prefills=((512, 512), (256, 4096))),
    # Quantised pages.
    _decode(64, 8192, quantised="int8"),
    _decode(64, 8192, quantised="float8_e4m3fn"),
    _decode(64, 8192, quantised="float8_e4m3fn", page_size=16),
    _prefill(2048, 4096, quantised="int8"),
    _prefill(2048, 4096, quantised="float8_e4m3fn"),
)
"""What a backend is for: it must not refuse these."""

OTHERS = (
    # Heads, head dims, windows, caps and sinks of other families.
    *_both("Qwen2.5-7B", heads=(28, 4)),
    *_both("Phi-3-mini", heads=(32, 32), head_dim=96, num_layers=16),
    *_both("Gemma-2-9B window", heads=(16, 8), head_dim=256, window=4096, soft_cap=50.0),
    *_both("GPT-OSS window", heads=(64, 8), head_dim=64, window=128, has_sinks=True),
    *_both("MQA", heads=(16, 1), dtype="float16"),
    *_both("head dim 192", heads=(16, 16), head_dim=192),
    *_both("float32", heads=(8, 2), head_dim=64, dtype="float32"),
)

_DEEPSEEK = {"head_dim": 576, "latent_dim": 512}

LATENT = (
    # DeepSeek-V3: 128 heads, or 16 on each of eight devices; a latent of 512, 64 rotated.
    _decode(64, 8192, heads=(128, 1), **_DEEPSEEK),
    _prefill(1024, 4096, heads=(128, 1), **_DEEPSEEK),
    replace(_decode(64, 8192, heads=(16, 1), **_DEEPSEEK), name="decode 64x8192 16 heads"),
    replace(_prefill(2048, 4096, heads=(16, 1), **_DEEPSEEK), name="prefill 2048 of 4096 16 heads"),
    replace(
        _decode(64, 8192, heads=(16, 1), quantised="int8", **_DEEPSEEK), name="decode 64x8192 int8"
    ),
    replace(
        _decode(64, 8192, heads=(16, 1), quantised="float8_e4m3fn", **_DEEPSEEK),
        name="decode 64x8192 float8",
    ),
    # MiniCPM3: 40 heads, a latent of 256.
    replace(_decode(16, 8192, heads=(40, 1), head_dim=288, latent_dim=256), name="decode MiniCPM3"),
)
"""Attention over latent pages."""

MOVES = (
    Workload("1 token", decodes=(4096,)),
    Workload("64 tokens", decodes=(4096,) * 64),
    Workload("4096 tokens", prefills=((4096, 8192),)),
    Workload("64 tokens", decodes=(4096,) * 64, quantised="int8"),
    Workload("64 tokens", decodes=(4096,) * 64, quantised="float8_e4m3fn", page_size=16),
    Workload("64 tokens H64", decodes=(4096,) * 64, head_dim=64, page_size=16),
)
"""Writes of so many tokens; with 64, whole pages are moved, too."""

PAGES_MOVED = 32
