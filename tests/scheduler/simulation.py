"""The engine's loop, one step ahead, over a fake device; checks every event and every step."""

import random
from collections import deque

from jaxserve.config import SchedulerConfig
from jaxserve.kv.planner import LoadPlanner
from jaxserve.scheduler import Scheduler, default_buckets
from jaxserve.types import (
    FinishReason,
    KVGroup,
    LayerCache,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from tests.scheduler.fake_device import FakeDevice, answer
from tests.scheduler.fake_tiers import FakeTiers

FULL = KVGroup(0, (0,), LayerCache(1, 8))
ROOT = b"r" * 32


def kv_groups(*windows: int | None) -> tuple[KVGroup, ...]:
    """One group per window."""
    return tuple(
        KVGroup(index, (index,), LayerCache(1, 8, window)) for index, window in enumerate(windows)
    )


class Simulation:
    """A scheduler, a fake device, and what was asked and answered."""

    def __init__(
        self,
        *,
        groups: tuple[KVGroup, ...] = (FULL,),
        num_pages: tuple[int, ...] = (64,),
        page_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 32,
        max_model_len: int = 128,
        policy: str = "fcfs",
        enable_prefix_caching: bool = True,
        tiers: FakeTiers | None = None,
        load_planner: LoadPlanner | None = None,
        jitter: random.Random | None = None,
    ):
        self.tiers = tiers
        self.now_s = 0.0
        self._jitter = jitter
        self.scheduler = Scheduler(
            scheduler_config=SchedulerConfig(max_num_seqs, max_num_batched_tokens, policy),
            kv_groups=groups,
            num_pages=num_pages,
            page_size=page_size,
            max_model_len=max_model_len,
            namespace_root=ROOT,
            enable_prefix_caching=enable_prefix_caching,
            buckets=default_buckets(max_num_seqs, max_num_batched_tokens),
            tiers=tiers.tiers if tiers else None,
            load_planner=load_planner,
            clock=self._clock,
        )
        self.device = FakeDevice(groups, num_pages, page_size, max_num_seqs)
        if tiers:
            self.device.transfers = tiers.execute
        self.max_model_len = max_model_len
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.order_of_first: list[str] = []
        self.in_flight: deque = deque()
        self.plans: list = []

    def _clock(self) -> float:
        """Time goes on within a step, too, if it jitters."""
        if self._jitter is not None:
            self.now_s += self._jitter.choice([0.0, 0.0, 1e-4, 5e-3])
        return self.now_s

    def add(
        self,
        name: str,
        prompt_ids,
        *,
        priority: int = 0,
        salt: str = "",
        no_store: bool = False,
        **sampling,
    ) -> None:
        """Submit a request; its seed is a function of its name unless given."""
        sampling.setdefault("seed", len(self.requests) + 1)
        request = Request(
            request_id=name,
            prompt_ids=tuple(prompt_ids),
            sampling=SamplingParams(**sampling),
            eos_token_ids=(0,),
            priority=priority,
            arrival_s=float(len(self.requests)),
            cache_salt=salt,
            no_store=no_store,
        )
        self.scheduler.add(request)
        self.requests[name] = request
        self.events[name] = []

    def abort(self, name: str) -> bool:
        """Abort, and expect no event from now on."""
        was_live = self.scheduler.abort(name)
        self.scheduler.check_integrity()
        if was_live:
            del self.requests[name]
        return was_live

    def step(self) -> None:
        """Plan and dispatch a step, then apply the one before."""
        self.now_s += 0.01
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.device.run(plan)))
        if self.tiers:
            self.tiers.tick()
        is_moving = self.tiers is not None and self.tiers.tiers.is_busy
        assert self.in_flight or is_moving or not self.scheduler.has_work, (
            "work is left, but nothing is planned"
        )
        if self.in_flight and (len(self.in_flight) > 1 or plan is None):
            for event in self.scheduler.apply(*self.in_flight.popleft()):
                assert event.request_id in self.requests, "an event after the abort"
                events = self.events[event.request_id]
                assert not events or events[-1].finish_reason is None, "an event after the end"
                events.append(event)
                if len(events) == 1:
                    self.order_of_first.append(event.request_id)
            self.scheduler.check_integrity()

    def run(self, max_steps: int = 20_000) -> None:
        """Step until everything is answered."""
        steps = 0
        while self.scheduler.has_work or self.in_flight:
            self.step()
            steps += 1
            assert steps < max_steps, "no end in sight"

    def tokens(self, name: str) -> list[int]:
        return [event.token_id for event in self.events[name] if event.token_id is not None]

    def check_answers(self) -> None:
        """Every request that was not aborted has its own right answer, with the right ending."""
        for name, request in self.requests.items():
            sampling, num_prompt = request.sampling, len(request.prompt_ids)
            assert sampling.max_tokens is not None and sampling.seed is not None
            stop_ids = set(sampling.stop_token_ids)
            stop_ids |= set() if sampling.ignore_eos else set(request.eos_token_ids)
            capacity = self.scheduler._roster.pager.max_tokens + 1
            limit = min(sampling.max_tokens, min(self.max_model_len, capacity) - num_prompt)
            expected = answer(request.prompt_ids, sampling.seed, limit, stop_ids)
            assert self.tokens(name) == expected, name
            last = self.events[name][-1]
            if expected[-1] in stop_ids:
                assert (last.finish_reason, last.stop_token_id) == ("stop", expected[-1])
            else:
                assert last.finish_reason is FinishReason.LENGTH
            self._check_logprobs(request, expected)

    def _check_logprobs(self, request: Request, tokens: list[int]) -> None:
        events, num_prompt = self.events[request.request_id], len(request.prompt_ids)
        num_top = request.sampling.logprobs
        for index, (event, token) in enumerate(zip(events, tokens, strict=True)):
            expected = (
                None if num_top is None else fake_logprobs(token, num_prompt + index, num_top)
            )
            assert event.logprobs == expected
        num_top, collected = request.sampling.prompt_logprobs, events[0].prompt_logprobs
        assert all(event.prompt_logprobs is None for event in events[1:])
        if num_top is None:
            assert collected is None
        else:
            rest = [
                fake_logprobs(token, position, num_top)
                for position, token in enumerate(request.prompt_ids)
            ]
            assert collected == (None, *rest[1:])

    def check_all_is_free(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert [pages.num_in_use for pages in stats.pages] == [0] * len(stats.pages)
        if self.tiers:
            self.tiers.check_idle()


def fake_logprobs(token: int, num_before: int, num_top: int) -> TokenLogprobs:
    """What the fake device reports for a token that follows `num_before` tokens."""
    top = tuple((token + i, -(token + i + num_before / 1000)) for i in range(num_top))
    return TokenLogprobs(token, -(token + num_before / 1000), top)
