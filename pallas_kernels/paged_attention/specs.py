"""Shapes and static facts of paged attention, shared by every backend, test and benchmark.

The pool of one KV group is `[N, L, 2, K, P, H]`: page-major, so that a block is one contiguous
piece of memory over all layers of the group. Kernels see the free reshape `[N*L*2, K, P, H]`; the
keys of layer `l` in page `n` are row `(n*L + l)*2`, its values the row after that.

Latent pages, of multi-head latent attention, hold one vector a token: what all query heads take for
its key, and of which the first `latent_dim` entries are its value. Their pool is
`[N, L, 1, 1, P, H]`, H being the latent and the rotated part together; row `n*L + l`.

Rows and tokens of a step (half-open ranges):

    rows    [0, num_decodes)          one query token each; query token i belongs to row i
            [num_decodes, num_rows)   q_len tokens each, in row order, without gaps
            [num_rows, R)             padding, q_len == 0

A row's query tokens are the last q_len of its kv_len tokens. There are at least as many tokens as
rows (T >= R), so each decode row has a query token of its own, also the padding.

Keys and values are kept in the compute dtype (on CPU bfloat16 and float16 as raw uint16, see
`kv.pool`), or quantised, one scale for each token and head: int8, or float8_e4m3fn, which may be
raw uint8. The value is the stored number times its scale.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Static facts of one layer's attention.

    Attributes:
        scale: multiplies q . k.
        window: a query at position p sees keys in (p - window, p]; None sees all.
        soft_cap: scores become cap * tanh(score / cap); None leaves them.
        num_layers: layers of the KV group (L); `layer` is this layer's place in it.
        needs_lse: False where nobody merges: the backend may leave `Attended.lse_tq` out.
        latent_dim: pages are latent, and a value is so many entries of its key; None: they hold
            keys and values.
    """

    scale: float
    num_layers: int
    layer: int
    window: int | None = None
    soft_cap: float | None = None
    needs_lse: bool = True
    latent_dim: int | None = None

    @property
    def parts(self) -> int:
        """Vectors that a page holds of each token and head: key and value, or a latent."""
        return 2 if self.latent_dim is None else 1

    def first_row(self, page: Any, layer: Any = None) -> Any:
        """Row of the pool that holds the keys of a layer (this one) in a page, or in many."""
        return (page * self.num_layers + (self.layer if layer is None else layer)) * self.parts

    def split_layer(self) -> "tuple[AttentionSpec, jax.Array]":
        """The same for every layer, and the layer as [1] int32: an operand for kernels to read.

        All layers of a step then share one kernel, which is traced, lowered and compiled once.
        """
        return dataclasses.replace(self, layer=0), jnp.full((1,), self.layer, jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """One KV group's pages as kernels see them."""

    rows_rkph: jax.Array  # [N*L*2, K, P, H]; latent ones [N*L, 1, P, H]
    scales_rkp: jax.Array | None = None  # the same less H, float32, of quantised pages


class Attended(NamedTuple):
    """What attention over some pages yields.

    Attributes:
        out_tqh: [T, Q, H] in the queries' dtype ([T, Q, latent_dim] over latent pages); zeros
            where a query sees no key and no sink.
        lse_tq: [T, Q] float32, the natural logarithm of the sum of exp(score), sink included;
            -inf where a query sees nothing. With it, parts over disjoint pages can be merged.
            May be None if `AttentionSpec.needs_lse` is False.
    """

    out_tqh: jax.Array
    lse_tq: jax.Array | None


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
