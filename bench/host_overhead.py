"""Host microseconds per engine step: schedule, pack, apply. Needs no model and no accelerator.

    python bench/host_overhead.py [--steps 2000]

Prints one JSON line per case. Steady decoding, with page boundaries spread over the steps:

    decode         every slot decodes, nobody waits or 10,000 wait for a slot
    churn          answers of 32 tokens: each step admits what finished (128-token prompts)
    pages_short    like churn, but pages for half of the slots: somebody is refused at each step
    window         like decode, with a full and a sliding-window KV group

`pack_us` is the host side of batch building (`jaxserve.batch.pack`), `total_us` the sum. Each
figure is a mean over the steps; `*_p99_us` shows the slowest ones. The clock is the thread's CPU
time, which is the elapsed time on an idle machine: nothing here waits.
"""

import argparse
import gc
import json
import platform
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from time import thread_time_ns
from typing import Any

import numpy as np

from jaxserve.batch import StateShape, pack
from jaxserve.config import SchedulerConfig
from jaxserve.plan import StepPlan, StepResult
from jaxserve.scheduler import Scheduler, default_buckets
from jaxserve.types import KVGroup, LayerCache, Request, SamplingParams

PAGE_SIZE = 16
MAX_MODEL_LEN = 8192
VOCAB_SIZE = 32_000
WARM_UP_STEPS = 200


@dataclass(frozen=True, slots=True)
class Case:
    """One measured situation."""

    name: str
    num_running: int
    num_waiting: int
    prompt_tokens: int = 64
    max_tokens: int = MAX_MODEL_LEN
    windows: tuple[int | None, ...] = (None,)
    slots_per_running: int = 1
    num_pages: int = 1 << 18


@dataclass(slots=True)
class Timings:
    """Nanoseconds per step."""

    schedule: list[int] = field(default_factory=list)
    pack: list[int] = field(default_factory=list)
    apply: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


CASES = (
    *(Case("decode", n, w) for n in (1, 64, 256) for w in (0, 10_000)),
    *(Case("churn", n, 50_000, prompt_tokens=128, max_tokens=32) for n in (64, 256)),
    *(
        Case("pages_short", n, 50_000, 128, 32, slots_per_running=2, num_pages=n * 10)
        for n in (64, 256)
    ),
    *(Case("window", n, 0, windows=(None, 1024)) for n in (64, 256)),
)


def make_scheduler(case: Case) -> Scheduler:
    """A scheduler in which the case's running sequences fit."""
    slots = case.num_running * case.slots_per_running
    groups = tuple(
        KVGroup(i, (i,), LayerCache(8, 128, window)) for i, window in enumerate(case.windows)
    )
    config = SchedulerConfig(max_num_seqs=slots, max_num_batched_tokens=2048)
    return Scheduler(
        scheduler_config=config,
        kv_groups=groups,
        num_pages=tuple(case.num_pages for _ in groups),
        page_size=PAGE_SIZE,
        max_model_len=MAX_MODEL_LEN,
        namespace_root=bytes(32),
        enable_prefix_caching=True,
        buckets=default_buckets(slots, config.max_num_batched_tokens),
    )


def add_requests(scheduler: Scheduler, case: Case, rng: random.Random) -> None:
    """The running sequences and those that wait behind them."""
    shared = rng.choices(range(3, VOCAB_SIZE), k=case.prompt_tokens + PAGE_SIZE)
    for index in range(case.num_running + case.num_waiting):
        length = case.prompt_tokens + rng.randrange(PAGE_SIZE)
        sampling = SamplingParams(temperature=0.0, max_tokens=case.max_tokens, seed=index)
        prompt = (*divmod(index, VOCAB_SIZE), *shared[: length - 2])
        scheduler.add(Request(str(index), prompt, sampling, (2,), arrival_s=float(index)))


def measure(case: Case, num_steps: int) -> Timings:
    """Run the loop one step ahead, with a device that answers at once."""
    rng = random.Random(0)
    scheduler = make_scheduler(case)
    add_requests(scheduler, case, rng)
    shape = StateShape(
        num_slots=case.num_running * case.slots_per_running,
        num_groups=len(case.windows),
        max_len=MAX_MODEL_LEN,
        table_width=MAX_MODEL_LEN // PAGE_SIZE,
        vocab_size=VOCAB_SIZE,
        page_size=PAGE_SIZE,
    )
    timings = Timings()
    plan = scheduler.schedule()
    assert plan is not None
    gc.collect()
    gc.freeze()
    for step in range(WARM_UP_STEPS + num_steps):
        if step == WARM_UP_STEPS:
            timings = Timings()
        following = timed(timings.schedule, scheduler.schedule)
        assert following is not None, "the case has run dry"
        timed(timings.pack, pack, following, shape)
        timed(timings.apply, scheduler.apply, plan, fake_result(plan))
        timings.rows.append(plan.num_rows)
        plan = following
    return timings


def fake_result(plan: StepPlan) -> StepResult:
    """Tokens that end nothing."""
    return StepResult(np.full(plan.num_rows, 5, np.int32))


def timed(into: list[int], function: Callable[..., Any], *args: Any) -> Any:
    """Call a function and note how long it took."""
    start = thread_time_ns()
    value = function(*args)
    into.append(thread_time_ns() - start)
    return value


def report(case: Case, timings: Timings) -> dict[str, Any]:
    """The figures of one case."""
    parts = {
        "schedule": np.array(timings.schedule) / 1e3,
        "pack": np.array(timings.pack) / 1e3,
        "apply": np.array(timings.apply) / 1e3,
    }
    total = parts["schedule"] + parts["pack"] + parts["apply"]
    line: dict[str, Any] = {
        "bench": "host_overhead",
        "case": case.name,
        "running": case.num_running,
        "waiting": case.num_waiting,
        "steps": len(total),
        "rows": round(float(np.mean(timings.rows)), 1),
    }
    for name, values in {**parts, "total": total}.items():
        line[f"{name}_us"] = round(float(values.mean()), 1)
        line[f"{name}_p99_us"] = round(float(np.percentile(values, 99)), 1)
    return line


def environment() -> dict[str, str]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time per engine step.")
    parser.add_argument("--steps", type=int, default=2000, help="measured steps per case")
    args = parser.parse_args()
    for case in CASES:
        line = report(case, measure(case, args.steps)) | environment()
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
