"""Parameter trees in Orbax's format: written once, restored straight into a dtype and sharding.

    FOLDER/config.json, tokenizer files   as in the checkpoint it was made from
    FOLDER/jaxserve.json                  what was written, and digests of it and of its origin
    FOLDER/orbax/                         the tree of `models.decoder.param_specs`

Orbax writes the tree. It is read through tensorstore, on which Orbax is built, chunk by chunk into
the memory that the device takes over: Orbax's own restore peaks at 1.5 to 2 times the weights.
Knows nothing of Hugging Face names.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxserve.errors import WeightsError
from jaxserve.models.spec import Params, ParamSpec, is_spec
from jaxserve.sharding import named_sharding
from jaxserve.weights import fingerprint
from jaxserve.weights.safetensors import aligned_empty, read_json

METADATA_NAME = "jaxserve.json"
TREE_NAME = "orbax"
_FORMAT = 1
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class StoreMetadata:
    """What jaxserve.json says.

    Attributes:
        weights_digest: of the tensors that were converted.
        files_digest: of the files below `orbax`.
        dtype: of the stored tree.
        tied: the tree has no output head of its own.
    """

    weights_digest: str
    files_digest: str
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


def save(folder: Path, params: Params, *, weights_digest: str, dtype: str, tied: bool) -> None:
    """Write tree and metadata into an existing folder."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs each step through it
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Uncompressed: weights hardly shrink, and load 2-3 times slower if they must be unpacked.
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, save_concurrent_gb=2 + largest // 10**9
    )
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    with ocp.Checkpointer(handler) as checkpointer:
        place = (folder / TREE_NAME).resolve()
        checkpointer.save(place, args=ocp.args.PyTreeSave(params, save_args=args))
    digest = fingerprint.files_digest(folder, _tree_files(folder))
    metadata = StoreMetadata(weights_digest, digest, dtype, tied)
    values = {"format": _FORMAT, **dataclasses.asdict(metadata)}
    (folder / METADATA_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def restore(
    folder: Path,
    specs: Params,
    metadata: StoreMetadata,
    dtype: str,
    mesh: Mesh | None,
    *,
    progress: bool = False,
) -> Params:
    """The stored tree, cast to `dtype` and laid out over `mesh` while it is read.

    Raises:
        WeightsError: the tree is not there, damaged, or not the one that `specs` describes.
    """
    place = (folder / TREE_NAME).resolve()
    if not place.is_dir():
        raise WeightsError(f"{place}: is missing; convert the checkpoint again")
    found = fingerprint.files_digest(folder, _tree_files(folder), progress=progress)
    if found != metadata.files_digest:
        raise WeightsError(
            f"{place}: is damaged: its files are not those that were written; convert the "
            "checkpoint again"
        )
    stored = _StoredTree(place)
    leaves, tree = jax.tree.flatten_with_path(specs, is_leaf=is_spec)
    named = {".".join(str(_key(k)) for k in path): spec for path, spec in leaves}
    stored.check_names(set(named))
    total = sum(int(np.prod(spec.shape)) for spec in named.values()) * jnp.dtype(dtype).itemsize
    arrays = []
    with tqdm(
        total=total,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for name, spec in named.items():
            sharding = None if mesh is None else named_sharding(spec.axes, mesh)
            arrays.append(stored.load(name, spec, jnp.dtype(spec.dtype or dtype), sharding))
            bar.update(arrays[-1].nbytes)
    return jax.tree.unflatten(tree, arrays)


class _StoredTree:
    """The arrays below an `orbax` folder, by dotted name."""

    def __init__(self, place: Path):
        self._place = place
        # No cache: every byte is read once. Little concurrency: each read holds its chunk.
        self._context = ts.Context(
            {"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}}
        )

    def check_names(self, expected: set[str]) -> None:
        try:
            keys = ts.KvStore.open(self._kvstore(), context=self._context).result().list().result()
        except ValueError as error:
            raise self._broken("", error) from error
        found = {k.decode().removesuffix("/.zarray") for k in keys if k.endswith(b"/.zarray")}
        for name in sorted(expected ^ found):
            state = "missing" if name in expected else "not part of this model"
            raise WeightsError(f"{self._place}: tensor {name!r} is {state}")

    def load(
        self, name: str, spec: ParamSpec, dtype: Any, sharding: NamedSharding | None
    ) -> jax.Array:
        try:
            array = ts.open(
                {"driver": "zarr", "kvstore": {**self._kvstore(), "path": name + "/"}},
                context=self._context,
            ).result()
        except ValueError as error:
            raise self._broken(name, error) from error
        if array.shape != spec.shape:
            raise WeightsError(
                f"{self._place}: tensor {name!r} has shape {array.shape}; expected {spec.shape}"
            )
        everything = tuple(slice(0, size) for size in spec.shape)
        if sharding is None:
            value = jax.device_put(self._read(name, array, dtype, everything))
        elif sharding.is_fully_replicated:
            value = jax.device_put(self._read(name, array, dtype, everything), sharding)
        else:
            value = jax.make_array_from_callback(
                spec.shape,
                sharding,
                lambda index: self._read(name, array, dtype, index or everything),
            )
        return jax.block_until_ready(value)

    def _read(self, name: str, array: Any, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
        """Part of an array, a chunk's worth of rows at a time."""
        bounds = [s.indices(size)[:2] for s, size in zip(index, array.shape, strict=True)]
        out = aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        first, step = bounds[0][0], array.chunk_layout.read_chunk.shape[0]
        inner = tuple(slice(start, stop) for start, stop in bounds[1:])
        for i in range(0, len(out), step):
            count = min(step, len(out) - i)
            try:
                part = array[(slice(first + i, first + i + count), *inner)].read().result()
            except ValueError as error:
                raise self._broken(name, error) from error
            out[i : i + count] = part
        return out

    def _kvstore(self) -> dict[str, Any]:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._place}/"}}

    def _broken(self, name: str, error: Exception) -> WeightsError:
        what = f"tensor {name!r} " if name else ""
        reason = str(error).strip().splitlines()
        return WeightsError(
            f"{self._place}: {what}cannot be read: {reason[0][:300] if reason else ''}"
        )


def _tree_files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / TREE_NAME).rglob("*") if p.is_file())


def _key(entry: Any) -> Any:
    """The name or index that one step of a tree path stands for."""
    return entry.key if hasattr(entry, "key") else entry.idx
