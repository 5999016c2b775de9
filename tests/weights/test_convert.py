"""Orbax folders: the same model as the checkpoint they came from, in any dtype and sharding."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxserve.errors import WeightsError
from jaxserve.models.decoder import param_specs
from jaxserve.models.spec import param_shardings
from jaxserve.sharding import make_mesh
from jaxserve.weights import convert_checkpoint, load_checkpoint

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("orbax") / "llama"
    return convert_checkpoint(TINY / "llama31-v0", target, progress=False)


def load(folder, dtype="float32", mesh=None):
    return load_checkpoint(folder, dtype, mesh=mesh, progress=False)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", ["llama2-v3", "qwen3-v2", "phi3-v0", "starcoder2-v3"])
def test_round_trip_keeps_weights_config_and_fingerprint(name, tmp_path):
    folder = convert_checkpoint(TINY / name, tmp_path / "new" / name, progress=False)
    before, after = load(TINY / name, "auto"), load(folder, "auto")
    assert_same(after.params, before.params)
    assert (after.config, after.fingerprint, after.dtype) == (
        before.config,
        before.fingerprint,
        before.dtype,
    )
    assert after.generation_config == before.generation_config


def test_tokenizer_and_template_come_along(converted):
    copied = {p.name for p in converted.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= copied
    assert {"chat_template.jinja", "tokenizer_config.json"} <= copied
    assert not any(name.endswith(".safetensors") for name in copied)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restores_straight_into_dtype_and_sharding(converted, devices, dtype):
    mesh = make_mesh(devices)
    model = load(converted, dtype, mesh)
    assert_same(model.params, load(TINY / "llama31-v0", dtype, mesh).params)
    wanted = param_shardings(param_specs(model.config), mesh)
    assert jax.tree.map(lambda x: x.sharding, model.params) == wanted


def test_existing_folders_are_not_overwritten(converted):
    with pytest.raises(WeightsError, match="exists already"):
        convert_checkpoint(TINY / "llama31-v0", converted, progress=False)
    with pytest.raises(WeightsError, match="is an Orbax folder already"):
        convert_checkpoint(converted, converted.parent / "again", progress=False)


def test_failed_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "broken"
    ignore = shutil.ignore_patterns("*.npz")
    shutil.copytree(TINY / "llama31-v0", source, ignore=ignore)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def copy_of(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def refusal(folder) -> str:
    with pytest.raises(WeightsError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_config_that_does_not_fit_is_refused_by_tensor(converted, tmp_path):
    folder = copy_of(converted, tmp_path)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"vocab_size": 300}))
    message = refusal(folder)
    assert "'embed'" in message and "(256, 64)" in message and "(300, 64)" in message
    path.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    assert "'layers.2.down' is missing" in refusal(folder)
    path.write_text(json.dumps(values | {"tie_word_embeddings": True}))
    assert load(folder).config.tie_word_embeddings is False  # as the tree was written


def test_missing_tree_or_metadata_is_refused(converted, tmp_path):
    folder = copy_of(converted, tmp_path)
    metadata = folder / "jaxserve.json"
    text = metadata.read_text()
    metadata.write_text(text.replace('"format": 1', '"format": 99'))
    assert "field 'format' is 99" in refusal(folder)
    metadata.write_text(text.replace('"tied"', '"tight"'))
    assert "field 'tied'" in refusal(folder)
    metadata.write_text(text)
    shutil.rmtree(folder / "orbax")
    assert "orbax: is missing" in refusal(folder)


def test_damaged_data_is_refused(converted, tmp_path):
    folder = copy_of(converted, tmp_path)
    files = [p for p in (folder / "orbax").rglob("*") if p.is_file() and "/d/" in str(p)]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    largest.write_bytes(data)
    assert "orbax: is damaged" in refusal(folder)


def test_other_readers_of_orbax_see_the_same_tree(converted):
    restored = ocp.StandardCheckpointer().restore((converted / "orbax").resolve())
    params = load(converted).params
    np.testing.assert_array_equal(restored["embed"], params["embed"])
    np.testing.assert_array_equal(restored["layers"][1]["down"], params["layers"][1]["down"])
