"""`jaxserve convert`: a checkpoint in the layout that loads straight into any sharding."""

from typing import Annotated

import typer

from jaxserve.cli.app import option


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="checkpoint folder or hub name")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="new folder")],
    *,
    revision: Annotated[
        str | None,
        option("--revision", metavar="NAME", help="hub revision (branch, tag or commit)"),
    ] = None,
) -> int:
    """Rewrite a checkpoint as Orbax, which loads faster."""
    from jaxserve.weights import convert_checkpoint
    from jaxserve.weights.catalogue import note_conversion

    folder = convert_checkpoint(src, dst, revision=revision)
    note_conversion(folder)
    print(folder)
    return 0
