"""The weights that training starts from: random, but with heads for copying laid out.

A small transformer finds out how to copy only after a long plateau, because two layers must change
together. Put in place here are heads of the first layer that look one, two, three and four tokens
back, and heads of the second that look for places where the tokens before are those before here,
the present one included. Everything else, and what becomes of them, is learned. Knows nothing of
text or optimisers.
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
BACK_GAINS = (1.0, 0.8, 0.6, 0.4)  # how loud the tokens 1, 2, 3, 4 back are
NUM_CONTENT_PAIRS = 18  # the slowest rotary pairs hardly turn: they compare contents
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
    head_dim = config.layers[0].head_dim
    read_hd = _orthogonal_rows(rng, head_dim, config.hidden_size)
    read_hd[:, :NUM_CONSTANT] = 0.0
    near = _orthogonal_rows(rng, 2 * head_dim, config.hidden_size)
    far = _orthogonal_rows(rng, 2 * head_dim, config.hidden_size)
    back_hd = [*np.split(near, 2), *np.split(far, 2)]
    first, second = params["layers"][:2]
    _look_back(first, config, read_hd, back_hd)
    seen = [read_hd, *back_hd]
    _look_for_same(second, config, 0, seen[:4])
    _look_for_same(second, config, 1, seen[:3])
    return params


def _look_back(layer: dict[str, jax.Array], config: DecoderConfig, read_hd, back_hd) -> None:
    """Let query head i look i + 1 tokens back, whatever is there, and write it to `back_hd[i]`."""
    spec = config.layers[0]
    assert spec.rope is not None
    head_dim, half = spec.head_dim, spec.head_dim // 2
    squares = NUM_CONSTANT * CONSTANT**2
    squares += (config.hidden_size - NUM_CONSTANT) * EMBEDDING_SCALE**2
    rms = np.sqrt(squares / config.hidden_size)
    weight = POSITION_STRENGTH * rms / (NUM_CONSTANT * CONSTANT)
    turns = np.array(spec.rope.frequencies[:NUM_POSITION_PAIRS])
    key = np.zeros((head_dim, config.hidden_size), np.float32)
    key[:NUM_POSITION_PAIRS, :NUM_CONSTANT] = weight
    for head in range(spec.num_kv_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        layer["k"] = layer["k"].at[rows].set(key)
        layer["v"] = layer["v"].at[rows].set(read_hd)
    for head, (gain, write_hd) in enumerate(zip(BACK_GAINS, back_hd, strict=True)):
        angles = (head + 1) * turns[:, None]
        query = np.zeros_like(key)
        query[:NUM_POSITION_PAIRS, :NUM_CONSTANT] = weight * np.cos(angles)
        query[half : half + NUM_POSITION_PAIRS, :NUM_CONSTANT] = -weight * np.sin(angles)
        rows = slice(head * head_dim, (head + 1) * head_dim)
        layer["q"] = layer["q"].at[rows].set(query)
        layer["o"] = layer["o"].at[:, rows].set(gain * write_hd.T)


def _look_for_same(
    layer: dict[str, jax.Array], config: DecoderConfig, kv_head: int, seen: list[np.ndarray]
) -> None:
    """Let the first query head of a KV head compare what is `seen` here with that one step later.

    Args:
        seen: where the present token, the one before, ... stand in the residual stream.
    """
    spec = config.layers[1]
    head_dim, half, group = spec.head_dim, spec.head_dim // 2, spec.num_heads // spec.num_kv_heads
    slow = np.arange(half - NUM_CONTENT_PAIRS, half)
    parts = np.array_split(np.stack([slow, slow + half], axis=1).reshape(-1), len(seen) - 1)
    query = np.zeros((head_dim, config.hidden_size), np.float32)
    key = np.zeros_like(query)
    for entries, here, later in zip(parts, seen[:-1], seen[1:], strict=True):
        query[entries] = CONTENT_STRENGTH * here[: len(entries)]
        key[entries] = CONTENT_STRENGTH * later[: len(entries)]
    query[:, :NUM_CONSTANT] = 0.0
    key[:, :NUM_CONSTANT] = 0.0
    kv_rows = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
    rows = slice(kv_head * group * head_dim, (kv_head * group + 1) * head_dim)
    layer["k"] = layer["k"].at[kv_rows].set(key)
    layer["q"] = layer["q"].at[rows].set(query)
    layer["o"] = layer["o"].at[:, rows].set(0.5 * jnp.asarray(layer["v"][kv_rows].T))


def _orthogonal_rows(rng: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    square, _ = np.linalg.qr(rng.standard_normal((width, width)))
    return square[:num_rows].astype(np.float32)
