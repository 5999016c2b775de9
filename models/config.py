"""What a decoder is, as frozen, hashable values: everything `decoder` needs besides weights.

Knows nothing of config.json (see `families`), files, jax or the KV cache. A config is complete:
no value is looked up elsewhere, so its digest is part of a model's identity.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from jaxserve.types import LayerCache


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm, or LayerNorm if `centered`; the stored weight is `weight - offset`."""

    eps: float = 1e-6
    offset: float = 0.0
    centered: bool = False
    has_weight: bool = True
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding with its frequencies resolved.

    The first `2 * len(frequencies)` entries of a head are rotated; `interleaved` pairs
    neighbours, otherwise the two halves. Cosine and sine are multiplied by `amplitude`.
    """

    frequencies: tuple[float, ...]
    amplitude: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class QueryScaleSpec:
    """Queries are multiplied by 1 + beta * log(1 + floor(position / period))."""

    beta: float
    period: int


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention: one vector a token is kept, for all heads to read.

    Attributes:
        query_rank: width that queries are squeezed through; None: they are not.
        rank: width of the latent, from which keys and values are made.
        nope_dim, rope_dim: parts of a query and key: from the latent, and rotated, which all heads
            share.
        value_dim: of a head's value.
        has_bias: on the two products that squeeze.
    """

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    has_bias: bool = False

    @property
    def query_dim(self) -> int:
        """Of one head."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in the place of one MLP; all are gated and without biases.

    Attributes:
        top_k: experts that a token is sent to.
        intermediate_size: of one expert.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        has_choice_bias: added to the scores when experts are chosen, not when they are weighed.
        num_groups: experts are chosen from the best `top_groups` of so many equal groups.
        group_score: of a group: its "max", or the sum of its "top2".
        renormalise: weights of the chosen experts add up to 1, before `weight_scale`.
        shared_size: intermediate size of an MLP that every token goes through, too.
        shared_gate: its result is multiplied by a sigmoid of the token.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: str = "softmax"
    has_choice_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    renormalise: bool = True
    weight_scale: float = 1.0
    shared_size: int | None = None
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What can differ between the layers of one model; `attend` reads the four from `scale` on.

    With `latent`, `num_kv_heads` is 1 and `head_dim` the width of what is kept of a token.

    Attributes:
        rope: None leaves queries and keys without positions.
        scale: multiplies q.k before the softmax.
        logit_soft_cap: c * tanh(q.k / c) before the mask, if given.
        window: see `LayerCache.window`.
        latent: the attention is latent; None: heads have keys and values of their own.
        experts: None: the layer has one MLP.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    query_scale: QueryScaleSpec | None
    scale: float
    logit_soft_cap: float | None = None
    window: int | None = None
    latent: LatentSpec | None = None
    experts: ExpertsSpec | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One decoder.

    Attributes:
        norm: all norms of width `hidden_size`.
        pre_norm, post_norm: normalise what goes into, or comes out of, attention and MLP.
        parallel: MLP and attention read the same normalised input.
        qk_norm: norm of queries and keys, if any; its weight is per entry of one head ("head"),
            per head and entry ("heads"), or the norm itself spans all heads ("full").
        qk_norm_after_rope: the usual place is before.
        gated_mlp: act(gate(x)) * up(x), otherwise act(up(x)).
        clip_qkv: queries, keys and values are clamped to [-clip, clip].
        clip_after_norm: the usual place is before the norm of queries and keys.
        layout: names of the tensors in a checkpoint; see `names`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    final_norm: NormSpec
    activation: str
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_width: str = "head"
    qk_norm_after_rope: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    clip_qkv: float | None = None
    clip_after_norm: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    final_logit_soft_cap: float | None = None
    head_bias: bool = False
    tie_word_embeddings: bool = False
    layout: str = "llama"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        return tuple(
            LayerCache(x.num_kv_heads, x.head_dim, x.window, x.latent and x.latent.rank)
            for x in self.layers
        )

    @property
    def digest(self) -> str:
        """Hex digest of everything above that decides what the model computes."""
        fields = dataclasses.asdict(self)
        for name in ("architecture", "eos_token_ids", "layout", "max_position_embeddings"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
