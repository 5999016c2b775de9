"""What is compiled for mixtures of experts and for latent attention: their own operations."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from bench.attention_workloads import LATENT, Workload
from tests.aot.jobs import POOL_BYTES, Job

LATENT_BACKENDS = {"h200": ("triton", "reference"), "v5e": ("tpu",), "v6e": ("tpu",)}
GROUPED_BACKENDS = {"h200": ("triton",), "v5e": ("tpu",), "v6e": ("tpu",)}


def latent_jobs(target: str, backends: Collection[str]) -> Iterator[Job]:
    """Attention over latent pages, and the write of new latents."""
    for name in set(LATENT_BACKENDS[target]) & set(backends):
        backend = import_module(f"jaxserve.pallas_kernels.paged_attention.{name}")
        for work in LATENT if name != "reference" else LATENT[:2]:
            yield _attention(name, backend, work.within(POOL_BYTES[target]))
        yield _write(name, backend, LATENT[0].within(POOL_BYTES[target]))


def _attention(name: str, backend: Any, work: Workload) -> Job:
    def attend(q_tqh: Any, pages: Any, rows: Any) -> Any:
        return backend.ragged_paged_attention(q_tqh, pages, rows, work.spec)

    pages = work.abstract_pages()
    return Job(
        name=f"latent attention {work}",
        backend=name,
        function=attend,
        args=(work.abstract_tokens(work.heads[0]), pages, work.abstract_rows()),
        pool=pages,
        bytes_moved=work.bytes_moved,
        flops=work.flops,
        facts=_facts(work),
    )


def _write(name: str, backend: Any, work: Workload) -> Job:
    pages = work.abstract_pages()
    index_t = jax.ShapeDtypeStruct((work.num_tokens,), jnp.int32)

    def write(pages: Any, latent_t1h: Any, page_t: Any, offset_t: Any) -> Any:
        return backend.write_kv(pages, latent_t1h, None, page_t, offset_t, work.spec)

    return Job(
        name=f"write latents {work.num_tokens} tokens P{work.page_size}",
        backend=name,
        function=write,
        args=(pages, work.abstract_tokens(1), index_t, index_t),
        pool=pages,
        bytes_moved=2 * work.num_tokens * work.token_bytes,
        donate=(0,),
        facts=_facts(work),
    )


def _facts(work: Workload) -> dict[str, Any]:
    return {
        "heads": list(work.heads),
        "head_dim": work.head_dim,
        "latent_dim": work.latent_dim,
        "page_size": work.page_size,
        "dtype": work.dtype,
        "kv_dtype": work.kv_dtype.name,
    }


@dataclass(frozen=True)
class Grouped:
    """One product of a mixture of experts; every expert is chosen by some token."""

    name: str
    num_experts: int
    num_rows: int
    num_in: int
    num_out: int
    dtype: str = "bfloat16"

    @property
    def bytes_moved(self) -> int:
        """Each matrix that has rows once, rows and results once."""
        numbers = min(self.num_experts, self.num_rows) * self.num_in * self.num_out
        numbers += self.num_rows * (self.num_in + self.num_out)
        return numbers * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        return 2 * self.num_rows * self.num_in * self.num_out


GROUPED = (
    Grouped("Mixtral up, 64 tokens", 8, 128, 4096, 14336),
    Grouped("Mixtral up, 4096 tokens", 8, 8192, 4096, 14336),
    Grouped("Qwen3-30B-A3B up, 64 tokens", 128, 512, 2048, 768),
    Grouped("Qwen3-30B-A3B down, 64 tokens", 128, 512, 768, 2048),
    Grouped("Qwen3-30B-A3B up, 2048 tokens", 128, 16384, 2048, 768),
    Grouped("DeepSeek-V3 up on one of 8, 64 tokens", 256, 512, 7168, 256),
    Grouped("float32, 64 tokens", 8, 128, 1024, 2048, dtype="float32"),
)


def expert_jobs(target: str, backends: Collection[str]) -> Iterator[Job]:
    """Grouped products. The matrices are in the place of the pool: they must not be copied."""
    for name in set(GROUPED_BACKENDS[target]) & set(backends):
        module: Any = import_module(f"jaxserve.pallas_kernels.grouped_matmul.{name}")
        for work in GROUPED:
            dtype = jnp.dtype(work.dtype)

            def multiply(x_mi: Any, w_eoi: Any, sizes_e: Any, module=module, dtype=dtype) -> Any:
                return module.grouped_matmul(x_mi, w_eoi, sizes_e, dtype)

            w_eoi = jax.ShapeDtypeStruct((work.num_experts, work.num_out, work.num_in), dtype)
            x_mi = jax.ShapeDtypeStruct((work.num_rows, work.num_in), dtype)
            sizes_e = jax.ShapeDtypeStruct((work.num_experts,), jnp.int32)
            yield Job(
                name=f"grouped matmul {work.name}",
                backend=name,
                function=multiply,
                args=(x_mi, w_eoi, sizes_e),
                pool=w_eoi,
                bytes_moved=work.bytes_moved,
                flops=work.flops,
                facts={
                    "experts": work.num_experts,
                    "rows": work.num_rows,
                    "inputs": work.num_in,
                    "outputs": work.num_out,
                    "dtype": work.dtype,
                },
            )
