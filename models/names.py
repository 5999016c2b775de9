"""What the weights of `decoder.param_specs` are called in a Hugging Face checkpoint.

Knows only names. A layout is the Llama one with a few entries replaced; `{i}` is the layer.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Where a weight lies: a tensor, or its share of the rows of a fused one.

    `fused` lists the weights that the tensor holds, in order.
    """

    name: str
    fused: tuple[str, ...] = ()


PREFIXES = {
    "model.": "",
    "": "",
    "language_model.model.": "language_model.",
    "model.language_model.": "",
}
"""What may precede the names of the decoder, and then precedes the name of the output head.

The one under which the embedding is found holds for all.
"""

IGNORED_PARTS = ("rotary_emb.", "masked_bias", "vision_tower.", "multi_modal_projector.")
"""Tensors with one of these in their name are derived values or belong to an unused tower."""

_LLAMA = {
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
}

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
    "hunyuan": {
        "q_norm": "self_attn.query_layernorm.weight",
        "k_norm": "self_attn.key_layernorm.weight",
    },
}

_OUTSIDE_LAYERS = ("embed", "final_norm", "final_norm_bias")


def source_of(weight: str, layout: str, prefix: str) -> Source:
    """Where `weight` ("embed", "q", "attn_norm_bias", ...) lies in a checkpoint.

    The name still holds `{i}` if the weight belongs to a layer.
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
