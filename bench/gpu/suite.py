"""Runs all that needs a GPU, part by part, within a time budget: `bench/gpu/suite.sh`.

    [--only limits,kernels] [--skip tests] [--budget 580] [--out FOLDER] [--tiny] [--list]

Each part is a process of its own with its own time limit, so that one that crashes or hangs loses
only itself. Result lines are appended to FOLDER/gpu-DEVICE-DATE.jsonl as they come; what the parts
print goes to a log beside it. At the end, a table. Exits with 1 if a part failed.

`--tiny` runs the same parts on any machine, kernels interpreted: it shows that the suite works.
Knows nothing of what the parts measure; needs only the standard library.
"""

import argparse
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from bench.gpu.parts import BACKGROUND, PARTS, Part
from bench.gpu.report import ROOT, about_machine, append, device_name, read_lines
from bench.gpu.summary import summary

BUDGET_S = 580.0
TINY_LIMIT_S = 900.0
"""Of a part on a machine that may be slow, and busy."""

MIN_S = 12.0
"""A part is not begun with less time than this."""

LOG_TAIL = 1500


def main() -> int:
    args = _parse()
    chosen = _chosen(args)
    if args.list:
        for part in chosen:
            print(f"{part.name:16} {part.limit_s:4.0f} s  {part.what}")
        return 0
    # So that the part that runs is ended with the suite.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start_s = time.monotonic()
    device = device_name()
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    kind = "tiny" if args.tiny else name
    stem = f"gpu-{kind}-{datetime.date.today().isoformat()}"
    out = folder / f"{stem}.jsonl"
    common = about_machine(device) | ({"tiny": True} if args.tiny else {})
    bad = []
    with (folder / f"{stem}.log").open("ab") as log:
        background = None
        if any(part.name == "flashinfer" for part in chosen) and not args.tiny:
            if not _missing(BACKGROUND):
                background = _start(BACKGROUND, out, log, args.tiny, BACKGROUND.limit_s)
        for part in _with_limits_first(chosen, out):
            left_s = TINY_LIMIT_S if args.tiny else start_s + args.budget - time.monotonic()
            if part.name == "flashinfer" and background is not None:
                _wait(background, min(BACKGROUND.limit_s, max(0.0, left_s - MIN_S)))
                left_s = start_s + args.budget - time.monotonic()
            outcome = _run(part, out, log, args.tiny, left_s)
            print(f"[{part.name}] {outcome['outcome']}, {outcome['seconds']} s", flush=True)
            append(out, {"bench": "gpu", "part": part.name, **outcome, **common})
            if outcome["outcome"] not in ("ok", "left out"):
                bad.append(part.name)
        if background is not None:
            _wait(background, 0.0)
    print(summary(list(read_lines(out))))
    print(f"{out}: {time.monotonic() - start_s:.0f} s" + (f"; bad: {', '.join(bad)}" * bool(bad)))
    return 1 if bad else 0


def _parse() -> argparse.Namespace:
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog="bench/gpu/suite.sh", description=f"Parts: {names}")
    parser.add_argument("--only", help="parts to run, by name, in the suite's order")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine")
    parser.add_argument("--list", action="store_true", help="say what would run")
    return parser.parse_args()


def _chosen(args: argparse.Namespace) -> list[Part]:
    """The parts that are asked for.

    Raises:
        SystemExit: there is no part of that name.
    """
    only = args.only.split(",") if args.only else None
    skip = args.skip.split(",") if args.skip else []
    known = {part.name for part in PARTS}
    if unknown := sorted({*(only or ()), *skip} - known):
        raise SystemExit(
            f"no part is named {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    wanted = only or [part.name for part in PARTS if part.is_default or args.tiny]
    return [part for part in PARTS if part.name in wanted and part.name not in skip]


def _with_limits_first(chosen: Sequence[Part], out: Path) -> list[Part]:
    """The machine's limits are needed by all; measured before they are read, if not known yet."""
    has_limits = any("rate" in line for line in read_lines(out) if line.get("part") == "limits")
    if has_limits or any(part.name == "limits" for part in chosen):
        return list(chosen)
    return [PARTS[0], *chosen]


def _missing(part: Part) -> list[str]:
    return [name for name in part.needs if importlib.util.find_spec(name) is None]


def _run(part: Part, out: Path, log: IO[bytes], is_tiny: bool, left_s: float) -> dict[str, Any]:
    """How the part went."""
    if missing := _missing(part):
        return {"outcome": "left out", "why": f"no {', '.join(missing)} here", "seconds": 0}
    if left_s < MIN_S:
        return {"outcome": "no time left", "seconds": 0}
    limit_s = min(TINY_LIMIT_S if is_tiny else part.limit_s, left_s)
    start_s, start_byte = time.monotonic(), log.tell()
    process = _start(part, out, log, is_tiny, limit_s)
    code = _wait(process, limit_s)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start_s, 1)}
    if code == 0:
        return {"outcome": "ok", **found}
    log.flush()
    tail = Path(log.name).read_bytes()[start_byte:][-LOG_TAIL:].decode(errors="replace")
    outcome = f"stopped after {limit_s:.0f} s" if code is None else f"failed with {code}"
    print(tail, flush=True)
    return {"outcome": outcome, "log_tail": tail, **found}


def _start(
    part: Part, out: Path, log: IO[bytes], is_tiny: bool, limit_s: float
) -> "subprocess.Popen[bytes]":
    log.write(f"\n=== {part.name}\n".encode())
    log.flush()
    if part.module:
        # A part that knows what can be left out ends a little earlier by itself.
        seconds = str(max(1.0, limit_s - 8.0))
        command = ["-m", "bench.gpu.part", part.name, "--out", str(out), "--seconds", seconds]
        command += ["--tiny"] if is_tiny else []
    else:
        chosen = [] if part.name == "tests" else ["-k", "quick"]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
        command += [*chosen, "--durations=10", f"--junitxml={out.with_suffix('')}-{part.name}.xml"]
    variables = _environment(is_tiny, part.xla_flags)
    if not part.module:  # tests start engines in processes of their own, beside this one
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if part is BACKGROUND:
        command = ["-c", "import os, runpy, sys; os.nice(15); sys.argv = sys.argv[1:]; "
                   "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)",
                   *command[1:]]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _environment(is_tiny: bool, xla_flags: str) -> "dict[str, str]":
    """One compile cache for all parts, and nearly all of the device's memory for each."""
    variables = dict(os.environ)
    if xla_flags:
        variables["XLA_FLAGS"] = f"{variables.get('XLA_FLAGS', '')} {xla_flags}".strip()
    cache = ROOT / ".cache" / "gpu-suite"
    path = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    variables |= {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.90",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "GPU_SUITE": "tiny" if is_tiny else "full",
    }
    # A GPU's process has the CPU as well, as the reference of some tests.
    if is_tiny:  # most of the time is compiling
        flags = variables.get("XLA_FLAGS", "")
        variables["XLA_FLAGS"] = (
            f"{flags} --xla_backend_optimization_level=0"
            # The interpreter of Mosaic wants a thread for each warpgroup.
            " --xla_force_host_platform_device_count=4"
        )
    variables["JAX_PLATFORMS"] = "cpu" if is_tiny else variables.get("JAX_PLATFORMS", "cuda,cpu")
    return variables


def _wait(process: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    """The exit code; None if its time was up, and it and its children were killed."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        pass
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            return None
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.wait()
    return None


if __name__ == "__main__":
    sys.exit(main())
