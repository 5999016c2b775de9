"""Readers of config.json for the families whose norms or blocks differ from Llama's.

Gemma (weights stored less one, sandwich norms), OLMo (post-norm), GLM-4, HyperCLOVA X, and those
with LayerNorm or parallel blocks.
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


def olmo(f: Fields, context_len: int | None) -> DecoderConfig:
    """LayerNorm without weights; queries, keys and values are clipped."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        norm=NormSpec(1e-5, centered=True, has_weight=False),
        clip_qkv=f.optional_number("clip_qkv"),
        qkv_bias=bias,
        o_bias=bias,
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


def cohere(f: Fields, context_len: int | None) -> DecoderConfig:
    """Parallel block, LayerNorm without bias, neighbours rotated."""
    shape = sizes(f)
    _expect_cohere_block(f)
    norm = NormSpec(f.number("layer_norm_eps", 1e-5), centered=True)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, theta=5e5, interleaved=True, context_len=context_len),
        norm=norm,
        tie=True,
        parallel=True,
        qk_norm=norm if f.flag("use_qk_norm") else None,
        qk_norm_width="heads",
        qkv_bias=bias,
        o_bias=bias,
        logit_multiplier=f.number("logit_scale", 0.0625),
    )


def _expect_cohere_block(f: Fields) -> None:
    """Released configs state what the library takes for granted."""
    f.expect(
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_gated_activation=True,
        use_parallel_block=True,
        order_of_interleaved_layers="local_attn_first",
    )
    for unused in ("use_parallel_embedding", "use_embedding_sharing"):
        f.get(unused)


def cohere2(f: Fields, context_len: int | None) -> DecoderConfig:
    """Cohere with window layers; the full ones have no positions."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    _expect_cohere_block(f)
    pattern = f.integer("sliding_window_pattern", f.integer("layer_switch", 4))
    types = layer_types(f, shape.layers, periodic(shape.layers, pattern))
    rope = read_rope(f, shape.head_dim, interleaved=True, context_len=context_len)
    return build(
        f,
        shape,
        ropes=[rope if kind == SLIDING else None for kind in types],
        windows=windows(f, types, 4096),
        norm=NormSpec(f.number("layer_norm_eps", 1e-5), centered=True),
        tie=True,
        parallel=True,
        qkv_bias=bias,
        o_bias=bias,
        logit_multiplier=f.number("logit_scale", 0.0625),
    )


def starcoder2(f: Fields, context_len: int | None) -> DecoderConfig:
    """LayerNorm, biases everywhere, an MLP of two matrices, a window in every layer."""
    shape = sizes(f, kv_heads=2)
    bias = f.flag("use_bias", True)
    f.choice("norm_type", {"layer_norm": "layer_norm"}, "layer_norm")
    f.choice("mlp_type", {"default": "default"}, "default")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=windows(f, [SLIDING] * shape.layers),
        norm=NormSpec(f.number("norm_epsilon", 1e-5), centered=True, has_bias=True),
        act=activation(f, default="gelu_pytorch_tanh"),
        tie=True,
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        layout="starcoder2",
    )


def nemotron(f: Fields, context_len: int | None) -> DecoderConfig:
    """LayerNorm with weights stored less one, squared ReLU, half of each head rotated."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, partial=0.5, context_len=context_len),
        norm=NormSpec(f.number("norm_eps", 1e-5), offset=1.0, centered=True, has_bias=True),
        act=activation(f, default="relu2"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
    )


def jais2(f: Fields, context_len: int | None) -> DecoderConfig:
    """LayerNorm, biases everywhere, squared ReLU."""
    shape = sizes(f)
    bias = f.flag("attention_bias", True)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        norm=NormSpec(f.number("layer_norm_eps", 1e-5), centered=True, has_bias=True),
        act=activation(f, default="relu2"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias", True),
    )


def phi(f: Fields, context_len: int | None) -> DecoderConfig:
    """Parallel block, LayerNorm, biases everywhere (the head too), half of each head rotated."""
    shape = sizes(f)
    norm = NormSpec(f.number("layer_norm_eps", 1e-5), centered=True, has_bias=True)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, partial=0.5, context_len=context_len),
        norm=norm,
        act=activation(f, default="gelu_new"),
        parallel=True,
        gated_mlp=False,
        qk_norm=norm if f.flag("qk_layernorm") else None,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        layout="phi",
    )


def stablelm(f: Fields, context_len: int | None) -> DecoderConfig:
    """LayerNorm, a quarter of each head rotated."""
    shape = sizes(f)
    if f.flag("qk_layernorm"):
        f.refuse("qk_layernorm", "is true; a LayerNorm for each head is not supported")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, partial=0.25, context_len=context_len),
        norm=NormSpec(f.number("layer_norm_eps", 1e-5), centered=True, has_bias=True),
        parallel=f.flag("use_parallel_residual"),
        qkv_bias=f.flag("use_qkv_bias"),
    )
