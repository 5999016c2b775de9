"""The weights that training starts from: random, but with the two heads of copying laid out.

A small transformer finds out how to copy only after a long plateau, because two layers must
change together: one that looks at the token before, one that looks for places whose token before
equals the present one. Both are put in place here (first KV head of the first and the second
layer); everything else, and what becomes of them, is learned. Knows nothing of text or optimisers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models import decoder
from jaxserve.models.config import DecoderConfig
from jaxserve.models.spec import Params, init_params

EMBEDDING_SCALE = 0.7
NUM_CONSTANT = 4  # entries of the embedding that are the same for every token at first
CONSTANT = 2.0
NUM_POSITION_PAIRS = 4  # the fastest rotary pairs tell positions apart
POSITION_STRENGTH = 7.0
NUM_CONTENT_PAIRS = 13  # the slowest ones hardly turn within a prompt: they compare contents
CONTENT_STRENGTH = 2.4


def initial_params(config: DecoderConfig, seed: int) -> Params:
    """Weights of a model whose head is silent and whose blocks add little but the tokens before."""
    params = init_params(decoder.param_specs(config), jax.random.key(seed))
    embed = params["embed"] * (EMBEDDING_SCALE * config.hidden_size**0.5)
    params["embed"] = embed.at[:, :NUM_CONSTANT].set(CONSTANT)
    params["head"] *= 0.0
    for layer in params["layers"]:
        layer["down"] *= 0.0
        layer["o"] *= 0.1
        layer["q"] *= 0.7
        layer["k"] *= 0.7
    rng = np.random.default_rng(seed)
    spec = config.layers[0]
    read_hd = _orthogonal_rows(rng, spec.head_dim, config.hidden_size)
    write_hd = _orthogonal_rows(rng, spec.head_dim, config.hidden_size)
    _look_back(params["layers"][0], config, read_hd, write_hd)
    _look_for_same(params["layers"][1], config, read_hd, write_hd)
    return params


def _look_back(layer: dict[str, jax.Array], config: DecoderConfig, read_hd, write_hd) -> None:
    """Let the query heads of the first KV head look 1, 2, ... tokens back, whatever is there."""
    spec = config.layers[0]
    assert spec.rope is not None
    head_dim, half = spec.head_dim, spec.head_dim // 2
    rms = np.sqrt(
        (NUM_CONSTANT * CONSTANT**2 + (config.hidden_size - NUM_CONSTANT) * EMBEDDING_SCALE**2)
        / config.hidden_size
    )
    weight = POSITION_STRENGTH / (NUM_CONSTANT * CONSTANT / rms)
    turns = np.array(spec.rope.frequencies[:NUM_POSITION_PAIRS])
    key = np.zeros((head_dim, config.hidden_size), np.float32)
    key[:NUM_POSITION_PAIRS, :NUM_CONSTANT] = weight
    layer["k"] = layer["k"].at[:head_dim].set(key)
    layer["v"] = layer["v"].at[:head_dim].set(read_hd)
    for head in range(spec.num_heads // spec.num_kv_heads):
        query = np.zeros_like(key)
        back = head + 1
        query[:NUM_POSITION_PAIRS, :NUM_CONSTANT] = weight * np.cos(back * turns)[:, None]
        query[half : half + NUM_POSITION_PAIRS, :NUM_CONSTANT] = (
            -weight * np.sin(back * turns)[:, None]
        )
        rows = slice(head * head_dim, (head + 1) * head_dim)
        layer["q"] = layer["q"].at[rows].set(query)
        target = write_hd if head == 0 else 0.5 * write_hd[::-1]
        layer["o"] = layer["o"].at[:, rows].set(target.T)


def _look_for_same(layer: dict[str, jax.Array], config: DecoderConfig, read_hd, write_hd) -> None:
    """Let the first query head look for places whose token before equals the present token."""
    spec = config.layers[1]
    head_dim, half = spec.head_dim, spec.head_dim // 2
    slow = np.arange(half - NUM_CONTENT_PAIRS, half)
    slow = np.concatenate([slow, slow + half])
    query = np.zeros((head_dim, config.hidden_size), np.float32)
    key = np.zeros_like(query)
    query[slow] = CONTENT_STRENGTH * read_hd[: len(slow)]
    key[slow] = CONTENT_STRENGTH * write_hd[: len(slow)]
    query[:, :NUM_CONSTANT] = 0.0
    key[:, :NUM_CONSTANT] = 0.0
    layer["q"] = layer["q"].at[:head_dim].set(query)
    layer["k"] = layer["k"].at[:head_dim].set(key)
    layer["o"] = layer["o"].at[:, :head_dim].set(0.5 * jnp.asarray(layer["v"][:head_dim].T))


def _orthogonal_rows(rng: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    square, _ = np.linalg.qr(rng.standard_normal((width, width)))
    return square[:num_rows].astype(np.float32)
