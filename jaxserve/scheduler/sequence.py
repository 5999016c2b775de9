"""A request on its way: its tokens, the pages it holds, and where it stands.

Mutable; owned by the scheduler. Where its next step begins is kept per slot, in `slots`, because
steady decoding must not touch one Python object per sequence.
"""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32

from jaxserve.kv.blocks import BlockHash, block_hashes
from jaxserve.kv.envelope import NO_TENANT
from jaxserve.kv.loads import LoadJob
from jaxserve.scheduler.states import StateCollector
from jaxserve.types import LoadDecision, Request, TokenLogprobs

NO_SLOT = -1
NEVER = 1 << 62


class ConstraintLike(Protocol):
    """Follows the tokens of one answer through its grammar."""

    @property
    def is_over(self) -> bool:
        """Nothing may follow but the end."""
        ...

    @property
    def has_failed(self) -> bool:
        """It cannot say any more what may follow."""
        ...

    def advance(self, token_id: int) -> None: ...


class Importance(NamedTuple):
    """Orders sequences: the smallest is the most important one."""

    priority: int
    arrival_s: float
    order: int


@dataclass(frozen=True, slots=True)
class Parked:
    """The blocks that a preempted sequence left behind.

    Attributes:
        num_tokens: tokens whose keys and values were computed.
        names: of the blocks that hold them; the last one may be partial.
        private: those of the names that are no hashes: nobody else may use these blocks.
    """

    num_tokens: int
    names: tuple[BlockHash, ...]
    private: tuple[BlockHash, ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one live request.

    Attributes:
        request: what was asked.
        importance: who goes first.
        root: parent of the first block's hash.
        num_groups: KV groups of the model.
        max_total: at most this many tokens, prompt and answer.
        stop_ids: tokens that end the answer.
        tokens: prompt and answer as far as the host knows it.
        slot: place in the device state while running.
        pages: per KV group, the page of each page index; before `held_from` they are not held.
        held_from: per KV group, the first page index that is still held.
        hashes: names of the full blocks of `tokens`, as far as they were needed.
        num_published: blocks that the index has been told about.
        publish_at: number of known tokens at which the next block can be published.
        pending: sampled tokens that had not come back when the sequence was preempted.
        tenant: names the owner of its blocks in stores.
        num_cached: prompt tokens that were not computed, as far as is known; -1: not admitted yet.
        cached: these by where they were found: "device", "host", or a store's name.
        decision: what the load planner said at the first admission, if there was a question.
        parked: what it left behind when it was preempted, until that is back or given up.
        job: what is on its way to its pages.
        loads_nothing: a load failed; do not wait for another one.
        look_up: ticket of what the stores were asked, until `look_up_until_s`.
        queued_s: from its arrival to its first slot; negative before.
        high_water: positions that had been computed when it was last preempted.
        accounted: positions that had been computed, or counted as cached, at the last preemption.
        prompt_logprobs: collected so far; None if not asked for, or delivered.
        states: collects hidden states and logits; None if nobody asked for any.
        constraint: says what may follow; None: anything.
        finished: no event may follow.
    """

    request: Request
    importance: Importance
    root: BlockHash
    num_groups: int
    max_total: int
    stop_ids: frozenset[int]
    tokens: array
    slot: int = NO_SLOT
    pages: list[list[int]] = field(default_factory=list)
    held_from: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_published: int = 0
    publish_at: int = NEVER
    pending: int = 0
    tenant: bytes = NO_TENANT
    num_cached: int = -1
    cached: dict[str, int] = field(default_factory=dict)
    decision: LoadDecision | None = None
    parked: Parked | None = None
    job: LoadJob | None = None
    loads_nothing: bool = False
    look_up: int | None = None
    look_up_until_s: float = 0.0
    queued_s: float = -1.0
    high_water: int = 0
    accounted: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    states: StateCollector | None = None
    constraint: ConstraintLike | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        self.forget_pages()

    def note_cached(self, source: str, start: int, end: int) -> int:
        """The positions [start, end) need not be computed; returns how many prompt tokens that
        spares that were neither computed nor counted before a preemption."""
        num_tokens = max(0, min(end, self.num_prompt) - max(start, self.accounted))
        if num_tokens or not start:
            self.cached[source] = self.cached.get(source, 0) + num_tokens
        self.num_cached += num_tokens
        return num_tokens

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_page_entries(self) -> int:
        """Page indices that exist in each group's table row."""
        return len(self.pages[0])

    @property
    def needs_whole_prompt(self) -> bool:
        """Every position of the prompt has to be computed: nothing may come from the cache."""
        if self.prompt_logprobs is not None:
            return True
        return self.states is not None and self.states.collects_prompt

    def forget_pages(self) -> None:
        """Empty the page table; the references must have been given back."""
        self.pages = [[] for _ in range(self.num_groups)]
        self.held_from = [0] * self.num_groups
        self.num_published = 0
        self.publish_at = NEVER

    def hash_blocks(self, num_tokens: int, page_size: int) -> int:
        """Make sure that `hashes` has the full blocks of the first `num_tokens` tokens.

        Returns:
            How many these are; `hashes` may have more. Each is computed once.
        """
        done, wanted = len(self.hashes), num_tokens // page_size
        if wanted > done:
            new_tokens = self.tokens[done * page_size : wanted * page_size]
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes += block_hashes(new_tokens, page_size, parent)
        return wanted

    def page_rows(self) -> tuple[Int32[np.ndarray, " pages"], ...]:
        """The page tables, as arrays; entries before `held_from` are any pages."""
        return tuple(np.array(pages, dtype=np.int32) for pages in self.pages)

    def token_ids(self, start: int, end: int) -> Int32[np.ndarray, " tokens"]:
        """A copy of the tokens [start, end)."""
        return np.array(self.tokens[start:end], dtype=np.int32)
