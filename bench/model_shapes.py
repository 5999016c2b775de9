"""Configs of models whose shapes are compiled and timed with random weights, and their counts."""

from typing import Any

from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import param_specs
from jaxserve.models.spec import is_spec

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": [128001, 128008, 128009],
    "tie_word_embeddings": False,
}

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
}

SHAPES = {"Llama-3.1-8B": LLAMA_31_8B, "Qwen3-8B": QWEN3_8B}

TINY: dict[str, Any] = {
    **LLAMA_31_8B,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "eos_token_id": 2,
}
"""The same kind of model for a run that only shows that everything works."""


class Counts:
    """What a step of a model must read and compute.

    Attributes:
        layer_weights: numbers in the matrices of all layers.
        head_weights: of the output head.
        token_values: numbers of keys and values that a token has in all layers.
    """

    def __init__(self, config: DecoderConfig):
        import jax

        specs = param_specs(config)
        sizes = [_size(x) for x in jax.tree.leaves(specs["layers"], is_leaf=is_spec)]
        self.layer_weights = sum(sizes)
        self.head_weights = config.vocab_size * config.hidden_size
        self.token_values = sum(2 * x.num_kv_heads * x.head_dim for x in config.layers)
        self._pair_flops = sum(4 * x.num_heads * x.head_dim for x in config.layers)

    def decode_bytes(self, kv_lens: "list[int]", itemsize: int) -> int:
        """All weights but the embedding, and the keys and values of all tokens."""
        weights = self.layer_weights + self.head_weights
        return (weights + sum(kv_lens) * self.token_values) * itemsize

    def prefill_flops(self, prompt_lens: "list[int]") -> int:
        """Of prompts, each with one token of logits; causal attention counts what it sees."""
        pairs = sum(n * (n + 1) // 2 for n in prompt_lens)
        products = 2 * (sum(prompt_lens) * self.layer_weights)
        head = 2 * len(prompt_lens) * self.head_weights
        return products + head + pairs * self._pair_flops


def _size(spec: Any) -> int:
    size = 1
    for dim in spec.shape:
        size *= dim
    return size
