"""Compiles all jobs and holds what comes out to the bounds; run it through `python -m tests.aot`.

    [--targets h200,v5e,v6e] [--backends ...] [--only REGEX] [--list] [--out FILE]

Prints a JSON line for each job, and what is going on to stderr. `limit_us` is the time that the
device of the data sheet needs at least, for what the job must move and compute.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tests.aot.compilers import TARGETS, Compiler, Program
from tests.aot.engine_step import step_jobs
from tests.aot.expert_jobs import expert_jobs, latent_jobs
from tests.aot.fusion_jobs import fusion_jobs
from tests.aot.gpu_kernels import GpuKernel
from tests.aot.hlo import find_copies
from tests.aot.jobs import BACKENDS, Job, jobs_for
from tests.aot.latent_step import latent_step_jobs

IS_OLD_JAX = jax.__version_info__ < (0, 11)

MAX_SPILL_BYTES = 32 if IS_OLD_JAX else 0
"""Of a thread, stored and loaded; a kernel that spills wants smaller tiles or another layout. With
jax 0.10 prefill on Hopper spills four registers of its 168, with 0.11, which GPUs get, none."""

MAX_WIDE_SPILL_BYTES = 292 if IS_OLD_JAX else 252
"""The same with heads of 256 and a soft cap, the widest that prefill on Hopper takes: there the
accumulator alone is 128 registers of the 240 that a thread has."""

MAX_TEMP_FRACTION = 1 / 8
"""Of the pool: temporaries beyond this mean that something copies a part of it."""


MAX_VARIANTS = 2
"""Of one kernel in a program; each takes its second to compile, in each of the buckets."""


class Limits(NamedTuple):
    """Data sheet figures of one device: HBM bandwidth and dense rate of 16-bit products."""

    bytes_per_s: float
    flops_per_s: float


LIMITS = {
    "h200": Limits(4.8e12, 989e12),
    "v5e": Limits(819e9, 197e12),
    "v6e": Limits(1640e9, 918e12),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    names = {name for names in BACKENDS.values() for name in names}
    parser.add_argument("--backends", default=",".join(sorted(names)))
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="of titles")
    parser.add_argument("--list", action="store_true", help="say what there is to compile")
    parser.add_argument("--out", type=Path, help="write the lines to a file, too")
    options = parser.parse_args()
    start, commit = time.perf_counter(), _commit()
    lines, num_bad = [], 0
    for target in options.targets.split(","):
        backends = options.backends.split(",")
        all_jobs = [
            *jobs_for(target, backends),
            *latent_jobs(target, backends),
            *expert_jobs(target, backends),
            *fusion_jobs(target),
            *latent_step_jobs(target),
            *step_jobs(target),
        ]
        jobs = [x for x in all_jobs if options.only.search(_title(target, x))]
        if options.list:
            print(*(_title(target, job) for job in jobs), sep="\n")
            continue
        compiler = Compiler(target) if jobs else None
        for index, job in enumerate(jobs, 1):
            assert compiler is not None
            line = _run(compiler, job) | {"jax": jax.__version__, "commit": commit}
            num_bad += bool(line["violations"])
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
            outcome = "; ".join(line["violations"]) or line.get("refused") or "ok"
            _say(f"[{index}/{len(jobs)}] {_title(target, job)}: {outcome}")
    if options.out:
        options.out.write_text("".join(line + "\n" for line in lines))
    if not options.list:
        _say(f"{len(lines)} compiled, {num_bad} bad, {time.perf_counter() - start:.0f} s")
    return 1 if num_bad or not (lines or options.list) else 0


def _title(target: str, job: Job) -> str:
    return f"{target} {job.backend} {job.name}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(compiler: Compiler, job: Job) -> dict[str, Any]:
    """The job's line."""
    limits = LIMITS[compiler.name]
    bandwidth_us = job.bytes_moved / limits.bytes_per_s * 1e6
    compute_us = job.flops / limits.flops_per_s * 1e6
    line: dict[str, Any] = {
        "bench": "kernels_aot",
        "target": compiler.name,
        "backend": job.backend,
        "job": job.name,
        **job.facts,
        "bytes": job.bytes_moved,
        "flops": job.flops,
        "limit_us": round(max(bandwidth_us, compute_us), 2),
        "limited_by": "bandwidth" if bandwidth_us >= compute_us else "compute",
    }
    try:
        program = compiler.compile(job.function, job.args, donate=job.donate)
    except NotImplementedError as error:
        violations = [] if job.may_refuse else [f"refused: {error}"]
        return line | {"refused": str(error), "violations": violations}
    except Exception as error:  # whatever the compilers say is the finding
        return line | {"violations": [f"{type(error).__name__}: {error}"[:2000]]}
    return line | {
        "kernels": [_describe(kernel) for kernel in program.kernels],
        "num_launches": program.num_launches,
        "temp_bytes": program.temp_bytes,
        "alias_bytes": program.alias_bytes,
        "lower_s": round(program.lower_s, 2),
        "compile_s": round(program.compile_s, 2),
        "violations": list(_violations(job, program)),
    }


def _describe(kernel: GpuKernel) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "grid": list(kernel.grid),
        "threads": kernel.threads,
        "smem_bytes": kernel.smem_bytes,
        **asdict(kernel.ptxas),
        "blocks_per_sm": kernel.blocks_per_sm,
        "occupancy": round(kernel.occupancy, 3),
    }


def _violations(job: Job, program: Program) -> Iterator[str]:
    """What breaks a bound."""
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.pool)]
    for copy in find_copies(program.hlo, min(sizes) // 2):
        yield f"makes an array as large as the pool: {copy}"
    if program.temp_bytes > max(sizes) * MAX_TEMP_FRACTION + (64 << 20):
        yield f"needs {program.temp_bytes} bytes of temporaries beside a pool of {sum(sizes)}"
    if job.donate and program.alias_bytes < sum(sizes):
        yield f"updates {program.alias_bytes} bytes in place; expected all {sum(sizes)} of the pool"
    for name, count in Counter(kernel.name for kernel in program.kernels).items():
        if count > MAX_VARIANTS:
            yield f"compiles {count} variants of {name}; expected layers to share them"
    for kernel in program.kernels:
        if kernel.ptxas.spill_bytes > _max_spill_bytes(job):
            yield f"{kernel.name} spills {kernel.ptxas.spill_bytes} bytes"
        if kernel.blocks_per_sm < 1:
            yield f"{kernel.name} does not fit on an SM: {kernel}"


def _max_spill_bytes(job: Job) -> int:
    is_widest = job.facts.get("head_dim") == 256 and job.facts.get("soft_cap")
    return MAX_WIDE_SPILL_BYTES if is_widest else MAX_SPILL_BYTES


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
