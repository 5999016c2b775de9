"""What the parts that time torch share: the device, and times from its own events."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# pyright: reportMissingImports=false
import torch

REPEATS = 20


def torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def time_torch(functions: "list[Callable[[], Any]]", *, repeats: int = REPEATS) -> float:
    """Seconds of a call, the median; calls take turns with the functions (other data each)."""
    for function in functions:
        function()
    if torch_device() == "cpu":
        times_s = []
        for index in range(2):
            start_s = time.perf_counter()
            functions[index % len(functions)]()
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s)
    torch.cuda.synchronize()
    # All are enqueued before one is waited for, so that the host is never in the way.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for index in range(repeats):
        functions[index % len(functions)]()
        events[index + 1].record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3
