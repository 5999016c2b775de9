"""Weights before they have values: shape, logical axes and initial distribution of each.

Knows nothing of checkpoints. One `ParamSpec` declares a weight; shapes for tracing, shardings and
random values all derive from it.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.sharding import Axis, named_sharding

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One weight, in the compute dtype.

    `init` is "normal" (scaled by the last axis, the one that is summed over), "ones" or "zeros".
    `dtype` is given for those few whose rounding would change which branch is taken.
    """

    axes: tuple[Axis, ...]
    init: str = "normal"
    dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)


def is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


def abstract_params(specs: Params, dtype: Any, mesh: Mesh | None = None) -> Params:
    """The tree of shapes and dtypes (and shardings over `mesh`) that `specs` describes."""

    def abstract(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(spec.axes, mesh)
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype), sharding=sharding)

    return jax.tree.map(abstract, specs, is_leaf=is_spec)


def param_shardings(specs: Params, mesh: Mesh) -> Params:
    return jax.tree.map(lambda spec: named_sharding(spec.axes, mesh), specs, is_leaf=is_spec)


def init_params(specs: Params, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random weights, for training from scratch, tests and benchmarks."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)

    @jax.jit  # one compilation instead of one for each shape
    def init(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(leaves))
        return [_init(spec, k, spec.dtype or dtype) for spec, k in zip(leaves, keys, strict=True)]

    return jax.tree.unflatten(tree, init(key))


def random_params(specs: Params, dtype: Any, mesh: Mesh | None = None) -> Params:
    """Random weights made where they stay: a program for each distinct shape, not one for all,
    which would hold all of a big model's random bits at once."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)

    def make(index: int, spec: ParamSpec) -> jax.Array:
        sharding = None if mesh is None else named_sharding(spec.axes, mesh)
        init = _random_leaf(spec, jnp.dtype(dtype), sharding)
        return init(jax.random.key(index))

    return jax.tree.unflatten(tree, [make(i, spec) for i, spec in enumerate(leaves)])


@cache
def _random_leaf(spec: ParamSpec, dtype: Any, sharding: Any) -> Any:
    return jax.jit(partial(_init, spec, dtype=dtype), out_shardings=sharding)


def _init(spec: ParamSpec, key: jax.Array, dtype: Any) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, dtype)
    if spec.init == "ones":
        return jnp.ones(spec.shape, dtype)
    scale = jnp.asarray(spec.shape[-1] ** -0.5, dtype)
    return jax.random.normal(key, spec.shape, dtype) * scale
