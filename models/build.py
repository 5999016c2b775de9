"""What the readers of all families share: sizes, layer patterns, activation, end ids.

A reader (see `families`) states how its family departs from Llama; `build` does the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.models.config import (
    DecoderConfig,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    NormSpec,
    QueryScaleSpec,
    RopeSpec,
)
from jaxserve.models.fields import Fields
from jaxserve.models.rope import longest_context

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes(f: Fields, *, head_dim: int | None = None, kv_heads: int | None = None) -> Sizes:
    """Read the shape of attention; the arguments are the family's defaults."""
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv = f.integer("num_key_value_heads", kv_heads or heads)
    dim = f.optional_integer("head_dim") or head_dim
    if dim is None:
        if hidden % heads:
            f.refuse("hidden_size", f"is {hidden}, not a multiple of {heads} attention heads")
        dim = hidden // heads
    if heads % kv:
        f.refuse("num_key_value_heads", f"is {kv}: {heads} attention heads do not divide by it")
    return Sizes(hidden, f.integer("num_hidden_layers"), heads, kv, dim)


def layer_types(f: Fields, num_layers: int, default: Sequence[str] | None = None) -> list[str]:
    """The kind of each layer; kinds other than full and sliding attention are refused."""
    types = f.per_layer("layer_types", num_layers) or list(default or [FULL] * num_layers)
    for kind in types:
        if kind not in (FULL, SLIDING):
            f.refuse("layer_types", f"holds {kind!r}; supported are {FULL} and {SLIDING}")
    return types


def periodic(num_layers: int, period: int) -> list[str]:
    """Sliding layers, each `period`-th one full."""
    return [FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers)]


def windows(f: Fields, types: Sequence[str], default: int | None = None) -> list[int | None]:
    """The window of each layer: `sliding_window` where its type is sliding."""
    size = f.optional_integer("sliding_window") if "sliding_window" in f else default
    return [size if kind == SLIDING else None for kind in types]


def activation(f: Fields, name: str = "hidden_act", default: str = "silu") -> str:
    return f.choice(name, ACTIVATION_NAMES, default)


def eos_token_ids(f: Fields) -> tuple[int, ...]:
    """End-of-sequence ids, given as one id, a list, or not at all."""
    value = f.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(x) is int and x >= 0 for x in ids):
        f.refuse("eos_token_id", f"is {value!r}; expected an id or a list of ids")
    return tuple(ids)


def build(
    f: Fields,
    shape: Sizes,
    *,
    ropes: RopeSpec | Sequence[RopeSpec | None],
    windows: Sequence[int | None] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    query_scale: QueryScaleSpec | None = None,
    latent: LatentSpec | None = None,
    experts: Sequence[ExpertsSpec | None] | None = None,
    norm: NormSpec | None = None,
    act: str | None = None,
    tie: bool = False,
    **departures: Any,
) -> DecoderConfig:
    """A config from the fields all families share, and what the family says about itself.

    Args:
        ropes, windows: one for all layers, or one per layer.
        scale: of q.k; default head_dim ** -0.5.
        latent: of all layers; `shape.head_dim` is then that of a whole query.
        experts: per layer.
        tie: the family's default for `tie_word_embeddings`.
        departures: further fields of `DecoderConfig`.
    """
    if windows is None:
        layer_types_all_full(f, shape.layers)
    rope_list = [ropes] * shape.layers if isinstance(ropes, RopeSpec) else list(ropes)
    window_list = [None] * shape.layers if windows is None else list(windows)
    experts_list = [None] * shape.layers if experts is None else list(experts)
    layers = tuple(
        LayerSpec(
            num_heads=shape.heads,
            num_kv_heads=1 if latent else shape.kv_heads,
            head_dim=latent.rank + latent.rope_dim if latent else shape.head_dim,
            rope=rope,
            query_scale=query_scale,
            scale=shape.head_dim**-0.5 if scale is None else scale,
            logit_soft_cap=soft_cap,
            window=window,
            latent=latent,
            experts=mixture,
        )
        for rope, window, mixture in zip(rope_list, window_list, experts_list, strict=True)
    )
    norm = norm or NormSpec(f.number("rms_norm_eps", 1e-6))
    return DecoderConfig(
        architecture=str((f.get("architectures") or ["?"])[0]),
        vocab_size=f.integer("vocab_size"),
        hidden_size=shape.hidden,
        intermediate_size=f.integer("intermediate_size"),
        max_position_embeddings=longest_context(f),
        eos_token_ids=eos_token_ids(f),
        layers=layers,
        norm=norm,
        final_norm=departures.pop("final_norm", norm),
        activation=act or activation(f),
        tie_word_embeddings=f.flag("tie_word_embeddings", tie),
        **departures,
    )


def layer_types_all_full(f: Fields, num_layers: int) -> None:
    """For families without windows: a layer list that says otherwise is refused."""
    if SLIDING in layer_types(f, num_layers):
        f.refuse("layer_types", f"holds {SLIDING!r}, which this architecture does not know")
