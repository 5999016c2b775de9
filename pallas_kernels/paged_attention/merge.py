"""Merges attention over disjoint parts of the keys, by their log-sum-exp.

Each part is normalised by its own sum of weights, exp(lse); the whole is the mean of the parts
weighted by these sums. The same formula joins the splits of one long sequence inside a backend,
and what was computed over pages in different places.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.paged_attention.specs import Attended


def merge_stacked(
    out_itqh: Float[Array, "I ... H"], lse_itq: Float[Array, "I ..."], dtype: jnp.dtype
) -> Attended:
    """Merge parts stacked on the first axis, in float32; outputs are rounded to `dtype`.

    A part whose lse is -inf saw nothing: its output counts for nothing, even if it is NaN.
    """
    lse_itq = lse_itq.astype(jnp.float32)
    max_tq = lse_itq.max(axis=0)
    is_seen_itq = lse_itq > -jnp.inf
    base_tq = jnp.where(jnp.isneginf(max_tq), jnp.float32(0), max_tq)
    weight_itq = jnp.exp(lse_itq - base_tq[None])
    part_itqh = jnp.where(is_seen_itq[..., None], out_itqh.astype(jnp.float32), jnp.float32(0))
    sum_tq = weight_itq.sum(axis=0)
    total_tqh = (weight_itq[..., None] * part_itqh).sum(axis=0)
    out_tqh = total_tqh / jnp.where(sum_tq > 0, sum_tq, jnp.float32(1))[..., None]
    return Attended(out_tqh.astype(dtype), base_tq + jnp.log(sum_tq))


def merge(parts: Sequence[Attended]) -> Attended:
    """Merge what the same queries found in disjoint parts of their keys.

    A sink may have been given to one of the parts, not to several.

    Raises:
        ValueError: there are no parts, or one lacks its lse.
    """
    lses = [part.lse_tq for part in parts if part.lse_tq is not None]
    if not parts or len(lses) != len(parts):
        raise ValueError(
            f"{len(lses)} of {len(parts)} parts have a log-sum-exp; expected at least one part, "
            "and all to have it: call attention with needs_lse=True"
        )
    outs = [part.out_tqh for part in parts]
    return merge_stacked(jnp.stack(outs), jnp.stack(lses), outs[0].dtype)
