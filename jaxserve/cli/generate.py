"""`jaxserve generate`: one answer, streamed to standard output."""

import argparse
import sys
import time
from typing import Any

from jaxserve.cli.flags import sampling_of, settings_of
from jaxserve.errors import ConfigError


def generate(args: argparse.Namespace) -> int:
    """Print the answer as it comes; figures go to stderr, if that is a terminal."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.raw and args.system:
        raise ConfigError("--system needs the chat template; leave out --raw")
    # Only the graphs that one answer needs are compiled, when it needs them.
    config = settings_of(args, warmup=False).config

    from jaxserve.engine import build_engine
    from jaxserve.llm import LLM
    from jaxserve.progress import Progress
    from jaxserve.requests import default_sampling

    with Progress() as bars:
        engine = build_engine(config, bars)
    with LLM(engine=engine) as llm:
        sampling = default_sampling(
            llm.tokenizer.generation_config, **{"max_tokens": None, **sampling_of(args)}
        )
        question: Any = prompt
        if not args.raw and (llm.tokenizer.has_chat_template or args.system):
            system = [{"role": "system", "content": args.system}] if args.system else []
            question = [*system, {"role": "user", "content": prompt}]
        started_s = time.monotonic()
        first_s, num_tokens = 0.0, 0
        for delta in llm.stream(question, sampling):
            first_s = first_s or time.monotonic()
            num_tokens += len(delta.token_ids)
            print(delta, end="", flush=True)
        print()
        if sys.stderr.isatty() and num_tokens > 1:
            speed = (num_tokens - 1) / max(time.monotonic() - first_s, 1e-9)
            first = f"first after {first_s - started_s:.2f} s, then {speed:,.0f} tokens/s"
            print(f"({num_tokens} tokens: {first})", file=sys.stderr)
    return 0
