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
from jaxserve.models.config import DecoderConfig
from jaxserve.models.registry import read_config
from jaxserve.models.spec import Params

NORM_EPS = 1e-5
ROPE_THETA = 500_000.0
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


def hf_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
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
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def decoder_config(tokenizer: Tokenizer) -> DecoderConfig:
    """The embedded model's architecture, as the project reads it back from config.json."""
    return read_config(hf_config(tokenizer))


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
    save_file(hf_tensors(params), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", hf_config(tokenizer))
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
        {
            "bos_token_id": tokenizer.token_to_id(BEGIN),
            "eos_token_id": tokenizer.token_to_id(END),
            "do_sample": False,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
