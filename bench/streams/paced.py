"""An engine whose device takes a fixed time for each step, and no processor time at all.

Scheduling, packing and applying are the engine's own; only the device is played, by sleeping, as an
accelerator that works beside the host. So what slows its loop is the host alone.
"""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxserve.batch import StateShape, pack
from jaxserve.config import Config
from jaxserve.embedded import checkpoint_path
from jaxserve.plan import StepPlan, StepResult
from jaxserve.scheduler import Scheduler, SchedulerStats, default_buckets
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import KVGroup, LayerCache, Request, StartupReport, TokenEvent

CONTEXT = 4096


class PacedEngine:
    """An `EngineLike` of `max_num_seqs` rows.

    Args:
        step_s: how long the device takes.
    """

    model_name = "paced"
    max_model_len = CONTEXT

    def __init__(self, config: Config, step_s: float):
        self.config = config
        self.tokenizer = Tokenizer.from_folder(checkpoint_path())
        self.eos_token_ids: tuple[int, ...] = ()
        self._step_s = step_s
        self._words = _words(self.tokenizer)
        num_seqs, page_size = config.scheduler.max_num_seqs, config.cache.page_size
        self._shape = StateShape(
            num_slots=num_seqs,
            num_groups=1,
            max_len=CONTEXT,
            table_width=CONTEXT // page_size,
            vocab_size=self.tokenizer.vocab_size,
            page_size=page_size,
        )
        self._scheduler = Scheduler(
            scheduler_config=config.scheduler,
            kv_groups=(KVGroup(0, (0,), LayerCache(8, 128)),),
            num_pages=(num_seqs * CONTEXT // page_size,),
            page_size=page_size,
            max_model_len=CONTEXT,
            namespace_root=bytes(32),
            enable_prefix_caching=True,
            buckets=default_buckets(num_seqs, config.scheduler.max_num_batched_tokens),
        )
        self.model = SimpleNamespace(
            dtype="float32",
            path=checkpoint_path(),
            config=SimpleNamespace(vocab_size=self.tokenizer.vocab_size),
        )
        self.report = StartupReport(0, 0.0, (0,), 0, 0, 0, 0.0)
        self._in_flight: StepPlan | None = None
        self._free_at_s = 0.0

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self._scheduler.has_work

    def add(self, request: Request) -> None:
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        plan = self._scheduler.schedule()
        previous, self._in_flight = self._in_flight, plan
        if plan is not None:
            pack(plan, self._shape)
        if previous is None:
            self._free_at_s = time.perf_counter() + self._step_s
            return []
        time.sleep(max(0.0, self._free_at_s - time.perf_counter()))
        # The next step was dispatched before this one ended, so it begins now.
        self._free_at_s = max(self._free_at_s, time.perf_counter() - 1e-3) + self._step_s
        rows = np.arange(previous.num_rows) * 7 + previous.step_id
        return self._scheduler.apply(previous, StepResult(self._words[rows % len(self._words)]))

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def kv_stats(self) -> Any:
        return None

    def close(self) -> None:
        pass


def _words(tokenizer: Tokenizer) -> "np.ndarray":
    """Tokens that are whole words, as most of a real answer's are."""
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i).strip().isalpha()]
    return np.array(ids, np.int32)
