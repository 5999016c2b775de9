"""Paged attention on CPU: decode rows by the C++ kernel, prefill tiles by the XLA reference.

Needs `pallas_kernels.cpu.build.load` to have said that the kernels are there. What they cannot do
(float16) goes to the reference whole.
"""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.cpu import ops
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows

POOL_DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16", "uint16")}


def ragged_paged_attention(
    q_tqh: jax.Array, pool_rkph: jax.Array, rows: RaggedRows, spec: AttentionSpec
) -> jax.Array:
    """Like `reference.ragged_paged_attention`."""
    fits = pool_rkph.dtype.name in POOL_DTYPES.get(q_tqh.dtype.name, ())
    decode = _decode if fits else None
    return reference.ragged_paged_attention(q_tqh, pool_rkph, rows, spec, decode)


def _decode(q_rkgh: jax.Array, pool: jax.Array, rows: RaggedRows, spec: AttentionSpec) -> jax.Array:
    num_rows, num_kv, num_groups, head_dim = q_rkgh.shape
    out_rqh = ops.decode_attention(
        q_rkgh.reshape(num_rows, num_kv * num_groups, head_dim),
        pool,
        rows.page_table,
        rows.kv_len,
        rows.num_decodes.astype(jnp.int32),
        num_layers=spec.num_layers,
        layer=spec.layer,
        scale=spec.scale,
        window=spec.window,
        soft_cap=spec.soft_cap,
    )
    return out_rqh.reshape(q_rkgh.shape)
