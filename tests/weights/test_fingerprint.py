"""The fingerprint follows content: equal for equal weights, different for any change."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.weights import fingerprint, load_checkpoint
from jaxserve.weights.safetensors import TensorFiles

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    target = tmp_path / "model"
    ignore = shutil.ignore_patterns("*.npz", ".jaxserve*")
    shutil.copytree(TINY / "mistral-v0", target, ignore=ignore)
    return target


def fingerprint_of(folder: Path, dtype: str = "float32") -> str:
    return load_checkpoint(folder, dtype, progress=False).fingerprint


def merge_shards(folder: Path) -> None:
    tensors = {}
    for path in folder.glob("model-*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")


def test_does_not_depend_on_shards_order_of_tensors_or_compute_dtype(folder):
    before = fingerprint_of(folder)
    assert fingerprint_of(folder, "bfloat16") == before
    merge_shards(folder)
    assert fingerprint_of(folder) == before


def test_follows_a_single_bit_of_a_single_weight(folder):
    merge_shards(folder)
    before = fingerprint_of(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint_of(folder) != before


def test_follows_names_and_the_config(folder):
    before = fingerprint_of(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"sliding_window": 9}))
    assert fingerprint_of(folder) != before
    path.write_text(json.dumps(values | {"initializer_range": 0.5}))
    assert fingerprint_of(folder) == before


def test_is_computed_once_and_again_after_a_change(folder, monkeypatch):
    computed = []
    original = fingerprint._hash_tensors
    monkeypatch.setattr(
        fingerprint, "_hash_tensors", lambda *args: (computed.append(1), original(*args))[1]
    )
    merge_shards(folder)
    first = fingerprint_of(folder)
    assert fingerprint_of(folder) == first and len(computed) == 1
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])
    stat = path.stat()
    save_file(tensors, path)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint_of(folder) != first and len(computed) == 2


def test_is_kept_elsewhere_if_the_folder_cannot_be_written(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = os.replace

    def refuse(source, target):
        if Path(target).parent == folder:
            raise PermissionError(target)
        original(source, target)

    monkeypatch.setattr(fingerprint.os, "replace", refuse)
    with TensorFiles(folder) as files:
        first = fingerprint.weights_digest(files)
        assert sorted(p.name for p in folder.glob(".jaxserve*")) == []
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
        monkeypatch.setattr(fingerprint, "_hash_tensors", lambda *args: pytest.fail("not cached"))
        assert fingerprint.weights_digest(files) == first


def test_a_damaged_cache_is_computed_again(folder):
    first = fingerprint_of(folder)
    for text in ("{", "[]", '{"format": 1}', ""):
        (folder / fingerprint.CACHE_NAME).write_text(text)
        assert fingerprint_of(folder) == first
