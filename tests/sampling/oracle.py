"""Sampling spelled out in float64 and plain Python, one row at a time, and rows to feed it with."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxserve.sampling import SamplingBatch

MAX_LEN = 1300  # more than two chunks of counted history
NUM_STOP = 16
NUM_BIAS = 8
NUM_BAD, BAD_TOKENS = 4, 5


@dataclass
class Row:
    """One row's parameters, with Python values."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    position: int = 0
    prompt: list[int] = field(default_factory=lambda: [0])
    answer: list[int] = field(default_factory=list)
    min_tokens: int = 0
    stop_ids: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: list[int] | None = None
    banned: list[int] = field(default_factory=list)
    bad: list[list[int]] = field(default_factory=list)
    active: bool = True


def make_batch(rows: list[Row], vocab_size: int, slots: list[int] | None = None) -> SamplingBatch:
    """The rows as device arrays. What lies beyond a row's history is noise."""
    slots = list(range(len(rows))) if slots is None else slots
    num_slots = max(slots) + 2
    rng = np.random.default_rng(99)
    token_ids = rng.integers(0, vocab_size, (num_slots, MAX_LEN)).astype(np.int32)
    stop_ids = np.full((num_slots, NUM_STOP), -1, np.int32)
    bias_ids = np.full((num_slots, NUM_BIAS), -1, np.int32)
    bias_values = np.zeros((num_slots, NUM_BIAS), np.float32)
    bad_ids = np.full((num_slots, NUM_BAD, BAD_TOKENS), -1, np.int32)
    allow_bits = np.full((num_slots, -(-vocab_size // 32)), -1, np.int32)
    for slot, row in zip(slots, rows, strict=True):
        history = row.prompt + row.answer
        token_ids[slot, : len(history)] = history
        stop_ids[slot, : len(row.stop_ids)] = row.stop_ids
        bias_ids[slot, : len(row.bias)] = list(row.bias)
        bias_values[slot, : len(row.bias)] = list(row.bias.values())
        for place, sequence in enumerate(row.bad):
            bad_ids[slot, place, BAD_TOKENS - len(sequence) :] = sequence
        if row.allowed is not None or row.banned:
            bits = np.zeros(allow_bits.shape[1] * 32, np.uint8)
            bits[_permitted(row, vocab_size)] = 1
            allow_bits[slot] = np.packbits(bits, bitorder="little").view(np.int32)

    def floats(name: str) -> jnp.ndarray:
        return jnp.asarray(np.array([getattr(row, name) for row in rows], np.float32))

    def ints(values: list[int]) -> jnp.ndarray:
        return jnp.asarray(np.array([v & 0xFFFFFFFF for v in values], np.uint32).view(np.int32))

    return SamplingBatch(
        slot=ints(slots),
        active=jnp.asarray(np.array([row.active for row in rows])),
        temperature=floats("temperature"),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        presence=floats("presence"),
        frequency=floats("frequency"),
        repetition=floats("repetition"),
        top_k=ints([row.top_k for row in rows]),
        seed_low=ints([row.seed for row in rows]),
        seed_high=ints([row.seed >> 32 for row in rows]),
        position=ints([row.position for row in rows]),
        num_prompt=ints([len(row.prompt) for row in rows]),
        length=ints([len(row.prompt) + len(row.answer) for row in rows]),
        min_length=ints([len(row.prompt) + row.min_tokens for row in rows]),
        token_ids=jnp.asarray(token_ids),
        stop_ids=jnp.asarray(stop_ids),
        bias_ids=jnp.asarray(bias_ids),
        bias_values=jnp.asarray(bias_values),
        bad_ids=jnp.asarray(bad_ids),
        allow_bits=jnp.asarray(allow_bits),
    )


def _permitted(row: Row, vocab_size: int) -> list[int]:
    allowed = range(vocab_size) if row.allowed is None else row.allowed
    return [token for token in allowed if token not in row.banned]


def edited_logits(logits_v: np.ndarray, row: Row) -> np.ndarray:
    """Mask, min_tokens, bias, then penalties token by token."""
    edited = np.full(len(logits_v), -np.inf)
    permitted = _permitted(row, len(logits_v))
    edited[permitted] = logits_v[permitted]
    if len(row.answer) < row.min_tokens:
        edited[row.stop_ids] = -np.inf
    for sequence in row.bad:
        begin = sequence[:-1]
        if not begin or row.answer[-len(begin) :] == begin:
            edited[sequence[-1]] = -np.inf
    for token, value in row.bias.items():
        edited[token] += value
    for token in set(row.prompt + row.answer):
        scale = 1 / row.repetition if edited[token] > 0 else row.repetition
        edited[token] *= scale
    for token in set(row.answer):
        edited[token] -= row.frequency * row.answer.count(token) + row.presence
    return edited


def kept_tokens(logits_v: np.ndarray, row: Row, top_p: float | None = None) -> np.ndarray:
    """Which tokens min-p, top-k and top-p keep, by sorting; equal logits share their fate."""
    top_p = row.top_p if top_p is None else top_p
    weights = _weights(logits_v, row)
    kept = (weights > 0) & (weights >= row.min_p)
    if row.top_k > 0:
        kept &= weights >= np.sort(weights)[::-1][min(row.top_k, len(weights)) - 1]
    if top_p < 1:
        goal = top_p * weights[kept].sum()
        for value in np.unique(weights[kept])[::-1]:
            if weights[kept & (weights >= value)].sum() >= goal:
                kept &= weights >= value
                break
    return kept


def probabilities(logits_v: np.ndarray, row: Row) -> np.ndarray:
    """The distribution a random row is drawn from."""
    edited = edited_logits(logits_v, row)
    weights = np.where(kept_tokens(edited, row), _weights(edited, row), 0.0)
    return weights / weights.sum()


def _weights(logits_v: np.ndarray, row: Row) -> np.ndarray:
    logits = np.asarray(logits_v, np.float64)
    return np.exp((logits - logits.max()) / np.float64(np.float32(row.temperature)))
