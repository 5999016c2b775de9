"""What a dense decoder is, as frozen, hashable values: everything `decoder` needs besides weights.

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
class LayerSpec:
    """What can differ between the layers of one model; `attend` reads the last four.

    Attributes:
        rope: None leaves queries and keys without positions.
        scale: multiplies q.k before the softmax.
        logit_soft_cap: c * tanh(q.k / c) before the mask, if given.
        window: see `LayerCache.window`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    query_scale: QueryScaleSpec | None
    scale: float
    logit_soft_cap: float | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One dense decoder.

    Attributes:
        norm: all norms of width `hidden_size`.
        pre_norm, post_norm: normalise what goes into, or comes out of, attention and MLP.
        parallel: MLP and attention read the same normalised input.
        qk_norm: norm of queries and keys, if any; its weight is per entry of one head ("head"),
            per head and entry ("heads"), or the norm itself spans all heads ("full").
        qk_norm_after_rope: the usual place is before.
        gated_mlp: act(gate(x)) * up(x), otherwise act(up(x)).
        clip_qkv: queries, keys and values are clamped to [-clip, clip].
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
        return tuple(LayerCache(x.num_kv_heads, x.head_dim, x.window) for x in self.layers)

    @property
    def digest(self) -> str:
        """Hex digest of everything above that decides what the model computes."""
        fields = dataclasses.asdict(self)
        for name in ("architecture", "eos_token_ids", "layout", "max_position_embeddings"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
