"""`jaxserve eval`: measures a model in this process, or one behind any OpenAI endpoint."""

import argparse
from typing import Any

from jaxserve.cli.flags import settings_of
from jaxserve.errors import ConfigError


def evaluate(args: argparse.Namespace) -> int:
    """Print a table, then one JSON line."""
    if not 1 <= args.num <= 100_000:
        raise ConfigError(f"--num is {args.num}; expected 1 to 100000")
    settings = settings_of(args)
    if args.url and settings.config.model.model:
        raise ConfigError("give either a model or --url")

    from jaxserve.evals import endpoint, retrieval

    if args.url:
        ask: Any = endpoint.Endpoint(args.url, settings.config.server.api_key)
        report = retrieval.run(ask, retrieval.embedded_counter(), args.num)
    else:
        from jaxserve.engine import build_engine
        from jaxserve.llm import LLM
        from jaxserve.progress import Progress

        with Progress() as bars:
            engine = build_engine(settings.config, bars)
        with LLM(engine=engine) as llm:
            ask = retrieval.InProcess(llm)
            report = retrieval.run(ask, retrieval.counter(llm.tokenizer), args.num)
    print(report.table())
    print(report.json_line())
    return 0
