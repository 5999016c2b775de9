"""Paged attention on CPU by the C++ kernel, which leaves out log-sum-exp, sinks, 8-bit and latent
pages.

Needs `pallas_kernels.cpu.build.load` to have said that the kernels are there. What they cannot do
goes to the reference, and so does the moving of pages.
"""

import jax

from jaxserve.pallas_kernels.cpu import ops
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)

POOL_DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16", "uint16")}

# XLA:CPU already does these in place.
write_kv = reference.write_kv
gather_pages = reference.gather_pages
scatter_pages = reference.scatter_pages


def ragged_paged_attention(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    *,
    sinks_q: jax.Array | None = None,
) -> Attended:
    """Like `reference.ragged_paged_attention`."""
    has_dtypes = pages.rows_rkph.dtype.name in POOL_DTYPES.get(q_tqh.dtype.name, ())
    is_plain = pages.scales_rkp is None and spec.latent_dim is None
    if has_dtypes and is_plain and sinks_q is None and not spec.needs_lse:
        return Attended(ops.attention(q_tqh, pages.rows_rkph, rows, spec), None)
    return reference.ragged_paged_attention(q_tqh, pages, rows, spec, sinks_q=sinks_q)
