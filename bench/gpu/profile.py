"""Sums up what a profile says the device did: microseconds and launches by kernel name."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any


def kernel_times(folder: Path, num_steps: int) -> "list[dict[str, Any]]":
    """Per step, the kernels that took longest first; those of a GPU, or XLA's threads on a CPU.

    Names that differ only in a number at their end are one kernel (XLA numbers its fusions).

    Raises:
        LookupError: the profile holds no events of a device.
    """
    from jax.profiler import ProfileData

    paths = sorted(folder.rglob("*.xplane.pb"))
    if not paths:
        raise LookupError(f"no profile in {folder}")
    planes = list(ProfileData.from_file(str(paths[-1])).planes)
    gpus = [plane for plane in planes if "/device:GPU" in plane.name]
    total_ns: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for plane in gpus or planes:
        for line in plane.lines:
            # XLA adds lines that repeat the streams' events by module and operation.
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"[._]?\d+$", "", event.name)
                total_ns[name] += event.duration_ns
                count[name] += 1
    if not total_ns:
        raise LookupError(f"{paths[-1].name} holds no events of a device")
    ordered = sorted(total_ns, key=lambda name: -total_ns[name])
    whole_us = sum(total_ns.values()) / num_steps / 1e3
    return [
        {
            "kernel": name[:120],
            "us": round(total_ns[name] / num_steps / 1e3, 2),
            "launches": round(count[name] / num_steps, 1),
            "of_us": round(whole_us, 1),
        }
        for name in ordered
    ]
