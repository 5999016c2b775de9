"""Architecture name -> reader of its config.json. Adding a family is a reader and a line here."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import WeightsError
from jaxserve.models import (
    families,
    families_experts,
    families_latent,
    families_layer_norm,
    families_post_norm,
)
from jaxserve.models.config import DecoderConfig
from jaxserve.models.fields import Fields

Reader = Callable[[Fields, int | None], DecoderConfig]

ARCHITECTURES: dict[str, Reader] = {
    "LlamaForCausalLM": families.llama,
    "InternLM3ForCausalLM": families.internlm3,
    "ArceeForCausalLM": families.arcee,
    "MistralForCausalLM": families.mistral,
    "MinistralForCausalLM": families.ministral,
    "Ministral3ForCausalLM": families.ministral3,
    "Qwen2ForCausalLM": families.qwen2,
    "Qwen3ForCausalLM": families.qwen3,
    "SmolLM3ForCausalLM": families.smollm3,
    "Phi3ForCausalLM": families.phi3,
    "GraniteForCausalLM": families.granite,
    "SeedOssForCausalLM": families.seed_oss,
    "Ernie4_5ForCausalLM": families.ernie45,
    "HeliumForCausalLM": families.helium,
    "CwmForCausalLM": families.cwm,
    "HunYuanDenseV1ForCausalLM": families.hunyuan_dense,
    "Exaone4ForCausalLM": families_post_norm.exaone4,
    "GemmaForCausalLM": families_post_norm.gemma,
    "Gemma2ForCausalLM": families_post_norm.gemma2,
    "Gemma3ForCausalLM": families_post_norm.gemma3,
    "GlmForCausalLM": families_post_norm.glm,
    "Glm4ForCausalLM": families_post_norm.glm4,
    "OlmoForCausalLM": families_layer_norm.olmo,
    "Olmo2ForCausalLM": families_post_norm.olmo2,
    "Olmo3ForCausalLM": families_post_norm.olmo3,
    "HyperCLOVAXForCausalLM": families_post_norm.hyperclovax,
    "CohereForCausalLM": families_layer_norm.cohere,
    "Cohere2ForCausalLM": families_layer_norm.cohere2,
    "Starcoder2ForCausalLM": families_layer_norm.starcoder2,
    "NemotronForCausalLM": families_layer_norm.nemotron,
    "Jais2ForCausalLM": families_layer_norm.jais2,
    "PhiForCausalLM": families_layer_norm.phi,
    "StableLmForCausalLM": families_layer_norm.stablelm,
    "MixtralForCausalLM": families_experts.mixtral,
    "Qwen2MoeForCausalLM": families_experts.qwen2_moe,
    "Qwen3MoeForCausalLM": families_experts.qwen3_moe,
    "OlmoeForCausalLM": families_experts.olmoe,
    "Glm4MoeForCausalLM": families_experts.glm4_moe,
    "Dots1ForCausalLM": families_experts.dots1,
    "MiniMaxM2ForCausalLM": families_experts.minimax_m2,
    "DeepseekV2ForCausalLM": families_latent.deepseek_v2,
    "DeepseekV3ForCausalLM": families_latent.deepseek_v3,
    "Glm4MoeLiteForCausalLM": families_latent.deepseek_v3,
    "Mistral4ForCausalLM": families_latent.mistral4,
    "YoutuForCausalLM": families_latent.youtu,
    "MiniCPM3ForCausalLM": families_latent.minicpm3,
}

IMAGE_TEXT_ARCHITECTURES = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration")
"""Image and text models that are served without their image half."""

TEXT_MODEL_TYPES: dict[str, str] = {
    "gemma3_text": "Gemma3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
}
"""`model_type` of such a model's `text_config` -> the architecture of its text half."""


def read_config(
    values: Mapping[str, Any], origin: str = "config.json", context_len: int | None = None
) -> DecoderConfig:
    """The decoder that a parsed config.json describes.

    Args:
        origin: what to call the file in errors.
        context_len: longest sequence that will be served, if shorter than the model allows.

    Raises:
        WeightsError: the architecture is unknown, or a field is missing, malformed or unsupported.
    """
    values = dict(values)
    names = values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise WeightsError(f"{origin}: field 'architectures' is {names!r}; expected one name")
    name = names[0]
    if name in IMAGE_TEXT_ARCHITECTURES:
        values = _text_half(values, origin)
        name = values["architectures"][0]
    if name not in ARCHITECTURES:
        raise WeightsError(
            f"{origin}: architecture {name!r} is not supported; supported are "
            + ", ".join(sorted(ARCHITECTURES))
        )
    fields = Fields(values, origin)
    config = ARCHITECTURES[name](fields, context_len)
    fields.refuse_leftovers()
    return config


def _text_half(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """The fields of the language model inside an image and text model."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise WeightsError(f"{origin}: field 'text_config' is {text!r}; expected an object")
    kind = text.get("model_type")
    if kind not in TEXT_MODEL_TYPES:
        raise WeightsError(
            f"{origin}: field 'text_config.model_type' is {kind!r}; supported are "
            + ", ".join(TEXT_MODEL_TYPES)
        )
    shared = ("eos_token_id", "tie_word_embeddings", "quantization_config")
    outer = {name: values[name] for name in shared if name in values}
    return outer | text | {"architectures": [TEXT_MODEL_TYPES[kind]]}
