"""Configs of released mixtures and of latent attention: what is read, and what is refused."""

import math

import pytest

from jaxserve.errors import WeightsError
from jaxserve.models.registry import read_config
from jaxserve.types import LayerCache, group_layers

COMMON = {
    "hidden_act": "silu",
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "initializer_range": 0.02,
    "use_cache": True,
}

DEEPSEEK_V2_LITE = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
}

DEEPSEEK_V3 = DEEPSEEK_V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

QWEN3_CODER = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "qkv_bias": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "use_qk_norm": True,
    "use_sliding_window": False,
}


def test_deepseek_v2_lite_is_read_as_it_was_released():
    config = read_config(DEEPSEEK_V2_LITE)
    first, last = config.layers[0], config.layers[-1]
    assert first.experts is None and config.intermediate_size == 10944
    assert last.experts is not None and last.latent is not None
    assert (last.experts.num_experts, last.experts.top_k, last.experts.shared_size) == (64, 6, 2816)
    assert last.experts.scoring == "softmax" and not last.experts.renormalise
    strength = 0.1 * 0.707 * math.log(40) + 1
    assert last.scale == pytest.approx(192**-0.5 * strength**2)
    assert last.rope is not None and last.rope.interleaved and last.rope.amplitude == 1.0
    [group] = group_layers(config.layer_caches)
    assert group.cache == LayerCache(1, 576, None, 512) and len(group.layers) == 27
    assert group.cache.parts == 1
    assert config.max_position_embeddings == 163840


def test_deepseek_v3_chooses_by_groups_and_bias():
    experts = read_config(DEEPSEEK_V3).layers[3].experts
    assert experts is not None and experts.has_choice_bias and experts.scoring == "sigmoid"
    assert (experts.num_groups, experts.top_groups, experts.group_score) == (8, 4, "top2")
    assert experts.weight_scale == 2.5 and experts.renormalise


def test_fields_that_newer_qwen_configs_state_are_understood():
    config = read_config(QWEN3_CODER)
    assert all(x.experts is not None and x.experts.num_experts == 128 for x in config.layers)
    some = read_config(QWEN3_CODER | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [x.experts is not None for x in some.layers[:6]] == [False, True, False, False] + [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (DEEPSEEK_V3, "n_group", 7),
        (DEEPSEEK_V3, "scoring_func", "softmax"),
        (DEEPSEEK_V3, "moe_layer_freq", 2),
        (DEEPSEEK_V3, "mlp_layer_types", ["dense", "other"] * 31),
        (DEEPSEEK_V3, "quantization_config", {"quant_method": "fp8"}),
        (DEEPSEEK_V3, "index_topk", 2048),
        (DEEPSEEK_V2_LITE, "topk_method", "noaux_tc"),
        (QWEN3_CODER, "shared_expert_intermediate_size", 512),
        (QWEN3_CODER, "mlp_only_layers", "none"),
    ],
)
def test_what_would_route_or_compute_otherwise_is_refused(base, field, value):
    with pytest.raises(WeightsError, match=f"field '{field}'"):
        read_config(base | {field: value})
