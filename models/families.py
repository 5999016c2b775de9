"""Readers of config.json for the families that keep Llama's block: RMS norm before, gated MLP.

Each reader is what the family's config, and the facts that no config states, come to. Families
with other norms are in `families_post_norm` and `families_layer_norm`.
"""

from jaxserve.models.build import FULL, SLIDING, activation, build, layer_types, sizes, windows
from jaxserve.models.config import DecoderConfig, NormSpec, QueryScaleSpec
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope, rope_parameters


def llama(f: Fields, context_len: int | None) -> DecoderConfig:
    """Llama 2 and 3, and the many that have its block."""
    shape = sizes(f)
    f.expect(activation="swiglu")  # Falcon 3's name for what hidden_act says
    bias = f.flag("attention_bias")
    rope = read_rope(f, shape.head_dim, context_len=context_len)
    return build(f, shape, ropes=rope, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias"))


def internlm3(f: Fields, context_len: int | None) -> DecoderConfig:
    shape = sizes(f, kv_heads=2)
    f.get("bias")  # of the older, remote code; attention_bias and mlp_bias say it now
    bias = f.flag("attention_bias", f.flag("qkv_bias"))
    rope = read_rope(f, shape.head_dim, context_len=context_len)
    return build(f, shape, ropes=rope, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias"))


def arcee(f: Fields, context_len: int | None) -> DecoderConfig:
    """Llama with an MLP of two matrices."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        act=activation(f, default="relu2"),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
        gated_mlp=False,
    )


def mistral(f: Fields, context_len: int | None) -> DecoderConfig:
    """A window, if any, in every layer."""
    shape = sizes(f, kv_heads=8)
    layer_types(f, shape.layers)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=windows(f, [SLIDING] * shape.layers, 4096),
    )


def ministral(f: Fields, context_len: int | None) -> DecoderConfig:
    """Window layers and full layers."""
    shape = sizes(f, kv_heads=8)
    default = [FULL if f.get("sliding_window", 4096) is None else SLIDING] * shape.layers
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=windows(f, layer_types(f, shape.layers, default), 4096),
    )


def ministral3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Queries grow with the logarithm of their position beyond the original context."""
    shape = sizes(f, kv_heads=8, head_dim=128)
    table = rope_parameters(f)
    rope = Fields(table, f"{f.origin}: rope parameters")
    beta, query_scale = rope.optional_number("llama_4_scaling_beta"), None
    table.pop("llama_4_scaling_beta", None)
    if beta is not None:
        period = rope.integer("original_max_position_embeddings")
        query_scale = QueryScaleSpec(beta, period)
    layer_types(f, shape.layers)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, table=table, theta=1e6, context_len=context_len),
        query_scale=query_scale,
        windows=windows(f, [SLIDING] * shape.layers),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
    )


def _qwen_windows(f: Fields, num_layers: int) -> list[int | None]:
    """A window from layer `max_window_layers` up, unless `layer_types` says where."""
    first = f.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        f.refuse("max_window_layers", f"is {first!r}; expected the number of full layers")
    if not f.flag("use_sliding_window"):
        layer_types(f, num_layers)
        f.get("sliding_window")
        return [None] * num_layers
    default = [SLIDING if i >= first else FULL for i in range(num_layers)]
    return windows(f, layer_types(f, num_layers, default), 4096)


def qwen2(f: Fields, context_len: int | None) -> DecoderConfig:
    """Biases on queries, keys and values."""
    shape = sizes(f, kv_heads=32)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=_qwen_windows(f, shape.layers),
        qkv_bias=True,
    )


def qwen3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Queries and keys normalised per head."""
    shape = sizes(f, kv_heads=32, head_dim=128)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=_qwen_windows(f, shape.layers),
        qk_norm=NormSpec(f.number("rms_norm_eps", 1e-6)),
        qkv_bias=bias,
        o_bias=bias,
    )


def smollm3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Layers whose entry in `no_rope_layers` is 0 have no positions."""
    shape = sizes(f, kv_heads=4)
    bias = f.flag("attention_bias")
    rope = read_rope(f, shape.head_dim, theta=2e6, context_len=context_len)
    interval = f.integer("no_rope_layer_interval", 4)
    has_rope = f.per_layer("no_rope_layers", shape.layers) or [
        (i + 1) % interval != 0 for i in range(shape.layers)
    ]
    sliding = f.flag("use_sliding_window") and f.get("sliding_window") is not None
    default = [SLIDING if sliding and not x else FULL for x in has_rope]
    return build(
        f,
        shape,
        ropes=[rope if x else None for x in has_rope],
        windows=windows(f, layer_types(f, shape.layers, default)),
        tie=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
    )


def phi3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Fused projections; a window in every layer; Phi-4 too."""
    shape = sizes(f)
    f.get("original_max_position_embeddings")
    f.expect(full_attn_mod=1, lm_head_bias=False)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, partial=1.0, context_len=context_len),
        windows=windows(f, [SLIDING] * shape.layers),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        layout="phi3",
    )


def granite(f: Fields, context_len: int | None) -> DecoderConfig:
    """Four multipliers; logits are divided by `logits_scaling`."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        scale=f.number("attention_multiplier", 1.0),
        embedding_multiplier=f.number("embedding_multiplier", 1.0),
        residual_multiplier=f.number("residual_multiplier", 1.0),
        logit_multiplier=1.0 / f.number("logits_scaling", 1.0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
    )


def seed_oss(f: Fields, context_len: int | None) -> DecoderConfig:
    """Biases on queries, keys and values apart from the output's."""
    shape = sizes(f, kv_heads=8, head_dim=128)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        qkv_bias=f.flag("attention_bias", True),
        o_bias=f.flag("attention_out_bias"),
        mlp_bias=f.flag("mlp_bias"),
    )


def ernie45(f: Fields, context_len: int | None) -> DecoderConfig:
    """Neighbours are rotated, not halves."""
    shape = sizes(f, kv_heads=2, head_dim=128)
    bias = f.flag("use_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, theta=5e5, interleaved=True, context_len=context_len),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        tie=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def helium(f: Fields, context_len: int | None) -> DecoderConfig:
    """Neighbours are rotated, not halves."""
    shape = sizes(f, head_dim=128)
    bias = f.flag("attention_bias")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, theta=1e5, interleaved=True, context_len=context_len),
        norm=NormSpec(f.number("rms_norm_eps", 1e-8)),
        qkv_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
    )


def cwm(f: Fields, context_len: int | None) -> DecoderConfig:
    """Llama with window layers between full ones."""
    shape = sizes(f, kv_heads=8, head_dim=128)
    default = [FULL if i % 4 == 0 else SLIDING for i in range(shape.layers)]
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, theta=1e6, context_len=context_len),
        windows=windows(f, layer_types(f, shape.layers, default), 8192),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        mlp_bias=f.flag("mlp_bias"),
    )


def hunyuan_dense(f: Fields, context_len: int | None) -> DecoderConfig:
    """Queries and keys normalised after rotation; `alpha` stretches the base once."""
    shape = sizes(f)
    bias = f.flag("attention_bias")
    # Released configs carry the fields of a larger family; these must be the dense text model's.
    f.expect(
        norm_type=("rms", "hf_rms"),
        use_cla=False,
        use_qk_norm=True,
        use_rotary_pos_emb=True,
        attention_head_dim=shape.head_dim,
        position_embedding_xdrope=False,
        num_experts=(0, 1),
    )
    for unused in (
        "cla_share_factor",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "add_classification_head",
        "dense_list",
        "anyres_pooling_size",
        "max_image_size",
    ):
        f.get(unused)
    table = rope_parameters(f)
    rope = Fields(table, f"{f.origin}: rope parameters")
    alpha = rope.number("alpha", 0.0)
    table.pop("alpha", None)
    if table.get("rope_type", table.get("type")) == "dynamic" and alpha:
        theta = rope.number("rope_theta", f.number("rope_theta", 10000.0))
        stretched = theta * alpha ** (shape.head_dim / (shape.head_dim - 2))
        table = {"rope_type": "default", "rope_theta": stretched}
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, table=table, context_len=context_len),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        qk_norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        qk_norm_after_rope=True,
        qkv_bias=bias,
        o_bias=bias,
        layout="hunyuan",
    )
