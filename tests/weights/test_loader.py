"""Loading: every layout of files gives the same weights, and every defect one clear line."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from jaxserve.errors import WeightsError
from jaxserve.weights import load_checkpoint, resolve_model
from jaxserve.weights.safetensors import TensorFiles, aligned_empty

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a checkpoint that may be broken."""
    return copy_of("llama31-v0", tmp_path)


def copy_of(name: str, tmp_path: Path) -> Path:
    target = tmp_path / name
    shutil.copytree(TINY / name, target, ignore=shutil.ignore_patterns("*.npz", ".jaxserve*"))
    return target


def load(folder, dtype="float32", **kwargs):
    return load_checkpoint(folder, dtype, progress=False, **kwargs)


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def assert_same(a, b) -> None:
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def refusal(folder, **kwargs) -> str:
    """The message of the WeightsError that loading raises: always one line."""
    with pytest.raises(WeightsError) as error:
        load(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_are_those_of_the_file(folder):
    model, tensors = load(folder), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(model.params["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        model.params["layers"][1]["down"], tensors["model.layers.1.mlp.down_proj.weight"]
    )
    np.testing.assert_array_equal(
        model.params["vectors"]["mlp_norm"][1],
        tensors["model.layers.1.post_attention_layernorm.weight"],
    )
    assert model.path == folder and model.dtype == "float32"
    assert model.generation_config["bos_token_id"] == 1


def test_fused_tensors_are_split_by_rows(tmp_path):
    folder = copy_of("phi3-v0", tmp_path)
    model, tensors = load(folder), load_file(folder / "model.safetensors")
    layer = model.params["layers"][1]
    fused = np.concatenate([layer["q"], layer["k"], layer["v"]])
    np.testing.assert_array_equal(fused, tensors["model.layers.1.self_attn.qkv_proj.weight"])
    fused = np.concatenate([layer["gate"], layer["up"]])
    np.testing.assert_array_equal(fused, tensors["model.layers.1.mlp.gate_up_proj.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama31-v0", "qwen3-v2", "gemma-v1"])
def test_any_stored_dtype_loads_into_any_compute_dtype(name, dtype):
    model = load(TINY / name, dtype)
    with TensorFiles(TINY / name) as files:
        stored = files.read("model.embed_tokens.weight")
    assert model.params["embed"].dtype == dtype
    np.testing.assert_array_equal(model.params["embed"], stored.astype(model.params["embed"].dtype))


def test_auto_dtype_is_the_checkpoints(tmp_path):
    assert load(TINY / "qwen3-v2", "auto").dtype == "bfloat16"
    folder = copy_of("gemma-v1", tmp_path)  # without an entry, the stored tensors decide
    values = json.loads((folder / "config.json").read_text())
    for name in ("torch_dtype", "dtype"):
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps(values))
    assert load(folder, "auto").dtype == "float16"


def test_names_may_lack_or_extend_the_usual_prefix(folder):
    whole = load(folder)
    for prefix, head in (("", ""), ("language_model.model.", "language_model.")):

        def rename(tensors, prefix=prefix, head=head):
            for name in list(tensors):
                tail = name.split("model.", 1)[-1] if "lm_head" not in name else None
                new = head + "lm_head.weight" if tail is None else prefix + tail
                tensors[new] = tensors.pop(name)

        edit_tensors(folder, rename)
        assert_same(load(folder).params, whole.params)


def test_derived_tensors_of_old_checkpoints_are_ignored(folder):
    whole = load(folder)
    inv_freq = np.ones(8, np.float32)
    edit_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq})
    )
    assert_same(load(folder).params, whole.params)


def test_tied_head_may_be_stored_or_not(tmp_path):
    folder = copy_of("llama2-v3", tmp_path)
    whole = load(folder)
    assert "head" not in whole.params
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": table}))
    assert_same(load(folder).params, whole.params)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": table * 2}))
    np.testing.assert_array_equal(load(folder).params["head"], table * 2)


def test_end_ids_of_the_generation_config_win(folder):
    assert load(folder).config.eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load(folder).config.eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "generation_config.json: field 'eos_token_id'" in refusal(folder)


def test_missing_shard_is_named(tmp_path):
    folder = copy_of("mistral-v0", tmp_path)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    message = refusal(folder)
    assert gone.name in message and "missing" in message


def test_tensor_listed_in_the_wrong_shard_is_named(tmp_path):
    folder = copy_of("mistral-v0", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = sorted(set(index["weight_map"].values()))[0]
    path.write_text(json.dumps(index))
    assert "'model.norm.weight'" in refusal(folder)


def test_index_cannot_name_files_elsewhere(tmp_path):
    folder = copy_of("mistral-v0", tmp_path)
    path = folder / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert "not the name of a file in the same folder" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_missing_tensor_is_named(folder, name):
    edit_tensors(folder, lambda t: t.pop(name))
    message = refusal(folder)
    assert repr(name) in message and "missing" in message


def test_unexpected_tensor_is_named(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, lambda t: t.update({name: np.ones(64, np.float32)}))
    assert repr(name) in refusal(folder)


def test_wrong_shape_is_named_with_both_shapes(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: np.ones((64, 64), np.float32)}))
    message = refusal(folder)
    assert repr(name) in message and "(64, 64)" in message and "(32, 64)" in message


def test_config_that_does_not_fit_the_tensors_is_refused(folder):
    edit_config(folder, vocab_size=300)
    assert "'model.embed_tokens.weight'" in refusal(folder)


def test_unsupported_stored_dtype_is_named(folder):
    name = "model.norm.weight"
    edit_tensors(folder, lambda t: t.update({name: np.ones(64, np.int8)}))
    message = refusal(folder)
    assert repr(name) in message and "I8" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    assert str(path) in refusal(folder)


def test_garbage_headers_are_refused(folder):
    path = folder / "model.safetensors"
    for header in (b"not json", b"[1]", b'{"a": {"dtype": "F32"}}', b'{"a": 3}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert str(path) in refusal(folder)
    entry = b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}'
    path.write_bytes(len(entry).to_bytes(8, "little") + entry + bytes(8))
    assert "'a'" in refusal(folder)


def test_unsupported_config_field_is_named_with_its_file(folder):
    edit_config(folder, clip_qkv=3.0)
    message = refusal(folder)
    assert str(folder / "config.json") in message and "'clip_qkv'" in message


def test_unknown_rope_type_is_named_with_its_file(folder):
    edit_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    message = refusal(folder)
    assert str(folder / "config.json") in message and "'spiral'" in message


def test_folders_without_weights_or_config_are_refused(tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin is a pickle, which is never loaded" in message
    assert "config.json" in refusal(tmp_path)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)


def test_unknown_dtype_is_refused():
    assert "'int8'" in refusal(TINY / "llama31-v0", dtype="int8")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_what_cannot_be_a_hub_name_is_not_looked_up(name):
    with pytest.raises(WeightsError, match="not a folder"):
        resolve_model(name)


def test_hub_names_are_fetched_without_pickles_and_no_weight_twice(monkeypatch, folder):
    seen = {}

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        seen.update(name=name, revision=revision, patterns=allow_patterns, not_=ignore_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("org/tiny", "v1") == folder
    assert seen["name"] == "org/tiny" and seen["revision"] == "v1"
    assert "*.safetensors" in seen["patterns"]
    assert not any("bin" in p or p in ("*", "*.py") for p in seen["patterns"])
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "config.json"]
    files = [*wanted, "consolidated.safetensors", "checkpoint-100/model.safetensors"]
    fetched = filter_repo_objects(
        files, allow_patterns=seen["patterns"], ignore_patterns=seen["not_"]
    )
    assert list(fetched) == wanted


def test_hub_failure_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nlong story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(WeightsError, match="^org/tiny: .*no route to host$"):
        resolve_model("org/tiny")


def test_buffers_are_aligned_so_that_cpu_devices_take_them_over():
    for shape in ((3, 5), (7,), (1, 4)):
        buffer = aligned_empty(shape, np.float32)
        assert buffer.shape == shape and buffer.ctypes.data % 64 == 0
    value = jax.device_put(buffer := aligned_empty((64, 64), np.float32))
    assert value.unsafe_buffer_pointer() == buffer.ctypes.data


def test_progress_goes_to_a_terminal_only_if_wanted(folder, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(folder)
    assert capfd.readouterr() == ("", "")
    (folder / ".jaxserve-fingerprint.json").unlink()
    load_checkpoint(folder, "float32", progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Loading weights" in captured.err and "Hashing weights" in captured.err


def test_files_are_closed_after_loading(folder):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    load(folder)
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    refusal(folder)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert after <= before


def test_dummy_weights_need_only_a_config_and_have_the_checkpoints_shapes(folder):
    expected = load(folder)
    (folder / "model.safetensors").unlink()
    found = load(folder, load_format="dummy")
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), model.params) for model in (found, expected)
    ]
    assert shapes[0] == shapes[1]
    # Otherwise blocks of one would be served to the other.
    assert found.fingerprint != expected.fingerprint
    matrices = jax.tree.leaves(found.params["layers"])
    assert all(0.5 < float(x.std()) * x.shape[-1] ** 0.5 < 2 for x in matrices)
