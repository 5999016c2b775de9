"""Engines in process, and a client that asks them and notes when answers come."""

import dataclasses
import itertools
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.peers.workload import random_prompt
from jaxserve.engine import Engine, build_engine
from jaxserve.settings import config_from_keywords
from jaxserve.types import Request, SamplingParams

FLUSH_S = 30.0

_IDS = itertools.count()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt and how many tokens to answer."""

    prompt: tuple[int, ...]
    answer_len: int


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a request. Times are seconds from its submission.

    Attributes:
        num_cached: prompt tokens that were not computed.
    """

    ttft_s: float
    total_s: float
    num_cached: int
    tokens: tuple[int, ...]


class Client:
    """Owns an engine.

    Args:
        settings: as for `jaxserve.LLM`, with `model`.
    """

    def __init__(self, settings: "dict[str, Any]"):
        self.engine: Engine = build_engine(config_from_keywords(settings))

    def serve(self, asks: Iterable[Ask], at_once: int = 1) -> list[Served]:
        """Keep so many requests in flight until all are served; results in the order of `asks`."""
        waiting: Iterator[tuple[int, Ask]] = enumerate(asks)
        begun: dict[str, tuple[int, float]] = {}
        tokens: dict[str, list[int]] = {}
        first_s: dict[str, float] = {}
        served: dict[int, Served] = {}
        is_open = True
        while is_open or begun:
            while is_open and len(begun) < at_once:
                entry = next(waiting, None)
                if entry is None:
                    is_open = False
                    break
                request = _request(entry[1])
                begun[request.request_id] = entry[0], time.perf_counter()
                tokens[request.request_id] = []
                self.engine.add(request)
            events = self.engine.step() if begun else []
            now_s = time.perf_counter()
            for event in events:
                name = event.request_id
                assert event.token_id is not None
                tokens[name].append(event.token_id)
                first_s.setdefault(name, now_s)
                if event.finish_reason is not None:
                    index, begun_s = begun.pop(name)
                    served[index] = Served(
                        first_s.pop(name) - begun_s,
                        now_s - begun_s,
                        event.num_cached_tokens,
                        tuple(tokens.pop(name)),
                    )
        return [served[index] for index in sorted(served)]

    def settle(self) -> None:
        """Finish steps in flight, and let what is on its way to lower tiers arrive."""
        while self.engine.has_work:
            self.engine.step()
        if self.engine.lower is not None:
            self.engine.lower.flush(self.engine.step, FLUSH_S)

    def about(self) -> dict[str, Any]:
        """Counters of the tiers, for the record."""
        lower = self.engine.lower
        if lower is None:
            return {}
        counters: dict[str, Any] = dataclasses.asdict(lower.tiers.counters)
        if lower.cascade is not None:
            counters["verdicts"] = dict(lower.cascade.verdicts)
        return counters

    def close(self) -> None:
        self.engine.close()


def prompts(rng: random.Random, num: int, length: int, vocab: int) -> list[tuple[int, ...]]:
    """Random prompts that have nothing in common."""
    return [random_prompt(rng, length, vocab) for _ in range(num)]


def _request(ask: Ask) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=ask.answer_len, ignore_eos=True, seed=0)
    return Request(f"bench-{next(_IDS)}", ask.prompt, sampling, arrival_s=time.monotonic())
