"""`jaxserve pull | list | rm`: the models on this machine."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.app import option
from jaxserve.errors import ConfigError, JaxserveError, WeightsError
from jaxserve.settings import unknown_name

if TYPE_CHECKING:
    from jaxserve.weights.catalogue import LocalModel


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="hub name, such as org/model")],
    *,
    revision: Annotated[
        str | None,
        option("--revision", metavar="NAME", help="branch, tag or commit; default: main"),
    ] = None,
    force: Annotated[
        bool, option("--force", help="fetch a model that cannot be served, too")
    ] = False,
) -> int:
    """Fetch a model from the Hugging Face hub into its cache.

    Looks at the model's config first, so that no weights are fetched that cannot be served. A
    fetch that was cut short goes on where it stopped. HF_TOKEN, HF_ENDPOINT and HF_HOME count as
    for every tool of the hub.
    """
    from jaxserve.doctor.finding import size
    from jaxserve.weights.catalogue import describe
    from jaxserve.weights.loader import resolve_model

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name!r:.80} is no hub name; expected one such as org/model")
    if not force:
        _check_servable(name, revision)
    folder = resolve_model(name, revision)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    model = describe(name, "hub", folder, num_bytes)
    print(f"{name}: {size(num_bytes)}, {model.architecture}, {model.dtype}, in {folder}")
    if model.problem:
        print(f"jaxserve: it cannot be served: {model.problem}", file=sys.stderr)
        return 0 if force else 1
    print(f"  jaxserve serve {name}")
    return 0


def list_models(*, as_json: Annotated[bool, option("--json", help="print JSON")] = False) -> int:
    """List the models on this machine: the hub's cache, and what `convert` has written."""
    from jaxserve.weights.catalogue import local_models

    models = local_models()
    if as_json:
        print(json.dumps([_as_json(model) for model in models], indent=1))
    elif not models:
        print("no models; fetch one with `jaxserve pull org/model`")
    else:
        _print(models)
    return 0


def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="as `jaxserve list` shows them")
    ],
    *,
    yes: Annotated[bool, option("--yes", "-y", help="do not ask")] = False,
) -> int:
    """Delete models from this machine, after asking."""
    from jaxserve.doctor.finding import size
    from jaxserve.weights.catalogue import local_models, remove

    known = {model.name: model for model in local_models()}
    for name in names:
        if name not in known:
            raise ConfigError(
                unknown_name("model", name, known) if known else "there are no models"
            )
    for model in (known[name] for name in dict.fromkeys(names)):
        what = f"{model.name} ({size(model.num_bytes)}, {model.folder})"
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(f"{what} was not deleted: nobody is there to ask; give --yes")
            if not typer.confirm(f"Delete {what}?"):
                print("kept")
                continue
        print(f"deleted {model.name}, {size(remove(model))} freed")
    return 0


def _check_servable(name: str, revision: str | None) -> None:
    """Refuse a model by its config, before gigabytes are fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from jaxserve.models.registry import read_config
    from jaxserve.weights.safetensors import read_json

    disable_progress_bars()
    try:
        path = hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:  # the hub client raises many kinds, from network to permission
        reason = (str(error).strip().splitlines() or [""])[0]
        raise WeightsError(
            f"{name}: its config.json cannot be fetched: {type(error).__name__}: {reason[:300]}"
        ) from error
    finally:
        enable_progress_bars()
    try:
        read_config(read_json(Path(path)), "config.json")
    except WeightsError as error:
        raise JaxserveError(f"{name} cannot be served: {error} (--force fetches it)") from error


def _as_json(model: "LocalModel") -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "folder": str(model.folder),
        "num_bytes": model.num_bytes,
        "architecture": model.architecture,
        "dtype": model.dtype,
        "servable": not model.problem,
        "problem": model.problem or None,
        "revisions": list(model.revisions),
    }


def _print(models: "list[LocalModel]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jaxserve.doctor.finding import size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("architecture", overflow="fold")
    table.add_column("servable", overflow="fold")
    for model in models:
        text = Text(f"no: {model.problem}", style="yellow") if model.problem else Text("yes")
        name = model.name if model.kind == "hub" else f"{model.name} (orbax)"
        table.add_row(name, size(model.num_bytes), model.dtype, model.architecture, text)
    Console(highlight=False).print(table)
