"""The list of commands: names, one line about each, and where to find it."""

from typing import Annotated, Any

import typer
import typer.main

import jaxserve
from jaxserve.cli.app import Entry, Group, option

SERVE, MODELS, MEASURE, LOOK = "Serve and ask", "Models", "Measure", "Look and configure"

_CLI = "jaxserve.cli."

ENTRIES = {
    "serve": Entry(_CLI + "serve:serve", "serve a model over HTTP, with the OpenAI API", SERVE),
    "chat": Entry(_CLI + "chat:chat", "chat with a model on the terminal", SERVE),
    "complete": Entry(_CLI + "chat:complete", "let a model continue texts", SERVE),
    "generate": Entry(_CLI + "generate:generate", "answer prompts, for use in scripts", SERVE),
    "run-batch": Entry(_CLI + "run_batch:run_batch", "answer an OpenAI batch file", SERVE),
    "pull": Entry(_CLI + "models:pull", "fetch a model from the Hugging Face hub", MODELS),
    "list": Entry(_CLI + "models:list_models", "list the models on this machine", MODELS),
    "rm": Entry(_CLI + "models:rm", "delete models from this machine", MODELS),
    "convert": Entry(
        _CLI + "convert:convert", "rewrite a checkpoint as Orbax, which loads faster", MODELS
    ),
    "bench": Entry(_CLI + "bench:group", "measure speed: a server's, or the engine's", MEASURE),
    "eval": Entry(_CLI + "evaluate:evaluate", "measure how well a model answers", MEASURE),
    "kv": Entry(_CLI + "kv:group", "look after the tiers of the KV cache", LOOK),
    "config": Entry(_CLI + "configure:group", "show and check settings", LOOK),
    "doctor": Entry(_CLI + "doctor:doctor", "check this machine, and say what to do", LOOK),
    "version": Entry(_CLI + "commands:version", "show the version", LOOK),
}


def root_group() -> Group:
    """`jaxserve`, with the options that install shell completion."""
    return Group(
        "jaxserve",
        "Serve large language models on JAX/XLA.\n\n"
        "Settings come from flags, JAXSERVE_* variables and a YAML file (--config), in this order; "
        "`jaxserve config show` tells what is in force and why.",
        ENTRIES,
        params=_general_options(),
        callback=lambda **given: None,
    )


def version() -> int:
    """Show the version."""
    print(jaxserve.__version__)
    return 0


def _general_options() -> list[Any]:
    """`--version`, and typer's two about shell completion."""
    app = typer.Typer(add_completion=True)

    def show(value: bool) -> None:
        if value:
            print(jaxserve.__version__)
            raise typer.Exit()

    @app.command()
    def command(
        version: Annotated[
            bool, option("--version", help="show the version", callback=show, is_eager=True)
        ] = False,
    ) -> None: ...

    params = typer.main.get_command(app).params
    for param in params:
        param.default = False  # as in Group
    return params
