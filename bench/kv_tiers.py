"""What the KV tiers gain, and what they cost: TTFT, throughput, decisions and faults.

    python -m bench.kv_tiers [--only revisit,turns,unique,planner-fast,faults] [--out FILE]

Measures jaxserve alone, in process, on a random checkpoint (`bench.peers.checkpoint`):

    revisit   TTFT of 4,000 tokens: computed, from the device, the host, and the disk after restart
    turns     conversations whose blocks are four times what the device holds: tiers on and off
    unique    prompts that have nothing in common, tiers on and off: what they cost in vain
    planner-* short and long prefixes in a slow, normal, fast store: load, recompute, or decide
    faults    TTFT if the store hangs or is very slow

Loading pays where a token's bytes move faster than it is computed. Computing n tokens costs about
n * (a + c * n / 2) seconds, with a = 2 * parameters / F and c = 4 * layers * query heads * head
dim / F at F operations per second; loading them costs n * b / B, with b = 4 * layers * KV heads *
head dim bytes (2-byte keys and values) at B bytes per second. The shape `m150` has b = 16 KiB and
about 0.2 GFLOP per token: at the 0.4 TFLOP/s of two cores that is 0.4 ms for a token, so anything
above 40 MB/s loads faster than it computes, as with an 8B model on an H200 at 4 GB/s. It is the
smallest shape with the proportions of a real model: a smaller one would spend its time on Python.

Prints JSON lines, each with the machine's limits as measured in the same run.
"""

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from bench.peers import checkpoint, machine
from bench.peers_cpu import cache_folder
from bench.tiers import choices, faults, revisit, turns, unique
from bench.tiers.limits import Limits, find_limits
from bench.tiers.setting import PAGE_SIZE, TINY, Setting, Sizes

REPOSITORY = Path(__file__).parent.parent
MEASURES: "dict[str, Callable[[Setting, Limits], Iterator[dict[str, Any]]]]" = {
    "revisit": revisit.measure,
    "turns": turns.measure,
    "unique": unique.measure,
    **{f"planner-{name}": functools.partial(choices.measure, name) for name in choices.STORES},
    "faults": faults.measure,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kv-tiers-", dir=args.folder) as folder:
        setting = Setting(
            model=checkpoint.make(args.shape, args.dtype, args.cache),
            shape=checkpoint.SHAPES[args.shape],
            dtype=args.dtype,
            sizes=TINY if args.shape == "tiny" else Sizes(),
            folder=Path(folder),
            seed=args.seed,
        )
        block_bytes = -(-PAGE_SIZE * setting.token_bytes // 4096) * 4096
        limits = find_limits(
            setting.folder, block_bytes, setting.sizes.prompt * setting.token_bytes
        )
        common: dict[str, Any] = {
            "shape": args.shape,
            "dtype": args.dtype,
            "kv_bytes_per_token": setting.token_bytes,
            "limits": limits.line(),
            **machine.environment(REPOSITORY),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
        }
        for name in args.only:
            before = machine.read_cpu_clock(set())
            lines = list(MEASURES[name](setting, limits))
            others = before.others_share(machine.read_cpu_clock(set()))
            # What other processes took of all CPUs meanwhile.
            common["others_cpu"] = None if others is None else round(others, 3)
            for line in lines:
                _write({"bench": "kv_tiers", **line, **common}, args.out)
    return 0


def _write(line: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(text + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the KV tiers gain and cost, on CPU.")
    parser.add_argument("--only", type=_names, default=[*MEASURES], metavar="MEASURE,...")
    parser.add_argument("--shape", choices=checkpoint.SHAPES, default="m150")
    parser.add_argument("--dtype", choices=checkpoint.DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for checkpoints")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for stores; on a disk"
    )
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    wrong = [name for name in names if name not in MEASURES]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(MEASURES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
