"""Readers of config.json for the families with a mixture of experts and ordinary attention."""

from jaxserve.models.build import (
    SLIDING,
    Sizes,
    build,
    layer_types,
    sizes,
    windows,
)
from jaxserve.models.config import DecoderConfig, ExpertsSpec, NormSpec
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope

_DENSE, _SPARSE = "dense", "sparse"


def num_experts(f: Fields, name: str) -> int:
    """The number of experts, under the family's name or the one `transformers` now gives it."""
    given = f.optional_integer("num_local_experts")
    return f.integer(name, given) if given else f.integer(name)


def expect_no_routing_noise(f: Fields) -> None:
    """Fields that matter in training only."""
    for name in ("output_router_logits", "router_jitter_noise", "router_aux_loss_coef"):
        f.get(name)


def mixtral(f: Fields, context_len: int | None) -> DecoderConfig:
    """Softmax over the chosen experts; a window, if any, in every layer."""
    shape = sizes(f, kv_heads=8)
    expect_no_routing_noise(f)
    layer_types(f, shape.layers)
    spec = ExpertsSpec(
        num_experts=num_experts(f, "num_local_experts"),
        top_k=f.integer("num_experts_per_tok", 2),
        intermediate_size=f.integer("intermediate_size"),
    )
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, theta=1e6, context_len=context_len),
        windows=windows(f, [SLIDING] * shape.layers),
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        experts=[spec] * shape.layers,
        layout="mixtral",
    )


def _qwen_experts(f: Fields, shape: Sizes, spec: ExpertsSpec) -> list[ExpertsSpec | None]:
    """Which layers have experts: every `decoder_sparse_step`-th but those of `mlp_only_layers`."""
    step = f.integer("decoder_sparse_step", 1)
    dense = f.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(x) is int for x in dense):
        f.refuse("mlp_only_layers", f"is {dense!r}; expected a list of layers")
    return [spec if i not in dense and (i + 1) % step == 0 else None for i in range(shape.layers)]


def _qwen_windows(f: Fields, num_layers: int) -> list[int | None]:
    """None, unless one is turned on: then in the layers that `layer_types` names."""
    if not f.flag("use_sliding_window"):
        layer_types(f, num_layers)
        f.get("sliding_window")
        return [None] * num_layers
    first = f.get("max_window_layers", 28)
    default = [SLIDING if type(first) is int and i >= first else "full_attention"
               for i in range(num_layers)]  # fmt: skip
    return windows(f, layer_types(f, num_layers, default), 4096)


def qwen2_moe(f: Fields, context_len: int | None) -> DecoderConfig:
    """Biases on queries, keys and values; a shared expert with a switch of its own."""
    shape = sizes(f, kv_heads=16)
    expect_no_routing_noise(f)
    spec = ExpertsSpec(
        num_experts=num_experts(f, "num_experts"),
        top_k=f.integer("num_experts_per_tok", 4),
        intermediate_size=f.integer("moe_intermediate_size"),
        renormalise=f.flag("norm_topk_prob"),
        shared_size=f.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=_qwen_windows(f, shape.layers),
        qkv_bias=f.flag("qkv_bias", True),
        experts=_qwen_experts(f, shape, spec),
        layout="qwen_moe",
    )


def qwen3_moe(f: Fields, context_len: int | None) -> DecoderConfig:
    """Queries and keys normalised per head."""
    shape = sizes(f, kv_heads=4)
    expect_no_routing_noise(f)
    f.expect(use_qk_norm=True, qkv_bias=False, shared_expert_intermediate_size=0)
    bias = f.flag("attention_bias")
    spec = ExpertsSpec(
        num_experts=num_experts(f, "num_experts"),
        top_k=f.integer("num_experts_per_tok", 8),
        intermediate_size=f.integer("moe_intermediate_size"),
        renormalise=f.flag("norm_topk_prob"),
    )
    if f.flag("use_sliding_window"):
        # With one, `transformers` has it in every layer.
        window_list = windows(f, [SLIDING] * shape.layers, 4096)
    else:
        window_list = _qwen_windows(f, shape.layers)
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=window_list,
        qk_norm=NormSpec(f.number("rms_norm_eps", 1e-6)),
        qkv_bias=bias,
        o_bias=bias,
        experts=_qwen_experts(f, shape, spec),
    )


def olmoe(f: Fields, context_len: int | None) -> DecoderConfig:
    """Queries and keys normalised over all heads, then clipped, as values are."""
    shape = sizes(f)
    expect_no_routing_noise(f)
    bias = f.flag("attention_bias")
    spec = ExpertsSpec(
        num_experts=num_experts(f, "num_experts"),
        top_k=f.integer("num_experts_per_tok", 8),
        intermediate_size=f.integer("intermediate_size"),
        renormalise=f.flag("norm_topk_prob"),
    )
    norm = NormSpec(f.number("rms_norm_eps", 1e-5))
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        norm=norm,
        qk_norm=norm,
        qk_norm_width="full",
        clip_qkv=f.optional_number("clip_qkv"),
        clip_after_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        experts=[spec] * shape.layers,
    )


def sigmoid_experts(f: Fields, **departures) -> ExpertsSpec:
    """The router of DeepSeek-V3, which many have taken over; `departures` from it by field."""
    expect_no_routing_noise(f)
    scoring = departures.get("scoring", "sigmoid")
    # The second is what dots.llm1 calls a sigmoid with a bias on the choice.
    f.expect(scoring_func=(scoring, "noaux_tc") if scoring == "sigmoid" else scoring)
    f.expect(moe_layer_freq=1)
    for name in ("topk_method", "ep_size", "seq_aux", "aux_loss_alpha"):
        f.get(name)
    num_shared = f.optional_integer("n_shared_experts")
    size = f.integer("moe_intermediate_size")
    spec = {
        "num_experts": num_experts(f, "n_routed_experts"),
        "top_k": f.integer("num_experts_per_tok"),
        "intermediate_size": size,
        "scoring": "sigmoid",
        "has_choice_bias": True,
        "num_groups": f.integer("n_group", 1),
        "top_groups": f.integer("topk_group", 1),
        "group_score": "top2",
        "renormalise": f.flag("norm_topk_prob", True),
        "weight_scale": f.number("routed_scaling_factor", 1.0),
        "shared_size": num_shared and num_shared * size,
    }
    spec = ExpertsSpec(**(spec | departures))
    if spec.num_experts % spec.num_groups or spec.top_groups > spec.num_groups:
        f.refuse(
            "n_group",
            f"is {spec.num_groups} with topk_group {spec.top_groups} and {spec.num_experts} "
            "experts; expected equal groups, and at most all of them",
        )
    return spec


def after_first_dense(f: Fields, num_layers: int, spec: ExpertsSpec) -> list[ExpertsSpec | None]:
    """Experts in all layers but the first, as `mlp_layer_types` or `first_k_dense_replace` says."""
    kinds = f.per_layer("mlp_layer_types", num_layers)
    first = f.get("first_k_dense_replace", 1)
    if type(first) is not int or first < 0:
        f.refuse("first_k_dense_replace", f"is {first!r}; expected the number of dense layers")
    if kinds is None:
        kinds = [_DENSE if i < first else _SPARSE for i in range(num_layers)]
    for kind in kinds:
        if kind not in (_DENSE, _SPARSE):
            f.refuse("mlp_layer_types", f"holds {kind!r}; expected {_DENSE} or {_SPARSE}")
    return [spec if kind == _SPARSE else None for kind in kinds]


def glm4_moe(f: Fields, context_len: int | None) -> DecoderConfig:
    """DeepSeek-V3's router; half of each head is rotated; GLM-4.5 to 4.7."""
    shape = sizes(f, kv_heads=8)
    norm = NormSpec(f.number("rms_norm_eps", 1e-5))
    rope = read_rope(f, shape.head_dim, partial=0.5, context_len=context_len)
    return build(
        f,
        shape,
        ropes=rope,
        norm=norm,
        qk_norm=norm if f.flag("use_qk_norm") else None,
        qkv_bias=f.flag("attention_bias"),
        experts=after_first_dense(f, shape.layers, sigmoid_experts(f)),
    )


def dots1(f: Fields, context_len: int | None) -> DecoderConfig:
    """DeepSeek-V3's router; queries and keys normalised per head; windows in some layers."""
    shape = sizes(f, kv_heads=32)
    norm = NormSpec(f.number("rms_norm_eps", 1e-6))
    bias = f.flag("attention_bias")
    types = layer_types(f, shape.layers)
    f.get("max_window_layers")
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, context_len=context_len),
        windows=windows(f, types, 4096),
        norm=norm,
        qk_norm=norm,
        qkv_bias=bias,
        o_bias=bias,
        experts=after_first_dense(f, shape.layers, sigmoid_experts(f)),
    )


def minimax_m2(f: Fields, context_len: int | None) -> DecoderConfig:
    """Sigmoid scores with a bias; queries and keys normalised over all heads; partial rotation."""
    shape = sizes(f, kv_heads=8, head_dim=128)
    expect_no_routing_noise(f)
    rotary_dim = f.optional_integer("rotary_dim")
    partial = rotary_dim / shape.head_dim if rotary_dim else 1.0
    norm = NormSpec(f.number("rms_norm_eps", 1e-6))
    f.expect(
        use_qk_norm=True, qk_norm_type="per_layer", scoring_func="sigmoid", use_routing_bias=True
    )
    f.expect(shared_intermediate_size=0)
    if any(kind != 1 for kind in f.per_layer("attn_type_list", shape.layers) or []):
        f.refuse("attn_type_list", "holds other kinds than 1, full attention")
    for name in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers"):
        f.get(name)  # layers that only draft tokens
    spec = ExpertsSpec(
        num_experts=num_experts(f, "num_local_experts"),
        top_k=f.integer("num_experts_per_tok", 8),
        intermediate_size=f.integer("intermediate_size"),
        scoring="sigmoid",
        has_choice_bias=True,
    )
    return build(
        f,
        shape,
        ropes=read_rope(f, shape.head_dim, theta=5e6, partial=partial, context_len=context_len),
        norm=norm,
        qk_norm=norm,
        qk_norm_width="full",
        experts=[spec] * shape.layers,
        layout="mixtral",
    )
