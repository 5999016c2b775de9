"""Builds the `experts` piece of models: between mixtures of experts, and grouped products.

Under tensor parallelism each device has its share of every expert's hidden layer, and what comes
out of it is summed over the devices; where the hidden layer does not divide, every device does all.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.models import layers as nn
from jaxserve.pallas_kernels.grouped_matmul.api import GroupedMatmul
from jaxserve.sharding import TENSOR_AXIS

Experts = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, str], jax.Array]


def build_experts(grouped_matmul: GroupedMatmul, mesh: Mesh | None) -> Experts:
    """Gated MLPs over runs of rows, like `layers.experts`, by that operation."""

    def experts(
        x_md: jax.Array,
        sizes_e: jax.Array,
        up_efd: jax.Array,
        gate_efd: jax.Array,
        down_edf: jax.Array,
        activation: str,
    ) -> jax.Array:
        run = partial(_experts, activation=activation, grouped_matmul=grouped_matmul)
        if mesh is None:
            return run(x_md, sizes_e, up_efd, gate_efd, down_edf)
        is_split = up_efd.shape[1] % mesh.shape[TENSOR_AXIS] == 0
        axis, whole = TENSOR_AXIS if is_split else None, PartitionSpec()
        rows = PartitionSpec(None, axis)
        return jax.shard_map(
            partial(run, sum_over=axis),
            mesh=mesh,
            in_specs=(whole, whole, rows, rows, PartitionSpec(None, None, axis)),
            out_specs=whole,
            check_vma=False,
        )(x_md, sizes_e, up_efd, gate_efd, down_edf)

    return experts


def _experts(
    x_md: jax.Array,
    sizes_e: jax.Array,
    up_efd: jax.Array,
    gate_efd: jax.Array,
    down_edf: jax.Array,
    *,
    activation: str,
    grouped_matmul: GroupedMatmul,
    sum_over: str | None = None,
) -> jax.Array:
    up_mf = grouped_matmul(x_md, up_efd, sizes_e, x_md.dtype)
    gate_mf = grouped_matmul(x_md, gate_efd, sizes_e, x_md.dtype)
    h_mf = nn.activate(gate_mf, activation) * up_mf
    if sum_over is None:
        return grouped_matmul(h_mf, down_edf, sizes_e, x_md.dtype)
    partial_md = grouped_matmul(h_mf, down_edf, sizes_e, jnp.float32)
    return lax.psum(partial_md, sum_over).astype(x_md.dtype)
