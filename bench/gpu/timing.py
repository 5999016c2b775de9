"""Times what runs on the device, without the host's part in it.

A body is repeated in one compiled loop, whose length is static: XLA then launches one iteration
after the other without asking the device. What the loop carries keeps every iteration needed. The
time of an iteration is that of a long loop over its length, the median of a few.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

TARGET_S = 0.05
"""Of one loop: long beside the few hundred microseconds that it takes to start it."""

MAX_ITERATIONS = 4000
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one iteration."""

    median_s: float
    best_s: float
    iterations: int
    compile_s: float

    def facts(self) -> dict[str, Any]:
        return {
            "us": round(self.median_s * 1e6, 2),
            "best_us": round(self.best_s * 1e6, 2),
            "iterations": self.iterations,
            "compile_s": round(self.compile_s, 2),
        }


def time_loop(
    body: Callable[[Any, Any, Any], Any],
    carry: Any,
    operands: Any,
    *,
    expected_s: float,
    is_tiny: bool = False,
) -> Timing:
    """Time `carry = body(index, carry, operands)`; the carry is donated from call to call.

    Args:
        expected_s: a guess that decides how often the body is repeated.
    """
    count = int(TARGET_S / max(expected_s, 1e-7))
    count = 1 if is_tiny else max(3, min(count, MAX_ITERATIONS))

    def loop(carry: Any, operands: Any) -> Any:
        return lax.fori_loop(0, count, lambda index, x: body(index, x, operands), carry)

    start_s = time.perf_counter()
    run = jax.jit(loop, donate_argnums=0).lower(carry, operands).compile()
    compile_s = time.perf_counter() - start_s
    if not is_tiny:
        carry = jax.block_until_ready(run(carry, operands))
    times_s = []
    for _ in range(1 if is_tiny else REPEATS):
        start_s = time.perf_counter()
        carry = jax.block_until_ready(run(carry, operands))
        times_s.append((time.perf_counter() - start_s) / count)
    return Timing(statistics.median(times_s), min(times_s), count, compile_s)


def time_call(function: Callable[[], Any], *, repeats: int = REPEATS) -> float:
    """Seconds of a call that yields arrays, from the host's clock: the median."""
    jax.block_until_ready(function())
    times_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        jax.block_until_ready(function())
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)
