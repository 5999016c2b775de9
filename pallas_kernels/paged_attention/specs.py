"""Shapes and static facts of paged attention, shared by every backend, test and benchmark.

The pool of one KV group is `[N, L, 2, K, P, H]`: page-major, so that a block is one contiguous
piece of memory over all layers of the group. Kernels see the free reshape `[N*L*2, K, P, H]`; the
keys of layer `l` in page `n` are row `(n*L + l)*2`, its values the row after that.

Rows and tokens of a step (half-open ranges):

    rows    [0, num_decodes)          one query token each; query token i belongs to row i
            [num_decodes, num_rows)   q_len tokens each, in row order, without gaps
            [num_rows, R)             padding, q_len == 0

A row's query tokens are the last q_len of its kv_len tokens.
"""

import dataclasses
from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Static facts of one layer's attention.

    Attributes:
        scale: multiplies q . k.
        window: a query at position p sees keys in (p - window, p]; None sees all.
        soft_cap: scores become cap * tanh(score / cap); None leaves them.
        num_layers: layers of the KV group (L); `layer` is this layer's place in it.
    """

    scale: float
    num_layers: int
    layer: int
    window: int | None = None
    soft_cap: float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedRows:
    """Which queries and keys each row of the step has; one per KV group (page tables differ)."""

    num_decodes: jax.Array  # [] int32
    num_rows: jax.Array  # [] int32
    q_start: jax.Array  # [R] int32: first query token of the row
    q_len: jax.Array  # [R] int32
    kv_len: jax.Array  # [R] int32: keys including this step's tokens
    page_table: jax.Array  # [R, M] int32: every entry is a valid page
    has_prefills: bool = dataclasses.field(metadata={"static": True})
