"""The tensors of a Hugging Face folder as the weights of one decoder.

Checks first that every weight has its tensor, in its shape, and that no tensor is left over; then
reads tensor by tensor, straight into the compute dtype, and hands each to its devices before the
next: memory peaks at the weights plus one tensor (one shard of it, where it is split).
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxserve.errors import WeightsError
from jaxserve.models import names
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import param_specs
from jaxserve.models.spec import Params, ParamSpec, is_spec
from jaxserve.sharding import named_sharding
from jaxserve.weights.safetensors import TensorFiles, aligned_empty

log = logging.getLogger(__name__)


class HubTensors:
    """The tensors of one checkpoint as the weights of one config.

    `config` is the given one, except that a stored output head that differs from the embedding
    is used even where the config says that the two are tied.
    """

    def __init__(self, files: TensorFiles, config: DecoderConfig):
        self._files = files
        self._prefix = _find_prefix(files, config)
        self.config = self._untie_if_different(config)
        self._specs = param_specs(self.config)
        self._check()

    @property
    def stored_dtype(self) -> str:
        return self._files.dtype(self._source("embed").name).name

    def load(self, dtype: str, mesh: Mesh | None, progress: bool) -> Params:
        """All weights, in `dtype`, on their devices."""
        leaves, tree = jax.tree.flatten(self._specs, is_leaf=is_spec)
        places = _weight_places(self._specs)
        total = sum(int(np.prod(spec.shape)) for spec in leaves) * jnp.dtype(dtype).itemsize
        arrays = []
        with tqdm(
            total=total,
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar:
            for spec, (weight, layer) in zip(leaves, places, strict=True):
                array = self._load_one(spec, weight, layer, jnp.dtype(dtype), mesh)
                arrays.append(array)
                bar.update(array.nbytes)
        return jax.tree.unflatten(tree, arrays)

    def _load_one(
        self, spec: ParamSpec, weight: str, layer: int | None, dtype: Any, mesh: Mesh | None
    ) -> jax.Array:
        if mesh is None:
            # Waiting keeps a second copy, if the device makes one, from outliving this tensor.
            return jax.block_until_ready(jax.device_put(self._read(spec, weight, layer, dtype)))
        sharding = named_sharding(spec.axes, mesh)
        if sharding.is_fully_replicated or spec.axes[0].name == "layers":
            value = self._read(spec, weight, layer, dtype)
            return jax.block_until_ready(jax.device_put(value, sharding))
        everything = tuple(slice(0, size) for size in spec.shape)
        return jax.block_until_ready(
            jax.make_array_from_callback(
                spec.shape,
                sharding,
                lambda index: self._read_part(spec, weight, layer, dtype, index or everything),
            )
        )

    def _read(self, spec: ParamSpec, weight: str, layer: int | None, dtype: Any) -> np.ndarray:
        """One whole weight; those of all layers for a stack."""
        out = aligned_empty(spec.shape, dtype)
        if spec.axes[0].name != "layers":
            name, rows, shape = self._piece(weight, layer)
            self._files.read_into(name, out.reshape(shape), rows)
            return out
        for i in range(self.config.num_layers):
            name, rows, shape = self._piece(weight, i)
            self._files.read_into(name, out[i].reshape(shape), rows)
        return out

    def _read_part(
        self, spec: ParamSpec, weight: str, layer: int | None, dtype: Any, index: tuple[slice, ...]
    ) -> np.ndarray:
        """The part of a matrix that one device holds, without reading all of it at once."""
        name, rows, _ = self._piece(weight, layer)
        start, stop, _ = index[0].indices(spec.shape[0])
        begin = (rows.start or 0) + start
        columns = range(*index[1].indices(spec.shape[1]))
        out = aligned_empty((stop - start, len(columns)), dtype)
        step = len(out) if len(columns) == spec.shape[1] else max(1, (4 << 20) // spec.shape[1])
        for i in range(0, len(out), step):
            count = min(step, len(out) - i)
            part_rows = slice(begin + i, begin + i + count)
            if len(columns) == spec.shape[1]:
                self._files.read_into(name, out[i : i + count], part_rows)
            else:
                part = self._files.read(name, dtype, part_rows)
                out[i : i + count] = part[:, columns.start : columns.stop]
        return out

    def _source(self, weight: str, layer: int | None = None) -> names.Source:
        source = names.source_of(weight, self.config.layout, self._prefix)
        return source if layer is None else source._replace(name=source.name.format(i=layer))

    def _piece(self, weight: str, layer: int | None) -> tuple[str, slice, tuple[int, ...]]:
        """Tensor, rows of it, and the shape of these rows, that make one weight of one layer."""
        source = self._source(weight, layer)
        info = self._files.info(source.name)
        if not source.fused:
            return source.name, slice(None), info.shape
        suffix = "_bias" if weight.endswith("_bias") else ""
        before = source.fused[: source.fused.index(weight.removesuffix("_bias"))]
        start = sum(self._shape(other + suffix)[0] for other in before)
        count = self._shape(weight)[0]
        return source.name, slice(start, start + count), (count, *info.shape[1:])

    def _shape(self, weight: str) -> tuple[int, ...]:
        """Shape of a weight (for a layer's, in one layer)."""
        if weight in self._specs["vectors"]:
            return self._specs["vectors"][weight].shape[1:]
        if weight in self._specs["layers"][0]:
            return self._specs["layers"][0][weight].shape
        return self._specs[weight].shape

    def _check(self) -> None:
        """Every weight has its tensor, in its shape, and no tensor is left over."""
        used = set()
        for weight, layer in self._expected():
            source = self._source(weight, layer)
            info = self._files.info(source.name)
            used.add(source.name)
            self._files.dtype(source.name)
            suffix = "_bias" if weight.endswith("_bias") else ""
            parts = [self._shape(x + suffix) for x in source.fused] or [self._shape(weight)]
            expected = (sum(p[0] for p in parts), *parts[0][1:])
            flattened = (int(np.prod(info.shape)),) if len(expected) == 1 else info.shape
            if flattened != expected:
                raise WeightsError(f"{info}: has shape {info.shape}; expected {expected}")
        head = self._source("head").name
        for name in sorted(self._files.infos.keys() - used):
            tied_head = self.config.tie_word_embeddings and name == head
            if not tied_head and not any(part in name for part in names.IGNORED_PARTS):
                raise WeightsError(
                    f"{self._files.info(name)}: is not part of {self.config.architecture} with "
                    "this config.json; leaving it out would change what the model computes"
                )

    def _expected(self) -> Iterator[tuple[str, int | None]]:
        for weight, layer in _weight_places(self._specs):
            if layer is None and weight in self._specs["vectors"]:
                yield from ((weight, i) for i in range(self.config.num_layers))
            else:
                yield weight, layer

    def _untie_if_different(self, config: DecoderConfig) -> DecoderConfig:
        head = names.source_of("head", config.layout, self._prefix).name
        if not config.tie_word_embeddings or head not in self._files:
            return config
        embed = names.source_of("embed", config.layout, self._prefix).name
        infos = self._files.info(head), self._files.info(embed)
        same = infos[0].shape == infos[1].shape and infos[0].dtype == infos[1].dtype
        if same and all(
            np.array_equal(a, b)
            for a, b in zip(self._files.chunks(head), self._files.chunks(embed), strict=True)
        ):
            return config
        log.warning("%s differs from the embedding: using it, although the config ties them", head)
        return dataclasses.replace(config, tie_word_embeddings=False)


def _find_prefix(files: TensorFiles, config: DecoderConfig) -> str:
    candidates = [names.source_of("embed", config.layout, prefix).name for prefix in names.PREFIXES]
    for prefix, name in zip(names.PREFIXES, candidates, strict=True):
        if name in files:
            return prefix
    raise WeightsError(f"{files.folder}: tensor {candidates[0]!r} is missing from the checkpoint")


def _weight_places(specs: Params) -> list[tuple[str, int | None]]:
    """Name and layer (None: outside the layers, or a stack over them) of each leaf, in order."""
    places = []
    for path, _ in jax.tree.flatten_with_path(specs, is_leaf=is_spec)[0]:
        keys = [getattr(k, "key", getattr(k, "idx", None)) for k in path]
        places.append((keys[-1], keys[1] if keys[0] == "layers" else None))
    return places
