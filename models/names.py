"""What the weights of `decoder.param_specs` are called in a Hugging Face checkpoint.

Knows only names. A layout is the Llama one with a few entries replaced; `{i}` is the layer, `{e}`
the expert, where each has a tensor of its own.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Where a weight lies: a tensor, or its share of the rows of a fused one.

    `fused` lists the weights that the tensor holds, in order: once, or once for each unit of their
    first axis (head or expert).
    """

    name: str
    fused: tuple[str, ...] = ()
    by_unit: bool = False


PREFIXES = {
    "model.": "",
    "": "",
    "language_model.model.": "language_model.",
    "model.language_model.": "",
}
"""What may precede the names of the decoder, and then precedes the name of the output head.

The one under which the embedding is found holds for all.
"""

DRAFT_MARK = "eh_proj.weight"
"""A layer beyond the model's own that has this tensor drafts tokens (multi-token prediction)."""

IGNORED_PARTS = ("rotary_emb.", "masked_bias", "vision_tower.", "multi_modal_projector.")
"""Tensors with one of these in their name are derived values or belong to an unused tower."""

_LLAMA: dict[str, str | Source] = {
    "embed": "embed_tokens.weight",
    "final_norm": "norm.weight",
    "final_norm_bias": "norm.bias",
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "k_up": Source("self_attn.kv_b_proj.weight", ("k_up", "v_up"), by_unit=True),
    "v_up": Source("self_attn.kv_b_proj.weight", ("k_up", "v_up"), by_unit=True),
    "router": "mlp.gate.weight",
    "choice_bias": "mlp.gate.e_score_correction_bias",
    "experts_gate": "mlp.experts.{e}.gate_proj.weight",
    "experts_up": "mlp.experts.{e}.up_proj.weight",
    "experts_down": "mlp.experts.{e}.down_proj.weight",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
    "shared_switch": "mlp.shared_expert_gate.weight",
}

_EXPERTS_TOGETHER: dict[str, Source] = {
    "experts_gate": Source("mlp.experts.gate_up_proj", ("experts_gate", "experts_up"), True),
    "experts_up": Source("mlp.experts.gate_up_proj", ("experts_gate", "experts_up"), True),
    "experts_down": Source("mlp.experts.down_proj"),
}
"""What `transformers` calls them in memory, and some checkpoints on disk."""

_FUSED_GATE_UP = {
    "gate": Source("mlp.gate_up_proj.weight", ("gate", "up")),
    "up": Source("mlp.gate_up_proj.weight", ("gate", "up")),
}

_OVERRIDES: dict[str, dict[str, str | Source]] = {
    "llama": {},
    "post_norm": {
        "post_attn_norm": "post_attention_layernorm.weight",
        "post_mlp_norm": "post_feedforward_layernorm.weight",
    },
    "gemma_sandwich": {
        "post_attn_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "post_mlp_norm": "post_feedforward_layernorm.weight",
    },
    "hyperclovax": {"post_attn_norm": "post_norm1.weight", "post_mlp_norm": "post_norm2.weight"},
    "glm": dict(_FUSED_GATE_UP),
    "glm4": {
        **_FUSED_GATE_UP,
        "post_attn_norm": "post_self_attn_layernorm.weight",
        "post_mlp_norm": "post_mlp_layernorm.weight",
    },
    "phi3": {
        **_FUSED_GATE_UP,
        "q": Source("self_attn.qkv_proj.weight", ("q", "k", "v")),
        "k": Source("self_attn.qkv_proj.weight", ("q", "k", "v")),
        "v": Source("self_attn.qkv_proj.weight", ("q", "k", "v")),
    },
    "phi": {
        "o": "self_attn.dense.weight",
        "up": "mlp.fc1.weight",
        "down": "mlp.fc2.weight",
        "final_norm": "final_layernorm.weight",
        "final_norm_bias": "final_layernorm.bias",
        "q_norm": "self_attn.q_layernorm.weight",
        "k_norm": "self_attn.k_layernorm.weight",
    },
    "starcoder2": {"up": "mlp.c_fc.weight", "down": "mlp.c_proj.weight"},
    "mixtral": {
        "router": "block_sparse_moe.gate.weight",
        "experts_gate": "block_sparse_moe.experts.{e}.w1.weight",
        "experts_up": "block_sparse_moe.experts.{e}.w3.weight",
        "experts_down": "block_sparse_moe.experts.{e}.w2.weight",
        "choice_bias": "block_sparse_moe.e_score_correction_bias",
    },
    "qwen_moe": {
        "shared_gate": "mlp.shared_expert.gate_proj.weight",
        "shared_up": "mlp.shared_expert.up_proj.weight",
        "shared_down": "mlp.shared_expert.down_proj.weight",
    },
    "hunyuan": {
        "q_norm": "self_attn.query_layernorm.weight",
        "k_norm": "self_attn.key_layernorm.weight",
    },
}

_OUTSIDE_LAYERS = ("embed", "final_norm", "final_norm_bias")


def together_source_of(weight: str, prefix: str) -> Source | None:
    """Where a weight of experts lies if one tensor holds those of all experts."""
    source = _EXPERTS_TOGETHER.get(weight)
    return source and source._replace(name=prefix + "layers.{i}." + source.name)


def source_of(weight: str, layout: str, prefix: str) -> Source:
    """Where `weight` ("embed", "q", "attn_norm_bias", ...) lies in a checkpoint.

    The name still holds `{i}` if the weight belongs to a layer, and `{e}` if to experts.
    """
    if weight in ("head", "head_bias"):
        kind = "bias" if weight == "head_bias" else "weight"
        return Source(f"{PREFIXES[prefix]}lm_head.{kind}")
    names: dict[str, str | Source] = {**_LLAMA, **_OVERRIDES[layout]}
    if weight in names:
        entry = names[weight]
    else:
        owner = names[weight.removesuffix("_bias")]
        entry = (
            owner._replace(name=_bias_of(owner.name))
            if isinstance(owner, Source)
            else _bias_of(owner)
        )
    source = entry if isinstance(entry, Source) else Source(entry)
    place = prefix if weight in _OUTSIDE_LAYERS else prefix + "layers.{i}."
    return source._replace(name=place + source.name)


def _bias_of(weight_name: str) -> str:
    return weight_name.removesuffix(".weight") + ".bias"
