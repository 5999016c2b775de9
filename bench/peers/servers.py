"""How to start the servers that are compared, as alike as they can be configured."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxserve as this_package
from bench.peers import gguf
from bench.peers.checkpoint import SHAPES
from bench.peers.engines import ServerEngine
from bench.peers.machine import num_cpus

START_TIMEOUT_S = 600.0
KV_GIB = 1
LLAMA_CPP_SLOTS = 8
MAX_SEQS = 64
MAX_BATCHED_TOKENS = 2048


def jaxserve(model: Path, settings: Mapping[str, Any], repository: Path) -> ServerEngine:
    """`jaxserve serve` of this work tree."""
    flags = [
        text for name, x in settings.items() for text in (f"--{name}".replace("_", "-"), str(x))
    ]
    command = [sys.executable, "-m", "jaxserve.cli", "serve", str(model), *flags]
    return ServerEngine(
        "jaxserve",
        lambda port: [*command, "--port", str(port)],
        repository,
        {},
        timeout_s=START_TIMEOUT_S,
        versions={"jaxserve": this_package.__version__, "jax": jax.__version__},
    )


def vllm(model: Path, python: str, dtype: str) -> ServerEngine:
    """vLLM's OpenAI server, on all CPUs that this process may use, with its prefix cache."""
    cpus = sorted(os.sched_getaffinity(0))
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--dtype", dtype, "--enable-prefix-caching"),
        *("--max-num-seqs", str(MAX_SEQS), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return ServerEngine(
        "vllm",
        lambda port: [*command, "--port", str(port)],
        Path(tempfile.gettempdir()),
        environment,
        timeout_s=START_TIMEOUT_S,
        versions=_versions(python, "vllm", "torch"),
    )


def llama_cpp(model: Path, binary: str, shape_name: str, dtype: str) -> ServerEngine:
    """llama.cpp's server; its own file format is written beside the checkpoint."""
    shape = SHAPES[shape_name]
    command = [
        *(binary, "--model", str(gguf.write(model, shape, dtype)), "--host", "127.0.0.1"),
        *("--threads", str(num_cpus()), "--parallel", str(LLAMA_CPP_SLOTS)),
        *("--ctx-size", str(shape.context * LLAMA_CPP_SLOTS)),
    ]
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    return ServerEngine(
        "llama.cpp",
        lambda port: [*command, "--port", str(port)],
        Path(tempfile.gettempdir()),
        {},
        timeout_s=START_TIMEOUT_S,
        versions={"llama.cpp": " ".join((done.stdout + done.stderr).split())[:80]},
    )


def _versions(python: str, *packages: str) -> dict[str, str]:
    """Installed versions, as that interpreter sees them, under either name of vLLM's CPU build."""
    code = "\n".join(
        (
            "import sys, importlib.metadata as metadata",
            "for name in (sys.argv[1], sys.argv[1] + '-cpu'):",
            "    try: print(metadata.version(name)); break",
            "    except metadata.PackageNotFoundError: pass",
        )
    )
    found = {}
    for package in packages:
        command = [python, "-c", code, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found[package] = done.stdout.strip() or "unknown"
    return found
