"""The list of commands: names, one line about each, and where to find it."""

from typing import Annotated, Any

import typer
import typer.main

import jaxserve
from jaxserve.cli.app import Entry, Group, option

SERVE, MODELS, MEASURE, LOOK = "Serve and ask", "Models", "Measure", "Look and configure"

ENTRIES = {
    "serve": Entry(
        "jaxserve.cli.serve:serve", "serve a model over HTTP, with the OpenAI API", SERVE
    ),
    "generate": Entry("jaxserve.cli.generate:generate", "answer prompts on the terminal", SERVE),
    "convert": Entry(
        "jaxserve.cli.convert:convert", "rewrite a checkpoint as Orbax, which loads faster", MODELS
    ),
    "eval": Entry("jaxserve.cli.evaluate:evaluate", "measure how well a model answers", MEASURE),
    "kv": Entry("jaxserve.cli.kv:group", "look after the tiers of the KV cache", LOOK),
    "config": Entry("jaxserve.cli.configure:group", "show and check settings", LOOK),
    "version": Entry("jaxserve.cli.commands:version", "show the version", LOOK),
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
