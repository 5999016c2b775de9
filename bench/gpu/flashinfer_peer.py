"""Part `flashinfer`: FlashInfer's paged decode and prefill on the shapes of the kernel table.

Its kernels are compiled here when they are first used, which takes minutes; so the suite starts
`build` beside its first parts, at low priority, and this part finds the result in FlashInfer's
cache. Its pages are [pages, 2, page, KV heads, head dim], or head-major, which is ours.
"""

import os
import time
from pathlib import Path
from typing import Any

# pyright: reportMissingImports=false
import torch

from bench.gpu.report import ROOT, Context
from bench.gpu.torch_timing import time_torch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LAYOUT = "HND"
WORKSPACE_BYTES = 512 << 20
DECODES = ((64, 8192, 16), (64, 8192, 64), (1, 8192, 64), (16, 2048, 64))
PREFILLS = ((8192, 16), (8192, 64))
ARCHITECTURE = "9.0a"
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")


def build(context: Context) -> None:
    """Compile what `run` needs; needs nvcc and no GPU."""
    _prepare()
    from flashinfer.jit.attention import modules

    bf16 = torch.bfloat16
    dtypes = (bf16, bf16, bf16, torch.int32, HEAD_DIM, HEAD_DIM, 0, False, False)
    specs = {
        "decode": lambda: modules.gen_batch_decode_module(*dtypes),
        "fa3": lambda: modules.gen_batch_prefill_module("fa3", *dtypes, False),
        "fa2": lambda: modules.gen_batch_prefill_module("fa2", *dtypes, False),
    }
    for name, make in specs.items():
        with context.attempt({"figure": f"build {name}"}):
            start_s, spec = time.perf_counter(), make()
            was_there = spec.is_aot or spec.jit_library_path.exists()
            if not spec.is_aot:
                spec.build(verbose=False)
            seconds = round(time.perf_counter() - start_s, 1)
            context.line(figure=f"build {name}", seconds=seconds, was_there=was_there)


def _prepare() -> None:
    """Where the compiler finds what it wants: CUDA's own folders may lack what wheels hold."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", ARCHITECTURE)
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(ROOT / ".cache" / "gpu-suite"))
    packages = Path(str(torch.__file__)).parents[1]
    links = ROOT / ".cache" / "gpu-suite" / "lib"
    links.mkdir(parents=True, exist_ok=True)
    for name in ("libcudart.so", "libcuda.so"):
        # The linker wants names without a version, and drivers and wheels come with versions only.
        places = [*packages.glob("nvidia/*/lib"), *map(Path, DRIVER_FOLDERS)]
        found = [path for place in places for path in sorted(place.glob(f"{name}.*"))]
        if found and not (links / name).exists():
            (links / name).symlink_to(found[0])
    folders = {
        "CPATH": [str(path) for path in packages.glob("nvidia/*/include")],
        "LIBRARY_PATH": [str(links)],
    }
    for variable, found in folders.items():
        given = [os.environ[variable]] if variable in os.environ else []
        os.environ[variable] = os.pathsep.join([*given, *found])


def run(context: Context) -> None:
    if context.is_tiny:
        context.line(skipped="FlashInfer runs on GPUs only")
        return
    _prepare()
    import flashinfer

    torch.manual_seed(0)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    for batch, kv_len, page_size in DECODES:
        for cores in (True, False):
            _decode(context, flashinfer, workspace, batch, kv_len, page_size, cores)
    for length, page_size in PREFILLS:
        for backend in ("fa3", "fa2"):
            _prefill(context, flashinfer, workspace, length, page_size, backend)


def _pages(num_pages: int, page_size: int) -> Any:
    shape = (num_pages, 2, KV_HEADS, page_size, HEAD_DIM)
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _table(batch: int, kv_len: int, page_size: int) -> "tuple[Any, Any, Any]":
    """Index pointers, pages in random order, and tokens of each last page."""
    count = -(-kv_len // page_size)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * count
    indices = torch.randperm(batch * count, device="cuda").to(torch.int32)
    last = torch.full((batch,), kv_len - (count - 1) * page_size, dtype=torch.int32, device="cuda")
    return indptr, indices, last


def _decode(
    context: Context,
    flashinfer: Any,
    workspace: Any,
    batch: int,
    kv_len: int,
    page_size: int,
    uses_cores: bool,
) -> None:
    about = {
        "job": f"attention decode {batch}x{kv_len} P{page_size}",
        "backend": f"flashinfer{' tensor cores' if uses_cores else ''}",
    }
    with context.attempt(about):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, LAYOUT, use_tensor_cores=uses_cores
        )
        indptr, indices, last = _table(batch, kv_len, page_size)
        wrapper.plan(
            indptr,
            indices,
            last,
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            page_size,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        sets = 1 if batch > 16 else 8
        pools = [_pages(len(indices), page_size) for _ in range(sets)]
        q = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        seconds = time_torch([lambda pool=pool: wrapper.run(q, pool) for pool in pools])
        num_bytes = 2 * batch * HEAD_DIM * (2 * KV_HEADS * kv_len + 2 * HEADS)
        _line(context, about, seconds, num_bytes, 4 * batch * HEADS * HEAD_DIM * kv_len)


def _prefill(
    context: Context, flashinfer: Any, workspace: Any, length: int, page_size: int, backend: str
) -> None:
    about = {
        "job": f"attention prefill {length} P{page_size}",
        "backend": f"flashinfer {backend}",
    }
    with context.attempt(about):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, LAYOUT, backend=backend)
        indptr, indices, last = _table(1, length, page_size)
        q_indptr = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        wrapper.plan(
            q_indptr,
            indptr,
            indices,
            last,
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            page_size,
            causal=True,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        pool = _pages(len(indices), page_size)
        q = torch.randn(length, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        seconds = time_torch([lambda: wrapper.run(q, pool)])
        num_bytes = 2 * HEAD_DIM * length * (2 * KV_HEADS + 2 * HEADS)
        flops = 4 * HEADS * HEAD_DIM * (length * (length + 1) // 2)
        _line(context, about, seconds, num_bytes, flops)


def _line(
    context: Context, about: dict[str, Any], seconds: float, num_bytes: int, flops: int
) -> None:
    least_s = context.limits.seconds(num_bytes, flops)
    context.line(
        **about,
        us=round(seconds * 1e6, 2),
        bytes=num_bytes,
        flops=flops,
        fraction=round(least_s / seconds, 4) if least_s else None,
    )
