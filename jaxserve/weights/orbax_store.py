"""Parameter trees in Orbax's format: written once, restored straight into a dtype and sharding.

    FOLDER/config.json, tokenizer files   as in the checkpoint it was made from
    FOLDER/jaxserve.json                  what was written, and the digest of the original weights
    FOLDER/orbax/                         the tree of `models.decoder.param_specs`

Orbax checks each chunk it reads against a checksum. Knows nothing of Hugging Face names.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.errors import WeightsError
from jaxserve.models.spec import Params, abstract_params, is_spec
from jaxserve.sharding import make_mesh
from jaxserve.weights.safetensors import read_json

METADATA_NAME = "jaxserve.json"
TREE_NAME = "orbax"
_FORMAT = 1


@dataclass(frozen=True)
class StoreMetadata:
    """What jaxserve.json says.

    Attributes:
        weights_digest: of the tensors that were converted.
        dtype: of the stored tree.
        tied: the tree has no output head of its own.
    """

    weights_digest: str
    dtype: str
    tied: bool


def is_store(folder: Path) -> bool:
    return (folder / METADATA_NAME).is_file() or (folder / TREE_NAME).is_dir()


def read_metadata(folder: Path) -> StoreMetadata:
    path = folder / METADATA_NAME
    values = read_json(path)
    if values.get("format") != _FORMAT:
        raise WeightsError(
            f"{path}: field 'format' is {values.get('format')!r}; expected {_FORMAT}: convert the "
            "checkpoint again"
        )
    kinds = {field.name: field.type for field in dataclasses.fields(StoreMetadata)}
    for name, kind in kinds.items():
        if type(values.get(name)) is not kind:
            raise WeightsError(f"{path}: field {name!r} is {values.get(name)!r}")
    return StoreMetadata(**{name: values[name] for name in kinds})


def save(folder: Path, params: Params, metadata: StoreMetadata) -> None:
    """Write tree and metadata into an existing folder."""
    import orbax.checkpoint as ocp

    _quiet()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / TREE_NAME).resolve(), params)
    values = {"format": _FORMAT, **dataclasses.asdict(metadata)}
    (folder / METADATA_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def restore(folder: Path, specs: Params, dtype: str, mesh: Mesh | None) -> Params:
    """The stored tree, cast to `dtype` and laid out over `mesh` while it is read.

    Raises:
        WeightsError: the tree is not there, damaged, or not the one that `specs` describes.
    """
    import orbax.checkpoint as ocp

    _quiet()
    target = abstract_params(specs, jnp.dtype(dtype), mesh or make_mesh(1))
    place = (folder / TREE_NAME).resolve()
    if not place.is_dir():
        raise WeightsError(f"{place}: is missing; convert the checkpoint again")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            _check_shapes(place, specs, checkpointer.metadata(place).item_metadata)
            params = checkpointer.restore(place, target)
        except WeightsError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            reason = str(error).strip().splitlines()
            raise WeightsError(
                f"{place}: cannot be restored: {type(error).__name__}: "
                f"{reason[0][:300] if reason else ''}"
            ) from error
    if mesh is None:
        params = jax.tree.map(lambda x: x.addressable_data(0), params)
    return params


def _check_shapes(place: Path, specs: Params, stored: Any) -> None:
    """Compare shapes by path; Orbax itself would pad or cut what does not fit."""

    def flatten(tree: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.flatten_with_path(tree, **kwargs)[0]
        return {jax.tree_util.keystr(k, simple=True, separator="/"): x.shape for k, x in leaves}

    tree = getattr(stored, "tree", stored)
    expected, found = flatten(specs, is_leaf=is_spec), flatten(tree)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            state = "missing" if name not in found else "not part of this model"
            raise WeightsError(f"{place}: tensor {name!r} is {state}")
        if tuple(found[name]) != expected[name]:
            raise WeightsError(
                f"{place}: tensor {name!r} has shape {tuple(found[name])}; expected "
                f"{expected[name]}"
            )


def _quiet() -> None:
    """Orbax logs each step of a save or restore through absl."""
    logging.getLogger("absl").setLevel(logging.ERROR)
