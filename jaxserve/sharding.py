"""The device mesh and the one table that says which logical axis of a weight is split over it.

Tensor parallelism is GSPMD: weights get a NamedSharding from here, `jit` derives the rest.
Knows nothing of models or checkpoints: a weight is a tuple of `Axis`.
Invariant: an axis is split only where whole units (heads, rows) land on each device; otherwise
every device holds all of it, which is always correct and only costs memory.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError

log = logging.getLogger(__name__)

TENSOR_AXIS = "tensor"

RULES: dict[str, str | None] = {
    "vocab": TENSOR_AXIS,
    "q_heads": TENSOR_AXIS,
    "kv_heads": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
    "embed": None,
    "head_dim": None,
    "layers": None,
    "experts": None,
    "latent": None,
}
"""Logical axis of a weight -> mesh axis that splits it (None: never split)."""


class Axis(NamedTuple):
    """One axis of a weight: `units` that must stay whole, each `width` long."""

    name: str
    units: int
    width: int = 1

    @property
    def size(self) -> int:
        return self.units * self.width


def make_mesh(tensor_parallel_size: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A one-axis mesh of the first `tensor_parallel_size` devices."""
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but there are only {len(devices)} "
            f"{devices[0].platform} devices"
        )
    return Mesh(np.array(devices[:tensor_parallel_size]), (TENSOR_AXIS,))


def partition_spec(axes: Sequence[Axis], mesh: Mesh) -> PartitionSpec:
    """How a weight with these axes is split over `mesh`."""
    parts = []
    for axis in axes:
        target = RULES[axis.name]
        if target is not None and axis.units % mesh.shape[target]:
            _say_once(
                f"{axis.name} ({axis.units}) does not divide by {mesh.shape[target]} devices: "
                "every device holds all of them"
            )
            target = None
        parts.append(target)
    return PartitionSpec(*parts)


def named_sharding(axes: Sequence[Axis], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, mesh))


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.info(message)
