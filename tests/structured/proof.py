"""Asks a model for many random forms and counts the answers that do not have theirs.

    python -m tests.structured.proof --schemas 1000 --regexes 200 [--bounded] --out FILE

With --bounded no schema lets an answer go on for ever, so that none should be cut.
An answer that max_tokens cut (finish_reason "length") is counted on its own: it is the one kind of
answer that need not have its form.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema

from bench.peers.machine import environment
from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from tests.structured.generate import bounded, random_regex, random_schema

PROMPT = "<|begin|><|user|>Give me an answer.<|end|><|assistant|>"
MAX_TOKENS = 700


@dataclass(frozen=True)
class Outcome:
    """How many answers were valid, cut, and which were invalid."""

    valid: int
    cut: int
    invalid: tuple[str, ...] = ()


def prove(
    llm: LLM,
    schemas: Sequence[Any],
    regexes: Sequence[str],
    seed: int,
    max_tokens: int = 400,
) -> Outcome:
    """Half of the answers greedy, half drawn at temperature 1."""
    forms = [StructuredOutputsParams(json=schema) for schema in schemas]
    forms += [StructuredOutputsParams(regex=regex) for regex in regexes]
    sampling = [
        SamplingParams(
            max_tokens=max_tokens, temperature=float(i % 2), seed=seed + i, structured_outputs=form
        )
        for i, form in enumerate(forms)
    ]
    outputs = llm.generate([PROMPT] * len(forms), sampling, use_tqdm=False)
    valid = cut = 0
    invalid = []
    for form, output in zip(forms, outputs, strict=True):
        (answer,) = output.outputs
        if answer.finish_reason == "length":
            cut += 1
        elif answer.finish_reason == "stop" and fault_of(form, answer.text) is None:
            valid += 1
        else:
            asked = json.dumps(form.json) if form.regex is None else form.regex
            invalid.append(f"{answer.finish_reason}: {asked} -> {answer.text!r}")
    return Outcome(valid, cut, tuple(invalid))


def fault_of(form: StructuredOutputsParams, text: str) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if form.regex is not None:
        return None if re.fullmatch(form.regex, text) else "no match"
    assert isinstance(form.json, dict)
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        validator = jsonschema.Draft202012Validator(form.json, format_checker=checker)
        validator.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--regexes", type=int, default=200)
    parser.add_argument("--bounded", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    schemas = [random_schema(rng) for _ in range(args.schemas)]
    if args.bounded:
        schemas = [bounded(schema) for schema in schemas]
    regexes = [random_regex(rng) for _ in range(args.regexes)]
    start_s = time.perf_counter()
    with LLM(max_num_seqs=32, max_num_batched_tokens=256, max_model_len=1024) as llm:
        outcome = prove(llm, schemas, regexes, args.seed, MAX_TOKENS)
    line = json.dumps(
        {
            "case": "structured output, embedded model",
            "schemas": args.schemas,
            "bounded": args.bounded,
            "regexes": args.regexes,
            "seed": args.seed,
            "max_tokens": MAX_TOKENS,
            **asdict(outcome),
            "elapsed_s": round(time.perf_counter() - start_s, 1),
            **environment(Path(__file__).parents[2]),
        }
    )
    print(line)
    if args.out:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    raise SystemExit(bool(outcome.invalid))


if __name__ == "__main__":
    main()
