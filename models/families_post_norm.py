"""Readers of config.json for the families that normalise what leaves attention and MLP.

Sandwich norms (Gemma 2 and 3, GLM-4, HyperCLOVA X) or post-norm alone (OLMo 2 and 3, EXAONE 4);
and Gemma 1 and GLM, which their successors resemble.
"""

from jaxserve.models.build import (
    FULL,
    SLIDING,
    activation,
    build,
    layer_types,
    periodic,
    sizes,
    windows,
)
from jaxserve.models.config import DecoderConfig, NormSpec
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope, rope_parameters


def _gemma_activation(f: Fields) -> str:
    name = "hidden_activation" if f.get("hidden_activation") else "hidden_act"
    f.get("hidden_act")
    return activation(f, name, "gelu_pytorch_tanh")


def gemma(f: Fields, context_len: int | None) -> DecoderConfig:
    """Norm weights are stored less one; embeddings grow by the root of their width."""
    shape = sizes(f, head_dim=256)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        norm=NormSpec(f.number("rms_norm_eps", 1e-6), offset=1.0),
        act=_gemma_activation(f),
        tie=True,
        qkv_bias=bias,
        o_bias=bias,
        embedding_multiplier=shape.hidden**0.5,
    )


def gemma2(f: Fields, context_len: int | None) -> DecoderConfig:
    """Sandwich norms, soft caps, and a window in every other layer."""
    shape = sizes(f, kv_heads=4, head_dim=256)
    bias = f.flag("attention_bias")
    default = [SLIDING if i % 2 == 0 else FULL for i in range(shape.layers)]
    f.get("sliding_window_size")  # the same number again, in released configs
    soft_cap = f.number("attn_logit_softcapping", 50.0)
    final_cap = f.number("final_logit_softcapping", 30.0)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=windows(f, layer_types(f, shape.layers, default), 4096),
        scale=f.number("query_pre_attn_scalar", 256.0) ** -0.5,
        soft_cap=None if _is_null(f, "attn_logit_softcapping") else soft_cap,
        norm=NormSpec(f.number("rms_norm_eps", 1e-6), offset=1.0),
        act=_gemma_activation(f),
        tie=True,
        qkv_bias=bias,
        o_bias=bias,
        post_norm=True,
        embedding_multiplier=shape.hidden**0.5,
        final_logit_soft_cap=None if _is_null(f, "final_logit_softcapping") else final_cap,
        layout="gemma_sandwich",
    )


def gemma3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Queries and keys normalised per head; window layers have an unscaled base of their own."""
    # The text half of an image model states only what differs from these.
    f.set_defaults(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        max_position_embeddings=131072,
    )
    shape = sizes(f, kv_heads=4, head_dim=256)
    bias = f.flag("attention_bias")
    types = layer_types(
        f, shape.layers, periodic(shape.layers, f.integer("sliding_window_pattern", 6))
    )
    nested = FULL in f.table("rope_parameters") or FULL in f.table("rope_scaling")
    local_theta = f.number("rope_local_base_freq", 10000.0)
    local = rope_parameters(f, SLIDING) if nested else {"rope_theta": local_theta}
    rope = {
        FULL: read_rope(
            f,
            shape.head_dim,
            table=rope_parameters(f, FULL),
            theta=1e6,
            context_len=context_len,
        ),
        SLIDING: read_rope(f, shape.head_dim, table=local, theta=1e4, context_len=context_len),
    }
    norm = NormSpec(f.number("rms_norm_eps", 1e-6), offset=1.0)
    return build(
        f,
        shape,
        ropes=[rope[kind] for kind in types],
        windows=windows(f, types, 4096),
        scale=f.number("query_pre_attn_scalar", 256.0) ** -0.5,
        soft_cap=f.optional_number("attn_logit_softcapping"),
        norm=norm,
        act=_gemma_activation(f),
        tie=True,
        qkv_bias=bias,
        o_bias=bias,
        post_norm=True,
        qk_norm=norm,
        embedding_multiplier=shape.hidden**0.5,
        final_logit_soft_cap=f.optional_number("final_logit_softcapping"),
        layout="gemma_sandwich",
    )


def _is_null(f: Fields, name: str) -> bool:
    return name in f and f.get(name) is None


def glm(f: Fields, context_len: int | None) -> DecoderConfig:
    """Half of each head is rotated, in neighbours."""
    return _glm(f, context_len, post_norm=False, layout="glm")


def glm4(f: Fields, context_len: int | None) -> DecoderConfig:
    """GLM with sandwich norms."""
    return _glm(f, context_len, post_norm=True, layout="glm4")


def _glm(f: Fields, context_len: int | None, *, post_norm: bool, layout: str) -> DecoderConfig:
    shape = sizes(f, kv_heads=2, head_dim=128)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, partial=0.5, interleaved=True, context_len=context_len),
        norm=NormSpec(f.number("rms_norm_eps", 1.5625e-7)),
        qkv_bias=f.flag("attention_bias", True),
        post_norm=post_norm,
        layout=layout,
    )


def olmo2(f: Fields, context_len: int | None) -> DecoderConfig:
    """Post-norm; queries and keys are normalised over all heads."""
    shape = sizes(f)
    rope = read_rope(f, shape.head_dim, context_len=context_len)
    bias = f.flag("attention_bias")
    norm = NormSpec(f.number("rms_norm_eps", 1e-5))
    return build(
        f,
        shape,
        ropes=rope,
        norm=norm,
        pre_norm=False,
        post_norm=True,
        qk_norm=norm,
        qk_norm_width="full",
        qkv_bias=bias,
        o_bias=bias,
        layout="post_norm",
    )


def olmo3(f: Fields, context_len: int | None) -> DecoderConfig:
    """OLMo 2 with window layers, whose rotation is never scaled."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    types = layer_types(f, shape.layers, periodic(shape.layers, 4))
    nested = FULL in f.table("rope_parameters") or FULL in f.table("rope_scaling")
    local = rope_parameters(f, SLIDING) if nested else {"rope_type": "default"}
    rope = {
        FULL: read_rope(
            f,
            shape.head_dim,
            table=rope_parameters(f, FULL),
            theta=5e5,
            context_len=context_len,
        ),
        SLIDING: read_rope(f, shape.head_dim, table=local, theta=5e5, context_len=context_len),
    }
    norm = NormSpec(f.number("rms_norm_eps", 1e-5))
    return build(
        f,
        shape,
        ropes=[rope[kind] for kind in types],
        windows=windows(f, types, 4096),
        norm=norm,
        pre_norm=False,
        post_norm=True,
        qk_norm=norm,
        qk_norm_width="full",
        qkv_bias=bias,
        o_bias=bias,
        layout="post_norm",
    )


def hyperclovax(f: Fields, context_len: int | None) -> DecoderConfig:
    """Granite's multipliers (logits are multiplied), and norms after attention and MLP too."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        scale=f.number("attention_multiplier", shape.head_dim**-0.5),
        embedding_multiplier=f.number("embedding_multiplier", 1.0),
        residual_multiplier=f.number("residual_multiplier", 1.0),
        logit_multiplier=f.number("logits_scaling", 1.0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
        post_norm=f.flag("use_post_norm", True),
        layout="hyperclovax",
    )


def exaone4(f: Fields, context_len: int | None) -> DecoderConfig:
    """Post-norm, and positions only in window layers (in all, if there is no window)."""
    shape = sizes(f)
    size = f.get("sliding_window", 4096)
    pattern = f.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        kinds = [FULL if pattern[i % len(pattern)] == "G" else SLIDING for i in range(shape.layers)]
    elif type(pattern) is int and pattern > 0 or pattern is None:
        kinds = periodic(shape.layers, pattern or 4)
    else:
        f.refuse("sliding_window_pattern", f"is {pattern!r}; expected a number, or L and G")
    default = kinds if size is not None else None
    types = layer_types(f, shape.layers, default)
    rope = read_rope(f, shape.head_dim, context_len=context_len)
    norm = NormSpec(f.number("rms_norm_eps", 1e-5))
    return build(
        f,
        shape,
        ropes=[rope if size is None or kind == SLIDING else None for kind in types],
        windows=windows(f, types, 4096),
        norm=norm,
        pre_norm=False,
        post_norm=True,
        qk_norm=norm,
        layout="post_norm",
    )
