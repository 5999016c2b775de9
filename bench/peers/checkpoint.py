"""A random Llama checkpoint in Hugging Face layout, which every engine loads.

The shape is what matters to speed, the weights are noise. The tokenizer is a byte-level BPE in
which nearly every token is plain text, so that a server sends a piece of text for each token.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import ml_dtypes
import numpy as np

SPECIALS = ("<unk>", "<s>", "</s>")
WEIGHT_SCALE = 0.02
DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model with untied embeddings."""

    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int = 4096

    @property
    def layer_params(self) -> int:
        """Weights of one layer's matrices."""
        heads = 2 * self.heads + 2 * self.kv_heads
        return self.embed * (heads * self.head_dim + 3 * self.mlp)

    @property
    def num_params(self) -> int:
        norms = (2 * self.layers + 1) * self.embed
        return self.layers * self.layer_params + 2 * self.vocab * self.embed + norms

    @property
    def step_params(self) -> int:
        """Weights that each decode step reads: all but the embedding's rows that are not asked."""
        return self.num_params - self.vocab * self.embed

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim

    def prefill_flops(self, num_tokens: int) -> int:
        """Matrix products of a prompt, of which only the last token needs logits."""
        attention = 2 * self.layers * self.heads * self.head_dim * num_tokens**2
        weights = 2 * self.layers * self.layer_params * num_tokens
        return weights + attention + 2 * self.vocab * self.embed


SHAPES = {
    "m150": Shape(768, 16, 12, 4, 64, 2048, 32_000),
    "m25": Shape(384, 8, 6, 2, 64, 1024, 16_000),
    "tiny": Shape(32, 2, 4, 2, 8, 64, 512, context=256),
}


def make(shape_name: str, dtype: str, cache: Path) -> Path:
    """The folder of the checkpoint, written now unless it is there."""
    folder = cache / f"llama-{shape_name}-{dtype}"
    if folder.is_dir():
        return folder
    shape = SHAPES[shape_name]
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache))
    partial.chmod(0o755)
    for name, content in _json_files(shape, dtype).items():
        (partial / name).write_text(json.dumps(content))
    _write_weights(partial / "model.safetensors", shape, dtype)
    try:
        os.rename(partial, folder)
    except OSError:  # another run has just written the same
        shutil.rmtree(partial)
    return folder


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order in which they are stored."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, shape.embed)
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (shape.embed,)
        yield layer + "self_attn.q_proj.weight", (q_width, shape.embed)
        yield layer + "self_attn.k_proj.weight", (kv_width, shape.embed)
        yield layer + "self_attn.v_proj.weight", (kv_width, shape.embed)
        yield layer + "self_attn.o_proj.weight", (shape.embed, q_width)
        yield layer + "post_attention_layernorm.weight", (shape.embed,)
        yield layer + "mlp.gate_proj.weight", (shape.mlp, shape.embed)
        yield layer + "mlp.up_proj.weight", (shape.mlp, shape.embed)
        yield layer + "mlp.down_proj.weight", (shape.embed, shape.mlp)
    yield "model.norm.weight", (shape.embed,)
    yield "lm_head.weight", (shape.vocab, shape.embed)


def _write_weights(path: Path, shape: Shape, dtype: str) -> None:
    """One tensor at a time, so that memory holds no more than one."""
    numpy_dtype, stored_as = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors(shape):
        end = offset + int(np.prod(dims)) * numpy_dtype.itemsize
        header[name] = {"dtype": stored_as, "shape": dims, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, dims in tensors(shape):
            values = np.ones(dims, np.float32)
            if len(dims) > 1:
                values = rng.standard_normal(dims, np.float32) * np.float32(WEIGHT_SCALE)
            file.write(values.astype(numpy_dtype).tobytes())


def _json_files(shape: Shape, dtype: str) -> dict[str, Any]:
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.embed,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
            "max_position_embeddings": shape.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": _tokenizer(shape.vocab),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIALS[0],
            "bos_token": SPECIALS[1],
            "eos_token": SPECIALS[2],
            "model_max_length": shape.context,
        },
    }


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """Bytes, then pairs of letters, then pairs of pairs, until the vocabulary is full."""
    pairs = ["".join(pair) for pair in itertools.product(ascii_lowercase, repeat=2)]
    merges = itertools.chain(
        itertools.product(ascii_lowercase, repeat=2), itertools.product(pairs, repeat=2)
    )
    texts = [*SPECIALS, *_byte_alphabet()]
    chosen = list(itertools.islice(merges, vocab_size - len(texts)))
    texts += ["".join(merge) for merge in chosen]
    assert len(texts) == vocab_size
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(i, text) for i, text in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": [list(merge) for merge in chosen],
        },
    }


def _special(index: int, text: str) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": index, "content": text, "special": True, **dict.fromkeys(flags, False)}


def _byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level BPE."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (byte for byte in range(256) if byte not in shown)
    return [chr(byte) for byte in sorted(shown)] + [chr(256 + i) for i, _ in enumerate(hidden)]
