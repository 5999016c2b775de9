"""Trains the embedded model from nothing: text, tokenizer, weights, checkpoint, by one command.

    python -m jaxserve.embedded.train [--output FOLDER] [--work FOLDER]

The model that is trained is the project's own decoder, with a dense causal `attend`. An interrupted
training goes on from the last state in the work folder, with the same batches. Knows nothing of
serving. The shipped checkpoint took 7.1 M tokens: 26 minutes of processor time on two cores.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxserve.embedded import export, retrieval
from jaxserve.embedded.corpus import Encoder, Phase, TokenBatch, phase_of
from jaxserve.embedded.initial import initial_params
from jaxserve.embedded.tokenizer_training import train_tokenizer
from jaxserve.models import decoder
from jaxserve.models.config import DecoderConfig
from jaxserve.models.spec import Params

VOCAB_SIZE = 1280  # at most: the tokenizer's trainer stops earlier when no pair is left
QUERY_CHUNK = 256  # keys after a chunk of queries are not computed at all
MATRIX_LR, OTHER_LR = 0.02, 4e-3
NUM_BATCHES_AHEAD = 8
WARMUP_STEPS = 50

COPYING = (0.5, 1.0, 1.0, 12.0, 0.1, 0.0)
EVERYTHING = (2.0, 8.0, 3.0, 5.0, 0.5, 0.0)
POLISH = (5.0, 2.0, 3.0, 4.0, 1.5, 6.0)
PHASES = (
    Phase(200, 32, 96, 0.9, COPYING, 4, 4, 0.05, 0.9),
    Phase(250, 16, 160, 0.3, COPYING, 5, 5, 0.02, 0.9),
    Phase(200, 16, 256, 0.4, EVERYTHING, 8, 8, 0.02, 0.8),
    Phase(150, 8, 512, 0.6, EVERYTHING, 14, 14, 0.02, 0.6),
    Phase(400, 4, 1056, 0.7, EVERYTHING, 20, 16, 0.02, 0.5),
    Phase(650, 4, 1056, 0.85, POLISH, 20, 16, 0.02, 0.5),
)
DECAYS = ((700, 1200, 1.0), (1200, 1850, 0.4))  # first step, end, rate at the first as a share


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    params: Params
    optimizer: Any
    step: jax.Array


def attend_densely(
    cache: None,
    layer: int,
    q: Array,
    k: Array,
    v: Array | None,
    *,
    config: DecoderConfig,
    rows: int,
) -> tuple[Array, None]:
    """Causal attention within each of `rows` rows of equal length that lie on the token axis."""
    assert v is not None, "latent attention is not trained here"
    spec = config.layers[layer]
    num_kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    q = (q * spec.scale).reshape(rows, -1, num_kv_heads, spec.num_heads // num_kv_heads, head_dim)
    k, v = (x.reshape(rows, -1, num_kv_heads, head_dim) for x in (k, v))
    length = q.shape[1]
    chunks = []
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:end], k[:, :end])
        seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        scores = jnp.where(seen[None, None, None], scores, -1e30)
        shares = jax.nn.softmax(scores, axis=-1)
        chunks.append(jnp.einsum("bkgts,bskh->btkgh", shares, v[:, :end]))
    return jnp.concatenate(chunks, axis=1).reshape(-1, spec.num_heads, head_dim), None


def predict(params: Params, config: DecoderConfig, tokens_bt: Array) -> Array:
    """Logits [B*T, V] for rows of tokens."""
    rows, length = tokens_bt.shape
    hidden, _ = decoder.forward(
        params,
        config,
        tokens_bt.reshape(-1),
        jnp.tile(jnp.arange(length), rows),
        partial(attend_densely, config=config, rows=rows),
        None,
    )
    return decoder.compute_logits(params, config, hidden)


def loss_of(
    params: Params, config: DecoderConfig, tokens: Array, weights: Array
) -> tuple[Array, Array]:
    """Weighted mean of the loss, and the share of right tokens in short replies."""
    logits = predict(params, config, tokens[:, :-1])
    targets, weights = tokens[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    in_answer = weights == 1.0
    right = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * in_answer) / jnp.sum(in_answer)
    return jnp.sum(losses * weights) / jnp.sum(weights), right


def learning_rate(peak: float) -> optax.Schedule:
    """A rise, a plateau, and falls as 1 - sqrt: one for retrieval, one for the short tasks."""

    def rate(step: Any) -> Any:
        share = jnp.minimum(step / WARMUP_STEPS, 1.0)
        for first_step, end_step, highest in DECAYS:
            done = jnp.maximum(step - first_step, 0.0) / (end_step - first_step)
            falling = highest * (1.02 - jnp.sqrt(done))
            share = jnp.where(step < first_step, share, jnp.minimum(falling, 1.0))
        return peak * share

    return rate


def make_optimizer(params: Params) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for the rest."""
    labels = jax.tree.map(lambda _: "other", params)
    labels["layers"] = jax.tree.map(lambda _: "matrix", params["layers"])
    return optax.partition(
        {
            "matrix": optax.contrib.muon(learning_rate(MATRIX_LR)),
            "other": optax.adam(learning_rate(OTHER_LR), b1=0.9, b2=0.98),
        },
        labels,
    )


def batches(encoder: Encoder, seed: int, first_step: int, num_steps: int) -> Iterator[TokenBatch]:
    """The batches of the steps, made by another thread a few steps ahead."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[Future[TokenBatch]] = deque()
        for step in range(first_step, num_steps):
            ahead.append(pool.submit(encoder.batch, seed, step, phase_of(PHASES, step)))
            if len(ahead) > NUM_BATCHES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class HeldoutCheck:
    """Measures teacher-forced exact answers on a small held-out set of several lengths."""

    LENGTHS = ((128, 256), (384, 512), (896, 1024))

    def __init__(self, encoder: Encoder, config: DecoderConfig, num_prompts: int = 32) -> None:
        self._config = config
        self._sets = []
        for shortest, longest in self.LENGTHS:
            prompts = retrieval.heldout_prompts(
                encoder.count_tokens, num_prompts, shortest, longest, seed=1
            )
            rows = [
                encoder.chat([*p.messages, {"role": "assistant", "content": p.reply}])
                for p in prompts
            ]
            width = longest + 24
            tokens = np.zeros((num_prompts, width), np.int32)
            is_answer = np.zeros((num_prompts, width), bool)
            for i, (ids, weights) in enumerate(rows):
                tokens[i, : len(ids)] = ids
                is_answer[i, : len(ids)] = np.array(weights) == 1.0
            self._sets.append((tokens, is_answer))

    def __call__(self, params: Params) -> dict[str, float]:
        """The share of answers whose every token is the most likely one, by longest length."""
        return {
            str(longest): float(
                np.mean(
                    np.concatenate(
                        [
                            answers_right(
                                params, self._config, tokens[i : i + 8], answer[i : i + 8]
                            )
                            for i in range(0, len(tokens), 8)
                        ]
                    )
                )
            )
            for (_, longest), (tokens, answer) in zip(self.LENGTHS, self._sets, strict=True)
        }


@partial(jax.jit, static_argnames="config")
def answers_right(params: Params, config: DecoderConfig, tokens: Array, is_answer: Array) -> Array:
    """For each row whether the most likely token is right wherever `is_answer` says so."""
    best = jnp.argmax(predict(params, config, tokens[:, :-1]), axis=-1)
    right = best.reshape(tokens.shape[0], -1) == tokens[:, 1:]
    return jnp.all(right | ~is_answer[:, 1:], axis=1)


def save_state(path: Path, state: TrainState) -> None:
    """Write the state so that a reader sees the old one or the new one, never a part."""
    leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    fresh = path.with_suffix(".new.npz")
    np.savez(fresh, **leaves)  # pyright: ignore[reportArgumentType]
    fresh.replace(path)


def load_state(path: Path, like: TrainState) -> TrainState:
    """The state that `save_state` wrote, in the shape of `like`."""
    with np.load(path, allow_pickle=False) as saved:
        leaves = [jnp.asarray(saved[name]) for name in sorted(saved.files)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def train(output: Path, work: Path, seed: int, num_steps: int) -> None:
    """Train for `num_steps` steps in all and write the checkpoint into `output`."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(VOCAB_SIZE, seed=seed)
    encoder = Encoder(tokenizer)
    config = export.decoder_config(tokenizer)
    params = initial_params(config, seed)
    optimizer = make_optimizer(params)
    state = TrainState(params, optimizer.init(params), jnp.int32(0))
    if (work / "state.npz").exists():
        state = load_state(work / "state.npz", state)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, tokens: Array, weights: Array):
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, config, tokens, weights
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, state.step + 1), loss, right

    check = HeldoutCheck(encoder, config)
    first_step = int(state.step)
    num_tokens = sum(phase_of(PHASES, i).num_tokens for i in range(first_step))
    begun_cpu_s, begun_s, sums = time.process_time(), time.monotonic(), []
    with (work / "log.jsonl").open("a", encoding="utf-8") as log:
        for step, batch in enumerate(batches(encoder, seed, first_step, num_steps), first_step + 1):
            state, loss, right = update(state, batch.tokens, batch.weights)
            num_tokens += phase_of(PHASES, step - 1).num_tokens
            sums.append(jnp.stack([loss, right]))
            if step % 25 and step != num_steps:
                continue
            mean = np.mean(np.asarray(sums), axis=0)
            record: dict[str, Any] = {
                "step": step,
                "loss": round(float(mean[0]), 4),
                "answer_tokens_right": round(float(mean[1]), 4),
                "tokens": num_tokens,
                "wall_s": round(time.monotonic() - begun_s),
                "cpu_s": round(time.process_time() - begun_cpu_s),
            }
            sums = []
            if step % 200 == 0 or step == num_steps:
                record["heldout"] = check(state.params)
                save_state(work / "state.npz", state)
                export.write_checkpoint(work / "checkpoint", state.params, tokenizer)
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)
    export.write_checkpoint(output, state.params, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model from nothing.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=sum(phase.num_steps for phase in PHASES))
    args = parser.parse_args()
    train(args.output, args.work, args.seed, args.steps)


if __name__ == "__main__":
    main()
