"""Over-committed load over all tiers for long: what grows, what compiles, what leaks.

    python -m bench.kv_soak [--minutes 60] [--folder FOLDER] [--max-bytes 64MiB]

Conversations of the embedded model grow, fork, are aborted and come back, with pages for a
fraction of them, a host tier that holds some more, and a disk store within `--max-bytes`. Sampled
in every step: resident memory, and every second: bytes on disk. Prints one JSON line: slope of the
resident memory after a warm-up of a quarter of the time, compilations, the largest use of the disk,
and what is still held when everything has ended.

The slope is that of the lowest memory of each minute, since buffers of a step come and go by some
MB. Minima that scatter by 2 MB tell a slope to 7 MB per hour in 20 minutes, and to 1.3 in an hour;
the line has the standard error beside the slope.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from jaxserve.engine import Engine, build_engine
from jaxserve.settings import BYTE_UNITS
from jaxserve.types import Request, SamplingParams

NUM_USERS = 40
MAX_LEN = 1024


class Load:
    """Users whose conversations grow until they are full, and then start again."""

    def __init__(self, engine: Engine, seed: int):
        self._engine = engine
        self._random = random.Random(seed)
        self._vocab = engine.model.config.vocab_size
        self._talks: list[list[int]] = [[] for _ in range(NUM_USERS)]
        self._live: dict[str, int] = {}
        self._shared = self._words(200)
        self.num_requests = self.num_aborted = self.num_tokens = 0

    def _words(self, count: int) -> list[int]:
        return [self._random.randrange(5, self._vocab) for _ in range(count)]

    def _ask(self) -> None:
        user = self._random.randrange(NUM_USERS)
        if user in self._live.values():
            return
        talk = self._talks[user]
        if not talk or len(talk) > MAX_LEN - 200:
            talk[:] = self._shared[: self._random.choice([0, 100, 200])]
        talk += self._words(self._random.randint(1, 60))
        name = f"q{self.num_requests}"
        sampling = SamplingParams(
            temperature=self._random.choice([0.0, 0.9]),
            seed=self._random.randrange(1 << 30),
            max_tokens=self._random.randint(4, 60),
            ignore_eos=True,
        )
        priority = self._random.randrange(3)
        self._engine.add(Request(name, tuple(talk), sampling, priority=priority))
        self._live[name] = user
        self.num_requests += 1

    def step(self) -> None:
        """Maybe ask, maybe abort, and run a step of the engine."""
        while len(self._live) < 24 and self._random.random() < 0.5:
            self._ask()
        if self._live and self._random.random() < 0.01:
            name = self._random.choice(list(self._live))
            self._engine.abort(name)
            del self._live[name]
            self.num_aborted += 1
        for event in self._engine.step():
            user = self._live[event.request_id]
            if event.token_id is not None:
                self._talks[user].append(event.token_id)
                self.num_tokens += 1
            if event.finish_reason is not None:
                del self._live[event.request_id]

    def drain(self) -> None:
        """Let what is live come to its end."""
        while self._engine.has_work:
            for event in self._engine.step():
                if event.finish_reason is not None:
                    self._live.pop(event.request_id, None)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue
    return total


def slope_per_hour(
    minutes: np.ndarray, values: np.ndarray, first_minute: float
) -> tuple[float, float] | tuple[None, None]:
    """Slope of `values` from `first_minute` on and its standard error; None for under 5 minutes."""
    x, y = minutes[minutes >= first_minute] / 60, values[minutes >= first_minute]
    if len(x) < 5:
        return None, None
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(covariance[0, 0]) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--folder", help="where the disk store is kept meanwhile")
    parser.add_argument("--max-bytes", default="64MiB")
    args = parser.parse_args()
    number = args.max_bytes.rstrip("KMGTiB")
    max_bytes = int(number) * BYTE_UNITS[args.max_bytes[len(number) :]]
    folder = Path(tempfile.mkdtemp(prefix="kv-soak-", dir=args.folder))
    try:
        print(json.dumps(soak(folder, max_bytes, args.minutes * 60)), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(folder: Path, max_bytes: int, duration_s: float) -> dict[str, Any]:
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    engine = build_engine(
        Config(
            model=ModelConfig(max_model_len=MAX_LEN),
            cache=CacheConfig(
                num_pages=200,
                kv_host_bytes=16 << 20,
                kv_store=f"file://{folder}/kv?max_bytes={max_bytes}",
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=16, max_num_batched_tokens=256, policy="priority"
            ),
        )
    )
    load = Load(engine, seed=1)
    start = time.monotonic()
    samples: list[tuple[float, int]] = []
    lowest: dict[int, int] = {}
    jax.monitoring.register_event_duration_secs_listener(listen)
    while (now := time.monotonic() - start) < duration_s:
        if not samples or now - samples[-1][0] >= 1.0:
            samples.append((now, disk_bytes(folder / "kv")))
            engine.check_integrity()
        load.step()
        minute, bytes_ = int(now // 60), resident_bytes()
        lowest[minute] = min(bytes_, lowest.get(minute, bytes_))
    load.drain()
    assert engine.lower is not None
    is_flushed = engine.lower.flush(engine.step, 30.0)
    engine.check_integrity()
    stats, host = engine.stats(), engine.lower.tiers.host
    minutes, memory = (np.array(list(column), float) for column in (lowest, lowest.values()))
    slope, error = slope_per_hour(minutes, memory, duration_s / 60 / 4)
    result = {
        "bench": "kv_soak",
        "minutes": round(duration_s / 60, 2),
        "rss_slope_mb_per_hour": slope and round(slope / 1e6, 2),
        "rss_slope_standard_error": error and round(error / 1e6, 2),
        "rss_mb_lowest_by_minute": [round(bytes_ / 1e6, 1) for bytes_ in memory],
        "compilations": len(compilations),
        "disk_max_bytes": max_bytes,
        "disk_highest_bytes": max(bytes_ for _, bytes_ in samples),
        "requests": load.num_requests,
        "aborted": load.num_aborted,
        "tokens": load.num_tokens,
        "preemptions": stats.num_preemptions,
        "recomputed_tokens": stats.recomputed_tokens,
        "loaded_blocks": dict(engine.lower.tiers.counters.loaded),
        "host_evictions": host.num_evicted,
        "pages_held_at_end": sum(group.num_in_use for group in stats.pages),
        "slots_held_at_end": sum(host._references),
        "flushed": is_flushed,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    engine.close()
    return result


if __name__ == "__main__":
    main()
