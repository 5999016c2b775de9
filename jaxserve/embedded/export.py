"""Writes the embedded model as a Hugging Face checkpoint folder.

Knows nothing of training. The weights are stored in bfloat16 under the names of LlamaForCausalLM.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxserve.embedded.tokenizer_training import BEGIN, CHAT_TEMPLATE, END
from jaxserve.models.config import DecoderConfig, LayerSpec, NormSpec, RopeSpec
from jaxserve.models.spec import Params

NORM_EPS = 1e-5
ROPE_THETA = 100_000.0
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 256
NUM_LAYERS = 4
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 64
MAX_POSITIONS = 2048

LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
VECTOR_NAMES = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def decoder_config(vocab_size: int, eos_token_id: int) -> DecoderConfig:
    """The embedded model's architecture: what `hf_config` says, for the project's decoder."""
    exponents = np.arange(0, HEAD_DIM, 2) / HEAD_DIM
    layer = LayerSpec(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        rope=RopeSpec(tuple(float(x) for x in ROPE_THETA**-exponents)),
        query_scale=None,
        scale=HEAD_DIM**-0.5,
    )
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        eos_token_ids=(eos_token_id,),
        layers=(layer,) * NUM_LAYERS,
        norm=NormSpec(eps=NORM_EPS),
        final_norm=NormSpec(eps=NORM_EPS),
        activation="silu",
    )


def hf_config(vocab_size: int, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def hf_tensors(params: Params) -> dict[str, np.ndarray]:
    """The decoder's parameters under their checkpoint names, in bfloat16."""
    named = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
        "lm_head.weight": params["head"],
    }
    for i, layer in enumerate(params["layers"]):
        for ours, theirs in LAYER_NAMES.items():
            named[f"model.layers.{i}.{theirs}.weight"] = layer[ours]
        for ours, theirs in VECTOR_NAMES.items():
            named[f"model.layers.{i}.{theirs}.weight"] = params["vectors"][ours][i]
    return {name: np.asarray(jnp.asarray(x).astype(jnp.bfloat16)) for name, x in named.items()}


def write_checkpoint(folder: Path, params: Params, tokenizer: Tokenizer) -> None:
    """Write config, weights, tokenizer, chat template and generation defaults into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    begin_id, end_id = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    assert begin_id is not None and end_id is not None
    save_file(hf_tensors(params), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", hf_config(tokenizer.get_vocab_size(), begin_id, end_id))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": END,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": begin_id, "eos_token_id": end_id, "do_sample": False},
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
