"""The benchmark's checkpoint as a GGUF file, which is what llama.cpp reads.

Only what a Llama of random weights needs: the rows of query and key weights are not permuted to
llama.cpp's order of rotated pairs, since noise is as good in any order.
"""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from bench.peers.checkpoint import Shape, tensors

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
TENSOR_TYPES = {"float32": 0, "bfloat16": 30}
FILE_TYPES = {"float32": 0, "bfloat16": 32}
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(model: Path, shape: Shape, dtype: str) -> Path:
    """The file beside the checkpoint's weights, written now unless it is there."""
    path = model / "model.gguf"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file, (model / "model.safetensors").open("rb") as weights:
        _write(file, weights, json.loads((model / "tokenizer.json").read_text()), shape, dtype)
    partial.rename(path)
    return path


def _write(
    file: BinaryIO, weights: BinaryIO, tokenizer: dict[str, Any], shape: Shape, dtype: str
) -> None:
    header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
    data_start = weights.tell()
    metadata = _metadata(shape, dtype, tokenizer)
    named = list(tensors(shape))
    file.write(MAGIC + struct.pack("<IQQ", VERSION, len(named), len(metadata)))
    for key, (kind, value) in metadata.items():
        file.write(_string(key) + struct.pack("<I", kind) + _value(kind, value))
    offset = 0
    for name, dims in named:
        # Norms are float32 in every file.
        kind = TENSOR_TYPES["float32" if len(dims) == 1 else dtype]
        sizes = struct.pack(f"<{len(dims)}Q", *reversed(dims))
        file.write(_string(_name(name)) + struct.pack("<I", len(dims)) + sizes)
        file.write(struct.pack("<IQ", kind, offset))
        offset += _padded(4 * dims[0] if len(dims) == 1 else _size(header[name]))
    file.write(bytes(-file.tell() % ALIGNMENT))
    for name, dims in named:
        begin, end = header[name]["data_offsets"]
        weights.seek(data_start + begin)
        data = weights.read(end - begin)
        if len(dims) == 1 and dtype == "bfloat16":
            data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        file.write(data + bytes(-len(data) % ALIGNMENT))


def _metadata(shape: Shape, dtype: str, tokenizer: dict[str, Any]) -> dict[str, tuple[int, Any]]:
    texts = list(tokenizer["model"]["vocab"])
    num_special = len(tokenizer["added_tokens"])
    kinds = [CONTROL_TOKEN] * num_special + [NORMAL_TOKEN] * (len(texts) - num_special)
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    return {
        "general.architecture": (STRING, "llama"),
        "general.alignment": (UINT32, ALIGNMENT),
        "general.file_type": (UINT32, FILE_TYPES[dtype]),
        "llama.context_length": (UINT32, shape.context),
        "llama.embedding_length": (UINT32, shape.embed),
        "llama.block_count": (UINT32, shape.layers),
        "llama.feed_forward_length": (UINT32, shape.mlp),
        "llama.attention.head_count": (UINT32, shape.heads),
        "llama.attention.head_count_kv": (UINT32, shape.kv_heads),
        "llama.attention.key_length": (UINT32, shape.head_dim),
        "llama.attention.value_length": (UINT32, shape.head_dim),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "llama.rope.dimension_count": (UINT32, shape.head_dim),
        "llama.rope.freq_base": (FLOAT32, 10_000.0),
        "llama.vocab_size": (UINT32, shape.vocab),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, texts)),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, merges)),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
    }


def _name(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, items = value
        values = b"".join(_value(inner, item) for item in items)
        return struct.pack("<IQ", inner, len(items)) + values
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f"}[kind], value)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _size(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % ALIGNMENT
