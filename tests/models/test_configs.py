"""What config.json may say: what is read, what is refused, and with which words."""

import json
from pathlib import Path

import pytest

from jaxserve.errors import WeightsError
from jaxserve.models.registry import read_config
from jaxserve.types import LayerCache, group_layers

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2, 3],
}


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "quick_gelu"),
        ("partial_rotary_factor", 1.5),
        ("quantization_config", {"quant_method": "fp8"}),
        ("clip_qkv", 8.0),
        ("partial_rotary_factor", 0.5),
        ("attention_temperature", 2),
        ("attn_logit_softcapping", 50.0),
        ("sliding_window", 4096),
        ("num_local_experts", 8),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("layer_types", ["full_attention"]),
        ("residual_multiplier", 0.22),
        ("use_qk_norm", True),
        ("use_bidirectional_attention", True),
        ("attention_bias", "yes"),
        ("hidden_size", 0),
        ("hidden_size", "32"),
        ("num_hidden_layers", None),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 5),
        ("eos_token_id", "</s>"),
        ("rope_scaling", "linear"),
        ("tie_word_embeddings", 1),
    ],
)
def test_unsupported_or_malformed_field_is_refused_by_name(field, value):
    named = {"num_attention_heads": "hidden_size"}.get(field, field)
    with pytest.raises(WeightsError, match=f"^config.json: field '{named}'") as error:
        read_config(LLAMA | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": True},
        {"torch_dtype": "bfloat16", "transformers_version": "4.40.0", "pretraining_tp": 1},
        {"sliding_window": None, "rope_scaling": None, "quantization_config": None},
        {"rope_interleaved": False, "residual_multiplier": 1.0, "num_local_experts": 0},
        {"unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}, "_name_or_path": "x/y"},
        {
            "temperature": 1.0,
            "top_k": 50,
            "use_flash_attention": True,
            "chunk_size_feed_forward": 0,
        },
        {"max_window_layers": 28, "head_dim": None, "layer_types": ["full_attention"] * 2},
    ],
)
def test_harmless_and_neutral_fields_change_nothing(extra):
    assert read_config(LLAMA | extra) == read_config(LLAMA)


def test_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(WeightsError, match="'NopeForCausalLM' is not supported.*LlamaForCausalLM"):
        read_config(LLAMA | {"architectures": ["NopeForCausalLM"]})
    with pytest.raises(WeightsError, match="field 'architectures'"):
        read_config({k: v for k, v in LLAMA.items() if k != "architectures"})


@pytest.mark.parametrize(
    "architecture, extra",
    [
        ("Gemma2ForCausalLM", {"sliding_window_size": 4096, "cache_implementation": "hybrid"}),
        (
            "Cohere2ForCausalLM",
            {
                "layer_switch": 4,
                "order_of_interleaved_layers": "local_attn_first",
                "position_embedding_type": "rope_gptj",
                "rotary_pct": 1.0,
                "use_embedding_sharing": True,
                "use_gated_activation": True,
                "use_parallel_block": True,
                "use_parallel_embedding": False,
            },
        ),
        ("Phi3ForCausalLM", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}),
        ("InternLM3ForCausalLM", {"bias": False, "qkv_bias": False}),
        ("Exaone4ForCausalLM", {"sliding_window_pattern": "LLLG"}),
        ("LlamaForCausalLM", {"activation": "swiglu"}),
        (
            "Starcoder2ForCausalLM",
            {
                "activation_function": "gelu",
                "attention_softmax_in_fp32": True,
                "layer_norm_epsilon": 1e-5,
                "scale_attention_softmax_in_fp32": True,
                "scale_attn_weights": True,
            },
        ),
    ],
)
def test_what_released_configs_say_beside_the_library_is_understood(architecture, extra):
    values = LLAMA | {"architectures": [architecture], "rms_norm_eps": None}
    assert read_config(values | extra) == read_config(values)


def test_a_released_field_with_another_value_is_refused():
    values = LLAMA | {"architectures": ["Cohere2ForCausalLM"], "use_parallel_block": False}
    with pytest.raises(WeightsError, match="'use_parallel_block' is False; only True is supported"):
        read_config(values)


def test_layer_caches_group_by_window():
    config = read_config(json.loads((TINY / "ministral-v1" / "config.json").read_text()))
    assert config.layer_caches[0] == LayerCache(2, 12, None)
    assert [x.window for x in config.layer_caches] == [None, 5, 5]
    groups = group_layers(config.layer_caches)
    assert [g.layers for g in groups] == [(0,), (1, 2)]


def test_gemma3_fields_left_out_take_the_values_of_the_family():
    config = read_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "num_attention_heads": 16},
        }
    )
    assert (config.vocab_size, config.layers[0].num_heads, config.layers[0].head_dim) == (
        262208,
        8,
        256,
    )
    assert [x.window for x in config.layers[:6]] == [1024] * 5 + [None]
    local, full = config.layers[0].rope, config.layers[5].rope
    assert local is not None and full is not None
    assert local.frequencies[0] == 1.0 and full.frequencies[0] == 0.125
    assert config.eos_token_ids == (1, 106) and config.tie_word_embeddings


@pytest.mark.parametrize(
    "kind, architecture",
    [("mistral", "MistralForCausalLM"), ("ministral3", "Ministral3ForCausalLM")],
)
def test_text_half_of_an_image_model_is_what_its_own_type_says(kind, architecture):
    rope = {"rope_type": "linear", "factor": 2.0}
    text = {**LLAMA, "model_type": kind, "num_key_value_heads": 2}
    del text["architectures"]
    if kind == "ministral3":
        rope |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    values = {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {}}
    config = read_config(values | {"text_config": text | {"rope_parameters": rope}})
    assert config.architecture == architecture
    assert (config.layers[0].query_scale is not None) == (kind == "ministral3")
    with pytest.raises(WeightsError, match="'text_config.model_type' is 'other'"):
        read_config(values | {"text_config": text | {"model_type": "other"}})
    with pytest.raises(WeightsError, match="field 'text_config' is None"):
        read_config(values)


@pytest.mark.parametrize("key", ["llama_4_scaling_beta", "alpha"])
def test_rope_parameters_of_another_family_are_refused(key):
    rope = {"rope_type": "linear", "factor": 2.0, key: 0.1}
    with pytest.raises(WeightsError, match=f"rope parameters: field '{key}'"):
        read_config(LLAMA | {"rope_parameters": rope})


def test_yarn_lengthens_the_context_that_can_be_asked_for():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read_config(LLAMA).max_position_embeddings == 128
    assert read_config(LLAMA | {"rope_scaling": yarn}).max_position_embeddings == 512
    stated = LLAMA | {"rope_scaling": yarn, "max_position_embeddings": 1024}
    assert read_config(stated).max_position_embeddings == 1024
    linear = {"type": "linear", "factor": 4.0}
    assert read_config(LLAMA | {"rope_scaling": linear}).max_position_embeddings == 128


def test_smollm3_leaves_every_fourth_layer_without_positions():
    values = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 8}
    config = read_config(values)
    assert [x.rope is not None for x in config.layers] == [True, True, True, False] * 2


def test_digest_covers_what_changes_the_mathematics_and_nothing_else():
    base = read_config(LLAMA).digest
    assert read_config(LLAMA | {"eos_token_id": 2, "max_position_embeddings": 256}).digest == base
    assert read_config(LLAMA | {"rms_norm_eps": 1e-6}).digest != base
    assert read_config(LLAMA | {"rope_theta": 20000.0}).digest != base


def test_errors_name_the_file_they_were_given():
    with pytest.raises(WeightsError, match="^/models/x/config.json: field 'vocab_size' is missing"):
        read_config({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "/models/x/config.json")
