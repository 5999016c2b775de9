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

_PART_ELEMENTS = 4 << 20
"""Read at once of a matrix whose columns are split."""


class _Runs:
    """A weight as equally long runs of rows, each in some tensor.

    Args:
        starts: tensor and first row of each run, in the order of the weight's rows.
        num_rows: of each.
    """

    def __init__(self, starts: list[tuple[str, int]], num_rows: int):
        self._starts = starts
        self._num_rows = num_rows

    def read(self, files: TensorFiles, first: int, out: np.ndarray) -> None:
        """Fill `out` [rows, width] with the weight's rows from `first` on."""
        width, done = out.shape[1], 0
        while done < len(out):
            run, offset = divmod(first + done, self._num_rows)
            count = min(self._num_rows - offset, len(out) - done)
            name, start = self._starts[run]
            files.read_run(name, (start + offset) * width, out[done : done + count])
            done += count


def _num_rows(shape: tuple[int, ...]) -> int:
    """Of a weight as [rows, width]; a vector is a column."""
    return int(np.prod(shape[:-1] if len(shape) > 1 else shape))


def _as_rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(_num_rows(x.shape), -1)


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
        dtype = jnp.dtype(spec.dtype or dtype)
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
        if spec.axes[0].name == "layers":
            for i in range(self.config.num_layers):
                self._runs(weight, i).read(self._files, 0, _as_rows(out[i]))
        else:
            self._runs(weight, layer).read(self._files, 0, _as_rows(out))
        return out

    def _read_part(
        self, spec: ParamSpec, weight: str, layer: int | None, dtype: Any, index: tuple[slice, ...]
    ) -> np.ndarray:
        """The part of a matrix that one device holds, without reading all of it at once."""
        if len(spec.shape) == 1:
            return self._read(spec, weight, layer, dtype)[index].copy()
        runs = self._runs(weight, layer)
        bounds = [s.indices(size)[:2] for s, size in zip(index, spec.shape, strict=True)]
        out = aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        (start, stop), (first_column, last_column) = bounds[-2:]
        width, units = spec.shape[-1], out.reshape(-1, *out.shape[-2:])
        places = np.ndindex(*out.shape[:-2])
        for rows, place in zip(units, places, strict=True):
            unit = 0
            for (begin, _), size, i in zip(bounds[:-2], spec.shape[:-2], place, strict=True):
                unit = unit * size + begin + i
            first = unit * spec.shape[-2] + start
            if (first_column, last_column) == (0, width):
                runs.read(self._files, first, rows)
                continue
            step = max(1, _PART_ELEMENTS // width)
            for i in range(0, stop - start, step):
                part = np.empty((min(step, stop - start - i), width), dtype)
                runs.read(self._files, first + i, part)
                rows[i : i + len(part)] = part[:, first_column:last_column]
        return out

    def _source(self, weight: str, layer: int | None = None) -> names.Source:
        """Where a weight lies; `{e}` is left in the name if each expert has a tensor."""
        source = names.source_of(weight, self.config.layout, self._prefix)
        if layer is None:
            return source
        if "{e}" in source.name and source.name.format(i=layer, e=0) not in self._files:
            together = names.together_source_of(weight, self._prefix)
            if together is not None and together.name.format(i=layer) in self._files:
                source = together
        return source._replace(name=source.name.replace("{i}", str(layer)))

    def _runs(self, weight: str, layer: int | None) -> "_Runs":
        """The runs of rows that make up one weight of one layer."""
        source, shape = self._source(weight, layer), self._shape(weight, layer)
        num_rows = _num_rows(shape)
        if "{e}" in source.name:
            rows = num_rows // shape[0]
            return _Runs([(source.name.format(e=e), 0) for e in range(shape[0])], rows)
        if not source.fused:
            return _Runs([(source.name, 0)], num_rows)
        suffix = "_bias" if weight.endswith("_bias") else ""
        parts = [self._shape(other + suffix, layer) for other in source.fused]
        units = shape[0] if source.by_unit else 1
        rows = [_num_rows(part) // units for part in parts]
        index = source.fused.index(weight.removesuffix("_bias"))
        before, all_rows = sum(rows[:index]), sum(rows)
        return _Runs([(source.name, u * all_rows + before) for u in range(units)], rows[index])

    def _shape(self, weight: str, layer: int | None) -> tuple[int, ...]:
        """Shape of a weight (for a layer's, in one layer)."""
        if weight in self._specs["vectors"]:
            return self._specs["vectors"][weight].shape[1:]
        if layer is not None:
            return self._specs["layers"][layer][weight].shape
        return self._specs[weight].shape

    def _check(self) -> None:
        """Every weight has its tensor, in its shape, and no tensor is left over."""
        used = set()
        for weight, layer in self._expected():
            source = self._source(weight, layer)
            shapes = self._tensor_shapes(source, weight, layer)
            each = range(self._shape(weight, layer)[0]) if "{e}" in source.name else (None,)
            for e in each:
                info = self._files.info(source.name if e is None else source.name.format(e=e))
                used.add(info.name)
                self._files.dtype(info.name)
                flat = (int(np.prod(info.shape)),) if len(shapes[0]) == 1 else info.shape
                if flat not in shapes:
                    raise WeightsError(f"{info}: has shape {info.shape}; expected {shapes[0]}")
        head = self._source("head").name
        for name in sorted(self._files.infos.keys() - used):
            tied_head = self.config.tie_word_embeddings and name == head
            ignored = any(part in name for part in names.IGNORED_PARTS) or self._is_draft(name)
            if not tied_head and not ignored:
                raise WeightsError(
                    f"{self._files.info(name)}: is not part of {self.config.architecture} with "
                    "this config.json; leaving it out would change what the model computes"
                )

    def _tensor_shapes(
        self, source: names.Source, weight: str, layer: int | None
    ) -> list[tuple[int, ...]]:
        """The shapes that a tensor may have; the first is the usual one."""
        shape = self._shape(weight, layer)
        if "{e}" in source.name:
            return [shape[1:]]
        if not source.fused:
            return [shape]
        suffix = "_bias" if weight.endswith("_bias") else ""
        parts = [self._shape(x + suffix, layer) for x in source.fused]
        if not source.by_unit:
            return [(sum(p[0] for p in parts), *parts[0][1:])]
        rows, width = sum(p[1] for p in parts), parts[0][2]
        flat, apart = (shape[0] * rows, width), (shape[0], rows, width)
        return [apart, flat] if weight.startswith("experts") else [flat, apart]

    def _is_draft(self, name: str) -> bool:
        """Whether a tensor belongs to a layer that only drafts tokens."""
        start = self._prefix + "layers."
        if not name.startswith(start):
            return False
        number = name.removeprefix(start).split(".", 1)[0]
        is_beyond = number.isdigit() and int(number) >= self.config.num_layers
        return is_beyond and f"{start}{number}.{names.DRAFT_MARK}" in self._files

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
