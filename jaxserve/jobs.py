"""Prompts on their way: each is some requests, whose events become answers.

Both ways to serve are generators that step the engine when they are advanced: a plain loop runs
them, and a coroutine runs them beside its event loop. Knows nothing of how prompts were made.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from jaxserve.driver import Driver
from jaxserve.outputs import OutputDelta, OutputProcessor, merge_deltas
from jaxserve.results import RequestOutputs, request_output
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request, TokenEvent


@dataclass(slots=True)
class Job:
    """One prompt on its way; `processors` has one entry for each answer."""

    request_id: str
    prompt: str | None
    requests: list[Request]
    processors: list[OutputProcessor] = field(default_factory=list)


def serving(
    driver: Driver, tokenizer: Tokenizer, jobs: Sequence[Job], use_tqdm: bool
) -> Generator[None, None, None]:
    """Serve all jobs to their end, a step at a time; closing it ends what is not finished.

    Feeds the engine's queue no faster than it may grow.
    """
    waiting = deque((job, request) for job in jobs for request in job.requests)
    scheduler = driver.config.scheduler
    most_live = scheduler.max_num_seqs + scheduler.max_num_waiting
    live: set[str] = set()
    num_tokens = 0
    left = {job.request_id: len(job.requests) for job in jobs}
    bar = tqdm(total=len(jobs), desc="prompts", disable=not use_tqdm, leave=True)

    def admit(job: Job, request: Request) -> None:
        processor = OutputProcessor(request, tokenizer)
        job.processors.append(processor)

        def sink(event: TokenEvent) -> None:
            nonlocal num_tokens
            delta = processor.process(event)
            num_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                driver.retire(request.request_id, abort=delta.must_abort)
                live.discard(request.request_id)
                left[job.request_id] -= 1
                if left[job.request_id] == 0:
                    bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                    bar.update()

        live.add(request.request_id)
        driver.admit(request, sink)

    try:
        while waiting or live:
            while waiting and len(live) < most_live:
                admit(*waiting.popleft())
            before = len(live)
            driver.step_unless(lambda before=before: not live or len(live) < before)
            yield
    finally:
        bar.close()
        for request_id in list(live):
            driver.retire(request_id, abort=True)


def streaming(driver: Driver, tokenizer: Tokenizer, job: Job) -> Generator[OutputDelta, None, None]:
    """The pieces of one answer; closing it early ends the work."""
    (request,) = job.requests
    processor = OutputProcessor(request, tokenizer)
    arrived: deque[TokenEvent] = deque()
    pending: list[OutputDelta] = []
    driver.admit(request, arrived.append)
    try:
        while not processor.finished:
            while not arrived:
                driver.step_unless(lambda: arrived)
            pending.append(processor.process(arrived.popleft()))
            if processor.finished:
                driver.retire(request.request_id, abort=pending[-1].must_abort)
            if pending[-1].text or processor.finished:
                delta, pending = merge_deltas(pending), []
                yield delta
    finally:
        if not processor.finished:
            driver.retire(request.request_id, abort=True)


def outputs_of(jobs: Sequence[Job]) -> RequestOutputs:
    """The results of jobs that were served."""
    return RequestOutputs(
        request_output(job.request_id, job.prompt, job.processors) for job in jobs
    )
