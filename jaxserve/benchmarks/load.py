"""Sends sessions at their times, and watches itself: a generator that lags measures itself.

Lateness is how long after its time a request was started; loop lag is how late a timer of the event
loop fires. Waiting for the concurrency limit is neither: it is counted apart.
"""

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jaxserve.benchmarks.client import Answer, Target, ask
from jaxserve.benchmarks.workloads import Session

TICK_S = 0.01


@dataclass(slots=True)
class Load:
    """What happened.

    Attributes:
        late_s: by session, how late its first request was started.
        lag_s: samples of the event loop's lag.
        cpu_share: of one core, used by the generator.
    """

    answers: list[Answer] = field(default_factory=list)
    started_s: float = 0.0
    duration_s: float = 0.0
    late_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    cpu_share: float = 0.0
    max_concurrency: int = 0


async def run(
    http: aiohttp.ClientSession,
    target: Target,
    sessions: Sequence[Session],
    *,
    max_concurrency: int | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> Load:
    """Run all sessions; every turn of every session has an answer in the result.

    Args:
        max_concurrency: requests under way at once; None: as many as arrive.
        on_answer: called when a request has ended.
    """
    load = Load()
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    num_running = 0

    async def one(prompt: Any, num_output: int) -> Answer:
        nonlocal num_running
        if gate is not None:
            await gate.acquire()
        num_running += 1
        load.max_concurrency = max(load.max_concurrency, num_running)
        try:
            answer = await ask(http, target, prompt, num_output)
        finally:
            num_running -= 1
            if gate is not None:
                gate.release()
        load.answers.append(answer)
        on_answer(answer)
        return answer

    async def converse(session: Session) -> None:
        history: Any = [] if target.is_chat else ""
        for index, turn in enumerate(session.turns):
            if index and session.think_s:
                await asyncio.sleep(session.think_s)
            prompt: Any = turn.prompt
            if target.is_chat:
                prompt = [*history, {"role": "user", "content": turn.prompt}]
            elif index:
                prompt = history + turn.prompt
            answer = await one(prompt, turn.num_output_tokens)
            if answer.error:
                for _ in session.turns[index + 1 :]:
                    rest = Answer(error="turn before failed", sent_s=answer.ended_s)
                    rest.ended_s = rest.sent_s
                    load.answers.append(rest)
                    on_answer(rest)
                return
            if target.is_chat:
                history = [*prompt, {"role": "assistant", "content": answer.text}]
            elif isinstance(prompt, str):
                history = prompt + answer.text

    watch = asyncio.create_task(_watch(load.lag_s))
    cpu_s = _cpu_s()
    load.started_s = start_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as tasks:
            for session in sorted(sessions, key=lambda session: session.at_s):
                wait_s = start_s + session.at_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                if session.at_s:
                    late_s = time.perf_counter() - start_s - session.at_s
                    load.late_s.append(max(0.0, late_s))
                tasks.create_task(converse(session))
    finally:
        watch.cancel()
    load.duration_s = time.perf_counter() - start_s
    load.cpu_share = (_cpu_s() - cpu_s) / max(load.duration_s, 1e-9)
    return load


async def _watch(lag_s: list[float]) -> None:
    while True:
        before_s = time.perf_counter()
        await asyncio.sleep(TICK_S)
        lag_s.append(max(0.0, time.perf_counter() - before_s - TICK_S))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
