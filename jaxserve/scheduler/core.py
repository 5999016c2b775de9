"""The scheduler: continuous batching, one step ahead of the tokens.

`schedule` may be called for step t+1 while the tokens of step t are unknown. A decode row needs
only its position; the device feeds it the token of the step before. What ends by length is known
in advance; a sequence that turns out to have stopped wastes its row in the one step that was
already planned.

Invariants:
- The device runs steps in the order of their plans. So a page that is given back is reused by a
  later step at the earliest, or by rows of the same step that its last holder does not read, and
  a block can be found by later steps as soon as the step that writes it is planned.
- The most important running sequence gets a page whenever it needs one; a less important one is
  preempted for it. So it makes progress in every step, and everybody finishes.
- No step costs more because more sequences wait, beyond the heap's O(log n).
"""

import time
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count

from jaxserve.config import SchedulerConfig
from jaxserve.errors import RequestError
from jaxserve.kv.blocks import BlockHash, block_hashes, salted_root
from jaxserve.kv.envelope import tenant_digest
from jaxserve.kv.index import KVIndex
from jaxserve.kv.planner import LoadPlanner
from jaxserve.kv.tiers import Tiers
from jaxserve.plan import Bucket, StepPlan, StepResult
from jaxserve.scheduler.buckets import BucketChooser
from jaxserve.scheduler.outcome import collect_prompt_logprobs, sampled_logprobs
from jaxserve.scheduler.planner import Planner
from jaxserve.scheduler.prefix import PrefixFinder
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequence import NO_SLOT, ConstraintLike, Importance, Sequence
from jaxserve.scheduler.states import collector_for
from jaxserve.scheduler.stats import GroupPages, SchedulerStats
from jaxserve.types import FinishReason, KVGroup, PromptReuse, Request, TokenEvent


class Scheduler:
    """Owns every sequence from `add` to its last event.

    Args:
        scheduler_config: limits and policy.
        kv_groups: the model's groups.
        num_pages: pages per group.
        page_size: tokens per page.
        max_model_len: most tokens of a sequence, prompt and answer.
        namespace_root: `Namespace.root()` of what the engine runs.
        enable_prefix_caching: reuse the KV of equal prefixes.
        buckets: the compiled shapes.
        tiers: what is below the device; None: nothing.
        load_planner: decides whether to load or to recompute.
        clock: seconds, never going back.
        tenant_secret: keys the digests by which tenants are named outside of the process.

    Raises:
        ConfigError: the buckets do not cover the limits.
    """

    def __init__(
        self,
        *,
        scheduler_config: SchedulerConfig,
        kv_groups: Seq[KVGroup],
        num_pages: Seq[int],
        page_size: int,
        max_model_len: int,
        namespace_root: BlockHash,
        enable_prefix_caching: bool,
        buckets: Seq[Bucket],
        tiers: Tiers | None = None,
        load_planner: LoadPlanner | None = None,
        clock: Callable[[], float] = time.monotonic,
        tenant_secret: bytes = b"",
    ):
        max_num_seqs = scheduler_config.max_num_seqs
        self._chooser = BucketChooser(
            buckets, max_num_seqs, scheduler_config.max_num_batched_tokens
        )
        self._is_by_priority = scheduler_config.policy == "priority"
        self._max_model_len = max_model_len
        self._root = namespace_root
        self._index = KVIndex(kv_groups, num_pages, page_size)
        self._roster = Roster(max_num_seqs, self._index, enable_prefix_caching, tiers, clock)
        if tiers is not None:
            self._index.listen(tiers)
        self._load_planner = load_planner or LoadPlanner(page_size)
        self._tenant_secret = tenant_secret
        self._finder = finder = PrefixFinder(self._roster.pager, tiers, self._load_planner, clock)
        self._planner = Planner(self._roster, self._chooser, finder, self._is_by_priority, clock)
        self._order = count()
        self._unapplied: deque[int] = deque()

    @property
    def has_work(self) -> bool:
        """Some request has not had its last event, or blocks are on their way to the host."""
        tiers = self._roster.tiers
        return bool(self._roster.live) or (tiers is not None and tiers.is_saving)

    @property
    def num_running(self) -> int:
        return self._roster.slots.num_used

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    def add(self, request: Request, constraint: ConstraintLike | None = None) -> None:
        """Queue a request.

        Args:
            constraint: follows the answer's tokens and says when it is over.

        Raises:
            RequestError: it can never be served: too long, or its id is taken.
        """
        self.check(request)
        sampling = request.sampling
        max_tokens = self._max_model_len if sampling.max_tokens is None else sampling.max_tokens
        eos_ids = () if sampling.ignore_eos else request.eos_token_ids
        seq = Sequence(
            request=request,
            importance=Importance(
                request.priority if self._is_by_priority else 0,
                request.arrival_s,
                next(self._order),
            ),
            root=salted_root(self._root, request.cache_salt),
            num_groups=len(self._index.groups),
            max_total=min(
                len(request.prompt_ids) + max_tokens,
                self._max_model_len,
                self._roster.pager.max_tokens + 1,  # the last token needs no page
            ),
            stop_ids=frozenset((*eos_ids, *sampling.stop_token_ids)),
            tokens=array("i", request.prompt_ids),
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
            states=collector_for(request),
            tenant=tenant_digest(request.cache_salt, self._tenant_secret),
            constraint=constraint,
        )
        self._roster.add(seq)
        self._finder.look_ahead(seq)

    def check(self, request: Request) -> None:
        """Raises RequestError if a request can never be served; see `add`."""
        num_prompt, capacity = len(request.prompt_ids), self._roster.pager.max_tokens
        if request.request_id in self._roster.live:
            raise RequestError(
                f"request id {request.request_id!r} belongs to a live request; use another",
                param="request_id",
            )
        if num_prompt == 0:
            raise RequestError("the prompt has no tokens; expected at least one", param="prompt")
        if request.sampling.max_tokens is not None and request.sampling.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {request.sampling.max_tokens}; expected at least 1",
                param="max_tokens",
            )
        if num_prompt >= self._max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; at most {self._max_model_len - 1} fit into "
                f"the context of {self._max_model_len} tokens with one token of answer: shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        if num_prompt > capacity:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; the KV cache holds {capacity}: shorten the "
                "prompt, or give the server more KV pages (--num-pages, --kv-bytes)",
                param="prompt",
                code="context_length_exceeded",
            )

    def abort(self, request_id: str) -> bool:
        """End a request now; what it held is free at once, and it gets no more events.

        Returns:
            Whether it was live.
        """
        seq = self._roster.live.get(request_id)
        if seq is None:
            return False
        self._roster.finish(seq)
        return True

    def schedule(self) -> StepPlan | None:
        """Plan the next step; it must be dispatched.

        Returns:
            None if nothing can be planned before an outstanding step is applied, or nothing is
            left to do.
        """
        plan = self._planner.plan()
        if plan is not None:
            self._unapplied.append(plan.step_id)
        return plan

    def apply(
        self, plan: StepPlan, result: StepResult, duration_s: float | None = None
    ) -> list[TokenEvent]:
        """Take in the tokens of the oldest outstanding step; rows of ended requests are ignored.

        Args:
            duration_s: how long the device took, if it was measured.
        """
        assert self._unapplied and self._unapplied[0] == plan.step_id, "steps are applied in order"
        self._unapplied.popleft()
        if duration_s is not None and plan.prefills:
            num_pairs = sum((c.end * c.end - c.start * c.start) / 2 for c in plan.prefills)
            self._load_planner.prefill.observe(plan.bucket.num_tokens, num_pairs, duration_s)
        events: list[TokenEvent] = []
        num_decodes = plan.num_decodes
        first_token = num_decodes
        for row, (seq, token_id) in enumerate(
            zip(plan.row_seqs, result.token_ids.tolist(), strict=False)
        ):
            if row >= num_decodes:
                chunk = plan.prefills[row - num_decodes]
                if plan.wants_prompt_logprobs:
                    collect_prompt_logprobs(seq, chunk, result, first_token)
                if seq.states is not None:
                    seq.states.collect_prompt(chunk, result, first_token)
                first_token += chunk.end - chunk.start
                if not chunk.samples:
                    continue
            if seq.finished:
                continue
            if seq.constraint is not None:
                # One that fails at the mask leaves only the end to be sampled: that is no answer.
                if token_id not in seq.stop_ids and not seq.constraint.has_failed:
                    seq.constraint.advance(token_id)
                if seq.constraint.has_failed:
                    self._roster.finish(seq)
                    name = seq.request.request_id
                    events.append(TokenEvent(name, None, FinishReason.ABORT))
                    continue
            tokens = seq.tokens
            tokens.append(token_id)
            if seq.pending:
                seq.pending -= 1
            elif len(tokens) >= seq.publish_at:
                self._roster.publish(seq)
            logprobs = prompt_logprobs = stop_token_id = reason = reuse = states = None
            if plan.wants_logprobs and seq.request.sampling.logprobs is not None:
                logprobs = sampled_logprobs(result, row, token_id, seq.request.sampling.logprobs)
            if seq.prompt_logprobs is not None:
                prompt_logprobs, seq.prompt_logprobs = tuple(seq.prompt_logprobs), None
            if seq.states is not None:
                states = seq.states.take(result, row)
            if len(tokens) == seq.num_prompt + 1:
                reuse = PromptReuse(dict(seq.cached), seq.decision, seq.queued_s)
            if seq.request.pooling is not None:
                reason = FinishReason.STOP
            elif token_id in seq.stop_ids:
                reason, stop_token_id = FinishReason.STOP, token_id
            elif seq.constraint is not None and seq.constraint.is_over:
                is_end = token_id in seq.request.eos_token_ids
                reason, stop_token_id = FinishReason.STOP, token_id if is_end else None
            elif len(tokens) >= seq.max_total:
                reason = FinishReason.LENGTH
            if reason is not None:
                self._roster.finish(seq)
            events.append(
                TokenEvent(
                    seq.request.request_id,
                    token_id if seq.request.pooling is None else None,
                    reason,
                    stop_token_id,
                    seq.num_cached,
                    logprobs,
                    prompt_logprobs,
                    reuse,
                    states,
                )
            )
        return events

    def stats(self) -> SchedulerStats:
        """A snapshot of counters and gauges."""
        planner, admission = self._planner, self._planner.admission
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_steps=planner.num_steps,
            num_preemptions=self._roster.num_preemptions,
            recomputed_tokens=planner.recomputed_tokens,
            scheduled_prefill_tokens=planner.prefill_tokens,
            scheduled_decode_tokens=planner.decode_tokens,
            queried_tokens=admission.queried_tokens,
            hit_tokens=admission.hit_tokens.total(),
            hit_tokens_by_source=dict(admission.hit_tokens),
            decisions=dict(self._load_planner.counts),
            pages=tuple(
                GroupPages(
                    num_pages=group.num_pages,
                    num_free=group.num_free,
                    num_cached=group.num_cached,
                    num_in_use=group.num_pages - group.num_available,
                )
                for group in self._index.groups
            ),
        )

    @property
    def index(self) -> KVIndex:
        """The device's pages; whoever changes it does so between steps."""
        return self._index

    def names_of(self, token_ids: Seq[int], cache_salt: str = "") -> list[BlockHash]:
        """The names of the full blocks of a prompt, with that salt."""
        root = salted_root(self._root, cache_salt)
        return block_hashes(token_ids, self._index.page_size, root)

    def tenant_of(self, cache_salt: str) -> bytes:
        """What names the owner of blocks with that salt outside of the process."""
        return tenant_digest(cache_salt, self._tenant_secret)

    def stop_storing(self, tenant: bytes) -> int:
        """Keep nothing more of a tenant's live requests; how many these are."""
        mine = [seq for seq in self._roster.live.values() if seq.tenant == tenant]
        for seq in mine:
            seq.request = replace(seq.request, no_store=True)
        return len(mine)

    def held_pages(self, request_id: str) -> "list[dict[int, int]] | None":
        """Per KV group the pages of a running request, by block; None if it does not run."""
        seq = self._roster.live.get(request_id)
        if seq is None or seq.slot == NO_SLOT:
            return None
        return [
            {block: pages[block] for block in range(held_from, len(pages))}
            for pages, held_from in zip(seq.pages, seq.held_from, strict=True)
        ]

    def check_integrity(self) -> None:
        """Recount slots, queues and pages from scratch; AssertionError says what is wrong."""
        self._roster.check_integrity()
