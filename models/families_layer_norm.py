"""Readers of config.json for the families with LayerNorm, some of them with parallel blocks."""

from jaxserve.models.build import SLIDING, activation, build, layer_types, periodic, sizes, windows
from jaxserve.models.config import DecoderConfig, NormSpec
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope


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
    # Of the family's predecessor, in released configs; the library reads none of them.
    f.expect(scale_attn_weights=True)
    for unused in (
        "activation_function",
        "attention_softmax_in_fp32",
        "layer_norm_epsilon",
        "scale_attention_softmax_in_fp32",
    ):
        f.get(unused)
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
