"""The decoder by itself, over whole sequences, against outputs of the transformers library."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import decoder
from jaxserve.models.spec import abstract_params, init_params
from jaxserve.weights import load_checkpoint
from tests.models.dense_attention import dense_attend

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
FOLDERS = sorted(TINY.iterdir())

TOLERANCE = {"float32": 1e-4, "bfloat16": 1.0, "float16": 0.2}
"""Largest difference of a logit; logits spread over about +-10."""


def full_logits(model, token_ids):
    def run(params, tokens_t):
        positions_t = jnp.arange(tokens_t.shape[0], dtype=jnp.int32)
        attend = dense_attend(model.config)
        hidden_td, _ = decoder.forward(params, model.config, tokens_t, positions_t, attend, None)
        return decoder.compute_logits(params, model.config, hidden_td)

    return np.asarray(jax.jit(run)(model.params, jnp.asarray(token_ids, jnp.int32)))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_logits_equal_those_of_transformers(folder):
    model = load_checkpoint(folder, "float32", progress=False)
    expected = np.load(folder / "expected.npz")
    prompt, greedy = expected["input_ids"], expected["greedy"]
    logits_tv = full_logits(model, np.concatenate([prompt, greedy]))
    wanted_tv = np.concatenate([expected["logits"], expected["greedy_logits"][1:]])
    assert np.abs(logits_tv[: len(wanted_tv)] - wanted_tv).max() <= TOLERANCE["float32"]
    assert (logits_tv[len(prompt) - 1 : -1].argmax(-1) == greedy).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama31-v0", "gemma3-v3", "deepseek_v3-v0"])
def test_half_precision_stays_close(name, dtype):
    model = load_checkpoint(TINY / name, dtype, progress=False)
    expected = np.load(TINY / name / "expected.npz")
    logits_tv = full_logits(model, expected["input_ids"])
    assert logits_tv.dtype == np.float32
    assert np.abs(logits_tv - expected["logits"]).max() <= TOLERANCE[dtype]
    dtypes = {x.dtype.name for x in jax.tree.leaves(model.params)}
    assert dtypes - {"float32"} == {dtype}  # the bias on the choice of experts keeps its own


def test_layers_of_equal_spec_are_traced_once(monkeypatch):
    traced = []
    original = decoder.nn.linears
    monkeypatch.setattr(
        decoder.nn, "linears", lambda *args, **kw: (traced.append(None), original(*args, **kw))[1]
    )
    model = load_checkpoint(TINY / "ministral-v1", "float32", progress=False)
    assert len({(x.rope, x.window) for x in model.config.layers}) == 2  # full and sliding
    full_logits(model, np.arange(3, 20))
    # q, k, v for each of the two kinds of layer; o; gate and up; down, once for all.
    assert 1 <= len(traced) <= 2 + 3


def test_declared_shapes_are_those_of_random_weights():
    model = load_checkpoint(TINY / "qwen3-v2", "float32", progress=False)
    specs = decoder.param_specs(model.config)
    random = init_params(specs, jax.random.key(0))
    abstract = abstract_params(specs, jnp.float32)

    def shapes(tree):
        return jax.tree.map(lambda x: x.shape, tree)

    assert shapes(random) == shapes(abstract) == shapes(model.params)


def test_random_weights_give_finite_logits_of_moderate_size():
    config = load_checkpoint(TINY / "gemma2-v1", "float32", progress=False).config

    params = init_params(decoder.param_specs(config), jax.random.key(1))
    logits_tv = full_logits(SimpleNamespace(config=config, params=params), np.arange(3, 40))
    assert np.isfinite(logits_tv).all() and 0.01 < logits_tv.std() < 20


def test_every_fixture_has_few_parameter_leaves():
    for folder in FOLDERS:
        model = load_checkpoint(folder, "float32", progress=False)
        in_layers = [len(layer) for layer in model.params["layers"]]
        assert len(jax.tree.leaves(model.params)) - sum(in_layers) <= 20, folder.name
        is_plain = all(x.latent is None and x.experts is None for x in model.config.layers)
        assert max(in_layers) <= (7 if is_plain else 14), folder.name
