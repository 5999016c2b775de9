"""The rules table: what is split over how many devices, and that results do not change."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve.errors import ConfigError
from jaxserve.models import decoder
from jaxserve.models.spec import param_shardings
from jaxserve.sharding import Axis, make_mesh, partition_spec
from jaxserve.weights import load_checkpoint
from tests.models.dense_attention import dense_attend

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


@pytest.mark.parametrize(
    "axes, devices, expected",
    [
        ((Axis("q_heads", 4, 16), Axis("embed", 64)), 4, P("tensor", None)),
        ((Axis("embed", 64), Axis("q_heads", 4, 16)), 2, P(None, "tensor")),
        ((Axis("q_heads", 6, 12), Axis("embed", 48)), 4, P(None, None)),  # 72 rows, but 6 heads
        ((Axis("kv_heads", 2, 16), Axis("embed", 64)), 4, P(None, None)),
        ((Axis("kv_heads", 2, 16), Axis("embed", 64)), 2, P("tensor", None)),
        ((Axis("vocab", 256), Axis("embed", 64)), 4, P("tensor", None)),
        ((Axis("vocab", 257), Axis("embed", 64)), 4, P(None, None)),
        ((Axis("layers", 4), Axis("mlp", 96)), 4, P(None, "tensor")),
        ((Axis("layers", 4), Axis("embed", 64)), 4, P(None, None)),
    ],
)
def test_axes_are_split_only_where_whole_units_fit(axes, devices, expected):
    assert partition_spec(axes, make_mesh(devices)) == expected


def test_more_devices_than_there_are_is_a_config_error():
    with pytest.raises(ConfigError, match="tensor_parallel_size is 64, but there are only"):
        make_mesh(64)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(
    "name", ["llama31-v0", "olmo3-v0", "phi3-v0", "starcoder2-v3", "deepseek_v3-v0"]
)
def test_sharded_weights_give_the_same_logits(name, devices):
    expected = np.load(TINY / name / "expected.npz")
    mesh = make_mesh(devices)
    model = load_checkpoint(TINY / name, "float32", mesh=mesh, progress=False)
    wanted = param_shardings(decoder.param_specs(model.config), mesh)
    assert jax.tree.map(lambda x: x.sharding, model.params) == wanted

    def run(params, tokens_t):
        positions_t = jnp.arange(tokens_t.shape[0], dtype=jnp.int32)
        attend = dense_attend(model.config)
        hidden_td, _ = decoder.forward(params, model.config, tokens_t, positions_t, attend, None)
        return decoder.compute_logits(params, model.config, hidden_td)

    logits_tv = jax.jit(run)(model.params, jnp.asarray(expected["input_ids"], jnp.int32))
    assert np.abs(np.asarray(logits_tv) - expected["logits"]).max() <= 1e-4


def test_each_device_holds_only_its_share():
    mesh = make_mesh(4)
    model = load_checkpoint(TINY / "llama31-v0", "float32", mesh=mesh, progress=False)
    head_shapes = {s.data.shape for s in model.params["head"].addressable_shards}
    assert head_shapes == {(64, 64)}
    assert {s.data.shape for s in model.params["layers"][0]["down"].addressable_shards} == {
        (64, 24)
    }
    whole = load_checkpoint(TINY / "llama31-v0", "float32", progress=False)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
