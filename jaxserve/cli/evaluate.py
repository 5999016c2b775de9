"""`jaxserve eval`: measures a model in this process, or one behind any OpenAI endpoint."""

from typing import Annotated, Any

import typer

from jaxserve.cli.app import option
from jaxserve.cli.flags import with_model_argument, with_settings
from jaxserve.errors import ConfigError
from jaxserve.settings import Settings, unknown_name

TASKS = ("retrieval",)


@with_model_argument
@with_settings()
def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help=f"what to measure: {', '.join(TASKS)}",
            autocompletion=lambda: TASKS,
        ),
    ],
    *,
    num: Annotated[
        int, option("--num", metavar="N", help="number of prompts; default: 1000")
    ] = 1000,
    url: Annotated[
        str | None,
        option(
            "--url",
            metavar="URL",
            help="ask a running server instead, such as http://host:8000/v1",
        ),
    ] = None,
    settings: Settings,
) -> int:
    """Measure how well a model answers: a table, then one JSON line."""
    if task not in TASKS:
        raise ConfigError(unknown_name("task", task, TASKS))
    if not 1 <= num <= 100_000:
        raise ConfigError(f"--num is {num}; expected 1 to 100000")
    if url and settings.config.model.model:
        raise ConfigError("give either a model or --url")

    from jaxserve.evals import endpoint, retrieval

    if url:
        ask: Any = endpoint.Endpoint(url, settings.config.server.api_key)
        report = retrieval.run(ask, retrieval.embedded_counter(), num)
    else:
        from jaxserve.engine import build_engine
        from jaxserve.llm import LLM
        from jaxserve.progress import Progress

        with Progress() as bars:
            engine = build_engine(settings.config, bars)
        with LLM(engine=engine) as llm:
            ask = retrieval.InProcess(llm)
            report = retrieval.run(ask, retrieval.counter(llm.tokenizer), num)
    print(report.table())
    print(report.json_line())
    return 0
