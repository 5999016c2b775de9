"""Paged attention on CPU by the C++ kernel.

Needs `pallas_kernels.cpu.build.load` to have said that the kernels are there. What they cannot do
(float16) goes to the reference.
"""

import jax

from jaxserve.pallas_kernels.cpu import ops
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows

POOL_DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16", "uint16")}


def ragged_paged_attention(
    q_tqh: jax.Array, pool_rkph: jax.Array, rows: RaggedRows, spec: AttentionSpec
) -> jax.Array:
    """Like `reference.ragged_paged_attention`."""
    if pool_rkph.dtype.name in POOL_DTYPES.get(q_tqh.dtype.name, ()):
        return ops.attention(q_tqh, pool_rkph, rows, spec)
    return reference.ragged_paged_attention(q_tqh, pool_rkph, rows, spec)
