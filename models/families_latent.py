"""Readers of config.json for the families with multi-head latent attention."""

import math

from jaxserve.models.build import Sizes, build, layer_types
from jaxserve.models.config import DecoderConfig, LatentSpec, NormSpec, QueryScaleSpec
from jaxserve.models.families_experts import after_first_dense, sigmoid_experts
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope, rope_parameters


def _latent(f: Fields) -> LatentSpec:
    return LatentSpec(
        query_rank=f.optional_integer("q_lora_rank"),
        rank=f.integer("kv_lora_rank"),
        nope_dim=f.integer("qk_nope_head_dim"),
        rope_dim=f.integer("qk_rope_head_dim"),
        value_dim=f.integer(
            "v_head_dim", f.integer("hidden_size") // f.integer("num_attention_heads")
        ),
        has_bias=f.flag("attention_bias"),
    )


def _sizes(f: Fields, latent: LatentSpec) -> Sizes:
    """Every head has a query of its own; what configs say of KV heads and head dims is derived."""
    heads = f.integer("num_attention_heads")
    for name in ("num_key_value_heads", "head_dim", "qk_head_dim"):
        f.get(name)
    num_layers = f.integer("num_hidden_layers")
    return Sizes(f.integer("hidden_size"), num_layers, heads, heads, latent.query_dim)


def _build(
    f: Fields,
    context_len: int | None,
    *,
    interleaved: bool | None = None,
    table: dict | None = None,
    **departures,
) -> DecoderConfig:
    """A config with latent attention.

    Args:
        interleaved: None: as the config says, and yes if it does not.
    """
    latent = _latent(f)
    shape = _sizes(f, latent)
    layer_types(f, shape.layers)
    if interleaved is None:
        interleaved = f.flag("rope_interleave", True)
    table = rope_parameters(f) if table is None else table
    rope = read_rope(
        f,
        latent.rope_dim,
        table=table,
        interleaved=interleaved,
        context_len=context_len,
    )
    return build(
        f,
        shape,
        ropes=rope,
        scale=latent.query_dim**-0.5 * _yarn_scale(f, table),
        latent=latent,
        o_bias=latent.has_bias,
        **departures,
    )


def _yarn_scale(f: Fields, table: dict) -> float:
    """What YaRN multiplies scores with in these families, beside its amplitude."""
    rope = Fields(table, f"{f.origin}: rope parameters")
    strength = rope.number("mscale_all_dim", 0.0)
    if table.get("rope_type", table.get("type", "default")) == "default" or not strength:
        return 1.0
    factor = rope.number("factor")
    return (0.1 * strength * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0


def deepseek_v2(f: Fields, context_len: int | None) -> DecoderConfig:
    """Softmax over all experts, never renormalised; groups are scored by their best."""
    method = f.choice(
        "topk_method", {"greedy": "greedy", "group_limited_greedy": "groups"}, "greedy"
    )
    groups = {} if method == "groups" else {"num_groups": 1, "top_groups": 1}
    if method != "groups":
        f.get("n_group")
        f.get("topk_group")
    spec = sigmoid_experts(
        f,
        scoring="softmax",
        has_choice_bias=False,
        group_score="max",
        renormalise=False,
        **groups,
    )
    num_layers = f.integer("num_hidden_layers")
    return _build(
        f,
        context_len,
        interleaved=True,
        mlp_bias=f.flag("mlp_bias"),
        experts=after_first_dense(f, num_layers, spec),
    )


def deepseek_v3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Sigmoid scores, groups scored by their two best; R1, Kimi K2, GigaChat 3 and others, too."""
    f.get("num_mtp_layers")
    num_layers = f.integer("num_hidden_layers")
    return _build(f, context_len, experts=after_first_dense(f, num_layers, sigmoid_experts(f)))


def mistral4(f: Fields, context_len: int | None) -> DecoderConfig:
    """DeepSeek-V3 with softmax scores and no bias; queries grow with their position."""
    spec = sigmoid_experts(f, scoring="softmax", has_choice_bias=False)
    table = rope_parameters(f)
    rope = Fields(table, f"{f.origin}: rope parameters")
    beta, query_scale = rope.optional_number("llama_4_scaling_beta"), None
    table.pop("llama_4_scaling_beta", None)
    table["partial_rotary_factor"] = 1.0  # configs say the rotated part of a query again
    if beta is not None:
        query_scale = QueryScaleSpec(beta, rope.integer("original_max_position_embeddings"))
    first = 0 if "first_k_dense_replace" not in f else None
    if first is not None:
        f.set_defaults(first_k_dense_replace=first)
    num_layers = f.integer("num_hidden_layers")
    return _build(
        f,
        context_len,
        table=table,
        query_scale=query_scale,
        experts=after_first_dense(f, num_layers, spec),
    )


def youtu(f: Fields, context_len: int | None) -> DecoderConfig:
    """Latent attention with ordinary MLPs."""
    return _build(f, context_len, tie=True)


def minicpm3(f: Fields, context_len: int | None) -> DecoderConfig:
    """Latent attention, halves rotated, and the scales of muP."""
    num_layers, hidden = f.integer("num_hidden_layers"), f.integer("hidden_size")
    depth = f.number("scale_depth", 1.4)
    return _build(
        f,
        context_len,
        interleaved=False,
        tie=True,
        norm=NormSpec(f.number("rms_norm_eps", 1e-5)),
        embedding_multiplier=f.number("scale_emb", 12.0),
        residual_multiplier=depth / math.sqrt(num_layers),
        logit_multiplier=f.number("dim_model_base", 256.0) / hidden,
    )
