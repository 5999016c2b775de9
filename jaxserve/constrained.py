"""Samples the rows of a step whose tokens must obey a grammar: a small program of its own.

What a grammar allows at t + 1 depends on the token of t, which the host does not know when it
dispatches step t + 1. So the step computes these rows' logits and keeps them in the slot state; the
host reads the tokens of t while the device works on t + 1, computes the masks, and enqueues this
program behind the step. The device goes on without a pause, and step t + 2 finds the tokens in the
state like all others.

    step t+1 | sample constrained t+1 | step t+2 | ...          on the device
           read t, masks t+1, plan t+2                          on the host

Always CONSTRAINED_ROWS rows, and called as often as it takes: one shape, one graph. Knows nothing
of grammars.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32

from jaxserve.batch import FLOAT_PARAMS, INT_PARAMS, SlotState, StateShape
from jaxserve.plan import ConstrainedRow
from jaxserve.sampling import Logprobs, SamplingBatch, sample, token_logprobs
from jaxserve.types import MAX_LOGPROBS

CONSTRAINED_ROWS = 16
"""Rows of one call."""


def constrained_size(shape: StateShape) -> int:
    """Length of the packed array: wants_logprobs | row | slot | length | masks."""
    return 1 + CONSTRAINED_ROWS * (3 + shape.mask_words)


def pack_constrained(
    rows: Sequence[ConstrainedRow],
    masks_rw: Int32[np.ndarray, "rows W"],
    wants_logprobs: bool,
    shape: StateShape,
) -> Int32[np.ndarray, " packed"]:
    """Up to CONSTRAINED_ROWS rows and their masks as one array; the rest points at no row."""
    packed = np.zeros(constrained_size(shape), np.int32)
    packed[0] = wants_logprobs
    columns = packed[1 : 1 + 3 * CONSTRAINED_ROWS].reshape(3, CONSTRAINED_ROWS)
    columns[1] = shape.num_slots
    columns[:, : len(rows)] = np.array([row[:3] for row in rows], np.int32).T
    masks = packed[1 + 3 * CONSTRAINED_ROWS :].reshape(CONSTRAINED_ROWS, shape.mask_words)
    masks[: len(rows)] = masks_rw
    return packed


def sample_constrained(
    state: SlotState, packed: Int[Array, " packed"], shape: StateShape
) -> "tuple[SlotState, dict[str, jax.Array]]":
    """Tokens of constrained rows, written into the (donated) state."""
    row_r, slot_r, length_r = packed[1 : 1 + 3 * CONSTRAINED_ROWS].reshape(3, CONSTRAINED_ROWS)
    words_rw = packed[1 + 3 * CONSTRAINED_ROWS :].reshape(CONSTRAINED_ROWS, shape.mask_words)
    active_r = slot_r < shape.num_slots
    logits_rv = state.kept_logits[row_r]
    bits_rwb = (words_rw[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1
    allowed_rv = bits_rwb.reshape(CONSTRAINED_ROWS, -1)[:, : shape.vocab_size] != 0
    # Masked first: where other options leave nothing, sampling falls back to this, not to anything.
    allowed_logits_rv = jnp.where(allowed_rv, logits_rv, -jnp.inf)
    token_r = sample(allowed_logits_rv, sampling_batch(state, slot_r, active_r, length_r))
    outputs = {"token_ids": token_r, **logprobs_if(packed[0], logits_rv, token_r)}
    token_ids = state.token_ids.at[slot_r, length_r].set(token_r)
    return replace(state, token_ids=token_ids), outputs


def sampling_batch(
    state: SlotState,
    slot_r: Int[Array, " R"],
    active_r: Bool[Array, " R"],
    length_r: Int[Array, " R"],
) -> SamplingBatch:
    """How to sample rows of these slots that have so many known tokens."""
    floats, ints = state.float_params[slot_r], state.int_params[slot_r]
    params: dict[str, Any] = {name: floats[:, i] for i, name in enumerate(FLOAT_PARAMS)}
    params |= {name: ints[:, i] for i, name in enumerate(INT_PARAMS)}
    return SamplingBatch(
        slot=slot_r,
        active=active_r,
        position=length_r,
        length=length_r,
        token_ids=state.token_ids,
        stop_ids=state.stop_ids,
        bias_ids=state.bias_ids,
        bias_values=state.bias_values,
        bad_ids=state.bad_ids,
        allow_bits=state.allow_bits,
        **params,
    )


def logprobs_if(
    wanted: jax.Array, logits_rv: jax.Array, token_r: jax.Array
) -> "dict[str, jax.Array]":
    """Log-probabilities of the sampled tokens, computed only if they are wanted."""
    found = lax.cond(
        wanted > 0,
        lambda: token_logprobs(logits_rv, token_r, MAX_LOGPROBS),
        lambda: no_logprobs(*logits_rv.shape),
    )
    return {
        "logprobs": found.logprob_r,
        "top_ids": found.top_ids_rn,
        "top_logprobs": found.top_logprobs_rn,
    }


def no_logprobs(rows: int, vocab_size: int) -> Logprobs:
    """In their place where nobody wants any."""
    num_top = min(MAX_LOGPROBS, vocab_size)
    return Logprobs(
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, num_top), jnp.int32),
        jnp.zeros((rows, num_top), jnp.float32),
    )
