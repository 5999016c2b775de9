"""Joins scheduler and runner: requests in, token events out, one step ahead of the device.

`step` dispatches step t+1 before it reads the tokens of step t, so the device never waits for the
host. Not thread-safe: one thread owns an engine. Knows nothing of text or HTTP.
"""

import time

import numpy as np

from jaxserve.config import Config
from jaxserve.engine.compiling import Compiling
from jaxserve.engine.host_memory import FreedMemory
from jaxserve.engine.recompute import Recomputer
from jaxserve.engine.tier_control import TierControl
from jaxserve.engine.tiers import LowerTiers
from jaxserve.kv.stats import KVStats
from jaxserve.runner import Runner, StepHandle
from jaxserve.scheduler import Scheduler, SchedulerStats
from jaxserve.structured import GrammarCompiler, fill_masks
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request, StartupReport, TokenEvent
from jaxserve.weights import LoadedModel

MAX_WAIT_S = 0.002
"""Longest wait for a lower tier in one step; new requests and deadlines are seen to after it."""


FLUSH_S = 10.0
"""Longest wait for stores when the engine closes."""


class Engine:
    """Serves requests of one model; see the module docstring for who may call it."""

    def __init__(
        self,
        *,
        config: Config,
        model: LoadedModel,
        tokenizer: Tokenizer,
        runner: Runner,
        scheduler: Scheduler,
        report: StartupReport,
        lower: LowerTiers | None = None,
    ):
        assert config.model.max_model_len is not None and config.model.served_model_name
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.report = report
        self.model_name: str = config.model.served_model_name
        self.max_model_len: int = config.model.max_model_len
        self.eos_token_ids = _end_ids(model, tokenizer)
        self._runner = runner
        self._scheduler = scheduler
        self.lower = lower
        self.tier_control = TierControl(
            scheduler, lower, [array.nbytes // array.shape[0] for array in runner.pool]
        )
        self.recomputer = (
            None if lower is None else Recomputer(scheduler, runner, lower, self.max_model_len)
        )
        self._freed_memory = FreedMemory()
        vocab_size = model.config.vocab_size
        self.grammars = GrammarCompiler(tokenizer, vocab_size, self.eos_token_ids)
        self._compiling = Compiling(self.grammars)
        num_words = -(-vocab_size // 32)
        self._masks_rw = np.zeros((config.scheduler.max_num_seqs, num_words), np.int32)
        self._in_flight: StepHandle | None = None
        self._free_at_s = 0.0  # when the device had finished the last step that was fetched

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self._scheduler.has_work or bool(self._compiling)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served, or too many wait already.
        """
        if request.grammar:
            self._scheduler.check(request)
            self._compiling.add(request)
        else:
            self._scheduler.add(request)
        if self.lower is not None and self.config.cache.enable_prefix_caching:
            self.tier_control.prompts.note(request)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; no event of it follows."""
        self._compiling.abort(request_id)
        self._scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """Dispatch the next step, then read the one before it.

        If there is nothing to do but to wait for lower tiers, waits for them a little.
        """
        if self.lower is not None:
            self.lower.wake.clear()
            if (in_flight := self._in_flight) is not None:
                self.lower.hear_answers(lambda: in_flight.is_done)
        failed = self._compiling.hand_over(self._scheduler.add) if self._compiling else []
        plan = self._scheduler.schedule()
        handle = self._runner.dispatch(plan) if plan is not None else None
        previous, self._in_flight = self._in_flight, handle
        if previous is None:
            self._sample_constrained()
            if plan is None and self.lower is not None and self.lower.tiers.is_busy:
                self.lower.wake.wait(MAX_WAIT_S)
            elif plan is None:
                self._compiling.wait(MAX_WAIT_S)
            return failed
        result = self._runner.fetch(previous)
        now_s = time.perf_counter()
        duration_s = now_s - max(previous.dispatched_s, self._free_at_s)
        self._free_at_s = now_s
        events = failed + self._scheduler.apply(previous.plan, result, duration_s)
        self._sample_constrained()
        self.tier_control.history.maybe_add(now_s)
        self._freed_memory.maybe_give_back(now_s)
        if self.recomputer is not None and self.recomputer.is_active:
            events = self.recomputer.take(events)
        return events

    def _sample_constrained(self) -> None:
        """Say what may follow in the step in flight, now that the tokens before are here."""
        handle = self._in_flight
        if handle is None or not handle.plan.constrained:
            return
        rows = [row for row in handle.plan.constrained if not row.constraint.is_over]
        if rows:
            masks_rw = self._masks_rw[: len(rows)]
            fill_masks(self.grammars.executor, [row.constraint for row in rows], masks_rw)
            self._in_flight = self._runner.sample_constrained(handle, rows, masks_rw)

    def check_integrity(self) -> None:
        """Recount everything the scheduler keeps; raises AssertionError if a count is off."""
        self._scheduler.check_integrity()

    def stats(self) -> SchedulerStats:
        """Counters and gauges of this moment."""
        return self._scheduler.stats()

    def kv_stats(self) -> KVStats:
        """What the tiers hold and have done."""
        return self.tier_control.stats()

    @property
    def kv_dtype(self) -> str:
        """What the bytes of blocks mean."""
        return str(self.model.dtype)

    def close(self) -> None:
        """Write out what goes to stores, wait for the device and let go of its memory."""
        if self.lower is not None and self.lower.cascade is not None:
            self.lower.flush(self.step, FLUSH_S)
        if self._in_flight is not None:
            self._runner.fetch(self._in_flight)
            self._in_flight = None
        if self.recomputer is not None:
            self.recomputer.fail()
        self._runner.close()
        self.grammars.close()
        if self.lower is not None:
            self.lower.close(FLUSH_S)


def _end_ids(model: LoadedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the checkpoint's configs say ends a sequence, and the tokenizer's own word for it.

    A fine-tuned model often has a new end token in its tokenizer, and the old one in its configs.
    """
    ids, own = model.config.eos_token_ids, tokenizer.eos_token_id
    if own is None or own in ids or own >= model.config.vocab_size:
        return ids
    return (*ids, own)
