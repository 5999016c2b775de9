"""Joins scheduler and runner: requests in, token events out, one step ahead of the device.

`step` dispatches step t+1 before it reads the tokens of step t, so the device never waits for the
host. Not thread-safe: one thread owns an engine. Knows nothing of text or HTTP.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.attend import head_axis
from jaxserve.batch import StateShape, create_state
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.kv.blocks import Namespace
from jaxserve.kv.pool import create_pool, page_bytes, storage_dtype
from jaxserve.pallas_kernels.paged_attention.api import get_backend
from jaxserve.pallas_kernels.paged_attention.reference import table_width
from jaxserve.runner import Runner, StepHandle, StepProgram
from jaxserve.scheduler import Scheduler, default_buckets
from jaxserve.sharding import TENSOR_AXIS, make_mesh
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import KVGroup, Request, TokenEvent, group_layers
from jaxserve.weights import LoadedModel, load_checkpoint

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1
"""Changes when the bytes of a block change meaning; part of every block's namespace."""

CPU_KV_BYTES = 4 << 30
GPU_MEMORY_FRACTION = 0.9

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, of how much)."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of the engine, in counts."""

    num_running: int
    num_waiting: int
    num_pages: tuple[int, ...]
    num_pages_in_use: tuple[int, ...]
    num_steps: int
    num_generated_tokens: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class StartupReport:
    """What start-up did, for the ready line."""

    num_graphs: int
    compile_s: float
    load_s: float
    num_pages: tuple[int, ...]
    num_cache_tokens: int
    kv_bytes: int
    num_params: int


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
    ):
        assert config.model.max_model_len is not None and config.model.served_model_name
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.report = report
        self.model_name: str = config.model.served_model_name
        self.max_model_len: int = config.model.max_model_len
        self.eos_token_ids = model.config.eos_token_ids
        self._runner = runner
        self._scheduler = scheduler
        self._in_flight: StepHandle | None = None
        self._num_steps = 0
        self._num_generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served, or too many wait already.
        """
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; no event of it follows."""
        self._scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """Dispatch the next step, then read the one before it."""
        plan = self._scheduler.schedule()
        handle = self._runner.dispatch(plan) if plan is not None else None
        previous, self._in_flight = self._in_flight, handle
        if previous is None:
            return []
        events = self._scheduler.apply(previous.plan, self._runner.fetch(previous))
        self._num_steps += 1
        self._num_generated_tokens += len(events)
        return events

    def check_integrity(self) -> None:
        """Recount everything the scheduler keeps; raises AssertionError if a count is off."""
        self._scheduler.check_integrity()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler.stats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_pages=scheduler.num_pages,
            num_pages_in_use=scheduler.num_pages_in_use,
            num_steps=self._num_steps,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
        )

    def close(self) -> None:
        """Wait for the device and let go of its memory."""
        if self._in_flight is not None:
            self._runner.fetch(self._in_flight)
            self._in_flight = None
        self._runner.close()
