"""Accelerators as JAX sees them: memory, memory kinds, driver, kernels, and why not others."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from jaxserve.config import Config
from jaxserve.doctor.finding import Finding, size

AREA = "device"
NVIDIA_DEVICE = Path("/dev/nvidia0")
PATTERN_BYTES = 1 << 16
NEEDS = {
    "mosaic_gpu": "an NVIDIA GPU of compute capability 9.0 (Hopper)",
    "triton": "a GPU",
    "tpu": "a TPU",
    "cpu_native": "a CPU with AVX2, a C++ compiler and --native-cpu",
}
"""What each attention backend runs on; `reference` runs everywhere."""


def device_findings(config: Config) -> list[Finding]:
    """Starts JAX's backend, which takes a second or a few."""
    import jax

    try:
        devices = jax.devices()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        advice = "unset JAX_PLATFORMS, or install the plugin it asks for: pip install 'jax[cuda13]'"
        return [Finding(AREA, "jax devices", "bad", text, advice)]
    first = devices[0]
    names = f"{len(devices)} x {first.device_kind} ({first.platform})"
    findings = [Finding(AREA, "devices", "ok", names), *_driver(first.platform)]
    wanted = config.parallel.tensor_parallel_size
    if first.platform != "cpu" and wanted > len(devices):
        text = f"tensor_parallel_size is {wanted}, and there are {len(devices)} devices"
        findings.append(Finding(AREA, "mesh", "bad", text, "lower --tensor-parallel-size"))
    findings += _memory(first)
    findings.append(_memory_kinds(first))
    findings += _kernels(config, first.platform)
    return findings


def _driver(platform: str) -> list[Finding]:
    """The NVIDIA driver beside what JAX uses of it."""
    tool = shutil.which("nvidia-smi")
    if tool is None and not NVIDIA_DEVICE.exists():
        if platform == "cpu":
            return [Finding(AREA, "accelerator", "note", "none found: serving on the CPU")]
        return []
    text = "nvidia-smi is not installed"
    if tool is not None:
        query = ["--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
        try:
            run = subprocess.run([tool, *query], capture_output=True, text=True, timeout=20)
            text = "; ".join(run.stdout.strip().splitlines()) or run.stderr.strip()[:200]
        except (OSError, subprocess.SubprocessError) as error:
            text = f"nvidia-smi failed: {error}"
    if platform == "cpu":
        advice = (
            "JAX does not use it: pip install 'jax[cuda13]' (driver 580 or newer) or jax[cuda12]"
        )
        return [Finding(AREA, "driver", "note", text, advice)]
    return [Finding(AREA, "driver", "ok", text)]


def _memory(device: Any) -> list[Finding]:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return []
    limit, used = stats["bytes_limit"], stats["bytes_in_use"]
    return [Finding(AREA, "device memory", "ok", f"{size(limit - used)} of {size(limit)} free")]


def _memory_kinds(device: Any) -> Finding:
    """Which kinds there are, and whether bytes come back from pinned host memory unchanged."""
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    kinds = [memory.kind for memory in device.addressable_memories()]
    default = device.default_memory().kind
    text = ", ".join(f"{kind} (default)" if kind == default else kind for kind in kinds)
    if "pinned_host" not in kinds:
        return Finding(
            AREA,
            "memory kinds",
            "note",
            f"{text}; no pinned_host: the host tier copies through pageable memory",
        )
    pattern = np.random.default_rng(7).integers(0, 256, PATTERN_BYTES, np.uint8)
    try:
        there = jax.device_put(pattern, SingleDeviceSharding(device, memory_kind="pinned_host"))
        back = jax.device_put(there, SingleDeviceSharding(device, memory_kind=default))
        same = np.array_equal(np.asarray(back), pattern)
        is_there = there.sharding.memory_kind == "pinned_host"
    except Exception as error:
        return Finding(AREA, "memory kinds", "note", f"{text}; pinned_host fails: {error}"[:300])
    if same and is_there:
        return Finding(AREA, "memory kinds", "ok", f"{text}; pinned_host gives back what it got")
    advice = "do not use --kv-host-bytes on this machine; update jaxlib and the driver"
    return Finding(AREA, "memory kinds", "bad", f"{text}; pinned_host damages data", advice)


def _kernels(config: Config, platform: str) -> list[Finding]:
    """The attention backends of this machine, in order, and what the others lack."""
    from jaxserve.pallas_kernels.paged_attention.api import this_machine

    findings = []
    native = False
    if platform == "cpu":
        found = _native(config)
        native = found.state == "ok"
        findings.append(found)
    machine = this_machine(native_cpu=native)
    refused = [
        f"{name}: needs {why}" for name, why in NEEDS.items() if name not in machine.backends
    ]
    findings.append(Finding(AREA, "attention", "ok", " then ".join(machine.backends)))
    if refused:
        findings.append(Finding(AREA, "not usable here", "ok", "; ".join(refused)))
    wanted = config.runtime.attention_backend
    if wanted != "auto" and wanted not in machine.backends:
        text = f"attention_backend is {wanted}, which needs {NEEDS.get(wanted, 'something else')}"
        findings.append(Finding(AREA, "attention", "bad", text, "use --attention-backend auto"))
    return findings


def _native(config: Config) -> Finding:
    from jaxserve.pallas_kernels.cpu.build import COMPILERS, load

    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    name = "CPU kernels"
    if not config.runtime.native_cpu:
        return Finding(AREA, name, "note", "turned off (--no-native-cpu): plain XLA serves, slower")
    found = load()
    if found.available:
        return Finding(AREA, name, "ok", f"{found.detail}, built with {compiler}")
    advice = "" if compiler else "install a C++ compiler: apt-get install g++"
    return Finding(AREA, name, "note", f"plain XLA serves, slower: {found.detail}", advice)
