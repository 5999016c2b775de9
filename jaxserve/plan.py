"""What one step of the engine does, as pure descriptions: no jax, no policy.

The scheduler makes a `StepPlan`, `batch` packs it into arrays, `runner` executes it, and the
scheduler's `apply` takes the plan back together with the sampled tokens.

Row order of a step, and so token order (half-open ranges):

    rows    [0, num_decodes)                      one token each, taken from the slot's device state
            [num_decodes, num_decodes+len(prefills))   tokens given here, `end - start` each
    tokens  decode row i is token i; prefill tokens follow in row order, without gaps

A slot is a sequence's place in the device state (page table row, last token, token history).
It belongs to one sequence from its admission until it finishes or is preempted.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxserve.kv.transfer_plan import NO_TRANSFERS, TransferPlan
from jaxserve.types import SamplingParams


class Bucket(NamedTuple):
    """Static shape of a compiled step: at most this many tokens and rows.

    `is_decode` steps hold only decode rows, and then num_tokens == num_rows.
    """

    num_tokens: int
    num_rows: int
    is_decode: bool


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """Initialise a slot's device state before the step runs: an admitted or resumed sequence.

    Attributes:
        slot: the slot.
        page_rows: per KV group, the pages already held, from page index 0 (places that slid out of
            a window hold any valid page).
        token_ids: all known tokens, prompt and answer so far; penalties count them.
        num_prompt_tokens: how many of these are the prompt.
        sampling: the request's parameters, with `seed` set.
        stop_token_ids: ids that `min_tokens` holds back: end-of-sequence and stop ids.
    """

    slot: int
    page_rows: tuple[Int32[np.ndarray, " pages"], ...]
    token_ids: Int32[np.ndarray, " tokens"]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, end) of a slot from known tokens.

    `samples` is true for the chunk that reaches the last known token: it yields a new token.
    `targets`, when prompt logprobs are wanted, holds the token that follows each position (-1:
    none).
    """

    slot: int
    start: int
    end: int
    token_ids: Int32[np.ndarray, " tokens"]
    samples: bool
    targets: Int32[np.ndarray, " tokens"] | None = None


@dataclass(frozen=True, slots=True)
class PageUpdates:
    """New entries of one KV group's page table: table[slots[i], indices[i]] = pages[i]."""

    slots: Int32[np.ndarray, " updates"]
    indices: Int32[np.ndarray, " updates"]
    pages: Int32[np.ndarray, " updates"]


class StatesWanted(NamedTuple):
    """Which inner states of a step somebody wants: of the rows' last tokens, or of all tokens."""

    row_hidden: bool = False
    row_logits: bool = False
    token_hidden: bool = False
    token_logits: bool = False


NO_STATES = StatesWanted()


class ConstrainedRow(NamedTuple):
    """A row whose token is sampled after the step, from what its grammar allows by then.

    Attributes:
        row: its place in the step.
        slot: its sequence's place.
        length: known tokens when it is sampled; the new one goes to this position.
        constraint: the scheduler's; knows what may follow once the token before is known.
    """

    row: int
    slot: int
    length: int
    constraint: Any


NO_STEP = Bucket(0, 0, True)
"""The bucket of a plan that only moves blocks between tiers."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Updates per group are at most num_rows + num_tokens // page_size of the bucket.

    `transfers` come before it; with `NO_STEP` as bucket they are all. `row_seqs` are the
    scheduler's own sequences, row by row; nobody else looks inside. `constrained` rows get no token
    in the step itself: their logits are kept for the program that follows it.
    """

    step_id: int
    bucket: Bucket
    slot_loads: tuple[SlotLoad, ...]
    decode_slots: Int32[np.ndarray, " decodes"]
    decode_positions: Int32[np.ndarray, " decodes"]
    prefills: tuple[PrefillChunk, ...]
    page_updates: tuple[PageUpdates, ...]
    wants_logprobs: bool = False
    wants_prompt_logprobs: bool = False
    transfers: TransferPlan = NO_TRANSFERS
    states: StatesWanted = NO_STATES
    constrained: tuple[ConstrainedRow, ...] = ()
    row_seqs: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def num_decodes(self) -> int:
        return len(self.decode_slots)

    @property
    def num_rows(self) -> int:
        return len(self.decode_slots) + len(self.prefills)

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(c.end - c.start for c in self.prefills)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step, on the host.

    Attributes:
        token_ids: one per row; rows that do not sample hold anything.
        logprobs, top_ids, top_logprobs: of the sampled tokens; None unless the plan wants them.
        prompt_logprobs, prompt_top_ids, prompt_top_logprobs: per token of the step, for the
            prefill targets; None unless the plan wants them.
        hidden, logits: [rows, D] and [rows, V] float32, at the last token of each row.
        token_hidden, token_logits: the same per token of the step.
    """

    token_ids: Int32[np.ndarray, " rows"]
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None
    prompt_top_ids: np.ndarray | None = None
    prompt_top_logprobs: np.ndarray | None = None
    hidden: np.ndarray | None = None
    logits: np.ndarray | None = None
    token_hidden: np.ndarray | None = None
    token_logits: np.ndarray | None = None
