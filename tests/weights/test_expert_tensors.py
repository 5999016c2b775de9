"""Tensors of experts and latents: each layout on disk gives the same weights."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve.sharding import make_mesh
from jaxserve.weights import convert_checkpoint, load_checkpoint
from tests.weights.test_loader import (
    TINY,
    assert_same,
    copy_of,
    edit_config,
    edit_tensors,
    load,
    refusal,
)

NAMES = ("mixtral-v3", "deepseek_v3-v0")
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def test_experts_are_stacked_in_order_and_heads_split_into_keys_and_values():
    model = load(TINY / "deepseek_v3-v0")
    tensors = load_file(TINY / "deepseek_v3-v0" / "model.safetensors")
    weights = model.params["layers"][1]
    for kind in ("gate", "up", "down"):
        for e, expert in enumerate(np.asarray(weights[f"experts_{kind}"])):
            np.testing.assert_array_equal(expert, tensors[EXPERT.format(e, kind)])
    latent = model.config.layers[1].latent
    assert latent is not None
    kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    kv_b = kv_b.reshape(4, latent.nope_dim + latent.value_dim, latent.rank)
    np.testing.assert_array_equal(weights["k_up"], kv_b[:, : latent.nope_dim])
    np.testing.assert_array_equal(weights["v_up"], kv_b[:, latent.nope_dim :])
    assert "experts_up" not in model.params["layers"][0]  # the first layer is dense


def test_one_tensor_may_hold_all_experts(tmp_path):
    folder = copy_of("deepseek_v3-v0", tmp_path)

    def put_together(tensors):
        def stacked(kind):
            return np.stack([tensors.pop(EXPERT.format(e, kind)) for e in range(4)])

        gate_up = np.concatenate([stacked("gate"), stacked("up")], axis=1)
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = gate_up
        tensors["model.layers.1.mlp.experts.down_proj"] = stacked("down")

    edit_tensors(folder, put_together)
    assert_same(load(folder).params, load(TINY / "deepseek_v3-v0").params)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_reads_its_share_of_every_expert(name, devices):
    whole = load(TINY / name)
    split = load(TINY / name, mesh=make_mesh(devices))
    assert_same(split.params, whole.params)
    up_efd = split.params["layers"][1]["experts_up"]
    shares = {shard.data.shape for shard in up_efd.addressable_shards}
    num_experts, size, hidden = up_efd.shape
    assert shares == {(num_experts, size // devices, hidden)}


def test_choice_bias_keeps_its_precision_whatever_the_compute_dtype(tmp_path):
    folder = copy_of("deepseek_v3-v0", tmp_path)
    name, bias = "model.layers.1.mlp.gate.e_score_correction_bias", 1 + 2.0**-20

    def set_bias(tensors):
        tensors[name] = np.full(4, bias, np.float32)

    edit_tensors(folder, set_bias)
    convert_checkpoint(folder, tmp_path / "orbax", progress=False)
    for place in (folder, tmp_path / "orbax"):
        weights = load(place, "bfloat16").params["layers"][1]
        assert weights["router"].dtype.name == "bfloat16"
        np.testing.assert_array_equal(weights["choice_bias"], np.full(4, bias, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_orbax_gives_the_same_weights(name, tmp_path):
    convert_checkpoint(TINY / name, tmp_path / "orbax", progress=False)
    stored = load_checkpoint(tmp_path / "orbax", "float32", progress=False, mesh=make_mesh(2))
    assert_same(jax.device_get(stored.params), jax.device_get(load(TINY / name).params))


def test_layers_that_only_draft_tokens_are_left_out(tmp_path):
    folder = copy_of("deepseek_v3-v0", tmp_path)

    def add_draft(tensors):
        ones = np.ones((64, 128), np.float32)
        tensors["model.layers.2.eh_proj.weight"] = ones
        tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = ones

    edit_tensors(folder, add_draft)
    edit_config(folder, num_nextn_predict_layers=1)
    assert_same(load(folder).params, load(TINY / "deepseek_v3-v0").params)
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"))
    assert "model.layers.2.mlp.experts.0.up_proj.weight" in refusal(folder)


def test_an_expert_that_is_missing_or_misshapen_is_named(tmp_path):
    folder = copy_of("deepseek_v3-v0", tmp_path)
    name = EXPERT.format(3, "up")
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    assert name in refusal(folder) and "expected (32, 64)" in refusal(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"tensor {name!r} is missing" in refusal(folder)
