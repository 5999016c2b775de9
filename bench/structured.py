"""What enforcing a form costs: decode speed of constrained answers beside free ones.

    python -m bench.structured [--model CHECKPOINT] [--rounds 5] [--out FILE]

Three batches take turns in one process, on the same engine and prompts:

    free          nobody is constrained
    constrained   everybody must write JSON that fits a schema
    mixed         half and half; the speed of the free half is what counts

Answers are of equal length (`ignore_eos`, forms longer than the answers), so all batches run the
same steps. A figure is tokens of one batch over the seconds from its first token to its last, and
`ratio` the median over the rounds of constrained (or mixed) over free of the same round.

The default model is a random Llama of 150 M parameters and 32,000 tokens: with the embedded one a
step takes a millisecond, and the figure would be about Python.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.checkpoint import make
from bench.peers.machine import environment
from jaxserve import LLM, SamplingParams, StructuredOutputsParams

ANSWER_TOKENS = 64
PROMPT_TOKENS = 16
SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 40,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 3, "maxLength": 24},
                    "age": {"type": "integer", "minimum": 0, "maximum": 130},
                    "role": {"enum": ["author", "editor", "reader"]},
                },
                "required": ["name", "age", "role"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}


def measure(llm: LLM, constrained: Sequence[bool], seed: int) -> tuple[float, float]:
    """Tokens per second of the whole batch, and of its free answers."""
    form = StructuredOutputsParams(json=SCHEMA)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(300, 20_000, PROMPT_TOKENS).tolist() for _ in constrained]
    limit = llm.engine.tokenizer.vocab_size
    prompts = [[token % (limit - 10) for token in prompt] for prompt in prompts]
    sampling = [
        SamplingParams(
            max_tokens=ANSWER_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            structured_outputs=form if is_constrained else None,
        )
        for is_constrained in constrained
    ]
    return _drive(llm, prompts, sampling, constrained)


def _drive(
    llm: LLM,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    constrained: Sequence[bool],
) -> tuple[float, float]:
    times: dict[int, list[float]] = {i: [] for i in range(len(constrained))}
    jobs = [
        llm._job(None, prompt, params, "", True)
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    index = {job.requests[0].request_id: i for i, job in enumerate(jobs)}
    engine = llm.engine
    for job in jobs:
        engine.add(job.requests[0])
    while engine.has_work:
        events = engine.step()
        now_s = time.perf_counter()
        for event in events:
            times[index[event.request_id]].append(now_s)
    start_s = max(stamps[0] for stamps in times.values())
    end_s = min(stamps[-1] for stamps in times.values())
    within = [sum(start_s < at <= end_s for at in stamps) for stamps in times.values()]
    free = sum(
        n for n, is_constrained in zip(within, constrained, strict=True) if not is_constrained
    )
    return sum(within) / (end_s - start_s), free / (end_s - start_s)


def compare(llm: LLM, batch: int, rounds: int) -> dict[str, Any]:
    """The three batches in turns."""
    found: dict[str, list[float]] = {"free": [], "constrained": [], "mixed": []}
    ratios: dict[str, list[float]] = {"constrained": [], "mixed": []}
    half = [i % 2 == 1 for i in range(batch)]
    measure(llm, [True] * batch, 0)
    for turn in range(rounds):
        order = ["free", "constrained", "mixed"]
        if turn % 2:
            order.reverse()
        speeds = {}
        for name in order:
            flags = {"free": [False] * batch, "constrained": [True] * batch, "mixed": half}[name]
            whole, free = measure(llm, flags, turn)
            # Of mixed batches, the free half; scaled to a whole batch.
            speeds[name] = (
                whole if name != "mixed" or batch == 1 else free * batch / half.count(False)
            )
        for name, speed in speeds.items():
            found[name].append(speed)
        for name in ratios:
            ratios[name].append(speeds[name] / speeds["free"])
    return {
        "batch": batch,
        "tokens_per_s": {name: round(statistics.median(v), 1) for name, v in found.items()},
        "ratio": {name: round(statistics.median(v), 3) for name, v in ratios.items()},
        "ratios": {name: [round(x, 3) for x in v] for name, v in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; default: a random one")
    parser.add_argument("--dtype", default="bfloat16", help="of the random one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(make("m150", args.dtype, Path(folder)))
        rows = max(args.batches)
        settings = {"max_num_seqs": rows, "max_num_batched_tokens": max(64, rows)}
        with LLM(model, max_model_len=256, **settings) as llm:
            for batch in args.batches:
                line = {
                    "case": "decode under a grammar",
                    "model": args.model or f"random m150, {args.dtype}",
                    "vocab_size": llm.engine.tokenizer.vocab_size,
                    **compare(llm, batch, args.rounds),
                    **environment(Path(__file__).parents[1]),
                }
                print(json.dumps(line), flush=True)
                if args.out:
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
