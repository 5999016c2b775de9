"""One load test from its options to its figures: finds the model, makes prompts, warms up, runs.

Knows nothing of flags and tables.
"""

import datetime
import platform
import random
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

import jaxserve
from jaxserve.benchmarks import client, counters, load, summary, workloads
from jaxserve.benchmarks.client import Answer, Target
from jaxserve.benchmarks.filler import Filler, calibrated, calibration_text, find_tokenizer
from jaxserve.benchmarks.summary import Goal
from jaxserve.benchmarks.workloads import Limits, Session, Shape, Turn
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.progress import Progress

DEFAULT_INPUT, DEFAULT_OUTPUT, DEFAULT_PREFIX = 1024, 128, 256
DEFAULT_PROMPTS = 1000
ANSWERS_OF_A_CONTEXT = 8
"""Where the defaults do not fit, an answer takes this part of the context."""

CHAT_MARGIN, TEXT_MARGIN = 64, 16
"""Tokens that a chat template, or a begin-of-sequence token, may add."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for, checked as far as the server is not needed."""

    url: str
    model: str | None
    api_key: str | None
    backend: str
    tokenizer: str | None
    workload: str
    path: str | None
    num_prompts: int | None
    input_len: int | None
    output_len: int | None
    prefix_len: int | None
    range_ratio: float
    num_prefixes: int
    num_turns: int
    think_s: float
    block_tokens: int
    trace_speed: float
    length_scale: float
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    num_warmups: int
    seed: int
    ignore_eos: bool
    temperature: float
    timeout_s: float
    percentiles: tuple[float, ...]
    goals: tuple[Goal, ...]
    server_metrics: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended."""

    load: load.Load
    line: dict[str, Any]


async def run_load_test(options: Options) -> Run:
    """Run one load test.

    Raises:
        ConfigError: options that do not fit the model.
        JaxserveError: the server does not answer, or refuses such requests.
    """
    extra: dict[str, Any] = {"temperature": options.temperature}
    if options.ignore_eos:
        extra["ignore_eos"] = True
    async with client.new_session() as http:
        target = Target(
            options.url,
            options.model or "",
            options.backend == "openai-chat",
            options.api_key,
            extra,
            options.timeout_s,
        )
        entry = await client.find_model(http, target)
        target = replace(target, model=entry["id"])
        filler = await _filler(options, http, target)
        limits = Limits(entry.get("max_model_len"))
        sessions = _sessions(options, filler, limits, target)
        if not sessions:
            raise JaxserveError(
                f"no request of {options.path} fits a context of {limits.max_model_len} tokens; "
                "shorten them with --length-scale"
            )
        await _warm_up(options, filler, limits, http, target, sessions)
        before = None
        if options.server_metrics:
            before = await counters.scrape(http, target.url, target.headers)
        total = sum(len(session.turns) for session in sessions)
        num_done = 0
        with Progress() as report:
            report("requests", 0, total)

            def on_answer(answer: Answer) -> None:
                nonlocal num_done
                num_done += 1
                report("requests", num_done, total)

            done = await load.run(
                http,
                target,
                sessions,
                max_concurrency=options.max_concurrency,
                on_answer=on_answer,
            )
        after = None
        if before is not None:
            after = await counters.scrape(http, target.url, target.headers)
    figures = summary.summarise(done, options.percentiles, options.goals)
    if limits.left_out:
        figures["left_out_too_long"] = len(limits.left_out)
    if before is not None and after is not None:
        figures["server_metrics"] = counters.increase(before, after)
    return Run(done, {**_described(options, target, entry, filler, total), **figures})


async def _filler(options: Options, http: aiohttp.ClientSession, target: Target) -> Filler:
    """Exact with the model's tokenizer; else from what the server counts for a known text."""
    found = find_tokenizer(options.tokenizer, target.model)
    if found is not None:
        return found
    counted = []
    for text in (calibration_text(1), calibration_text()):
        answer = await client.ask(http, target, text, 1)
        if answer.error and not answer.is_counted:
            raise JaxserveError(_refused(options, answer))
        counted.append(answer.prompt_tokens)
    return calibrated(counted[1], counted[0])


def _sessions(options: Options, filler: Filler, limits: Limits, target: Target) -> list[Session]:
    as_ids = filler.has_ids and not target.is_chat
    if options.workload == "trace":
        assert options.path is not None
        return workloads.replay(
            options.path,
            filler,
            limits,
            num_prompts=options.num_prompts,
            speed=options.trace_speed,
            length_scale=options.length_scale,
            block_tokens=options.block_tokens,
            seed=options.seed,
            as_ids=as_ids,
        )
    if options.workload == "sharegpt":
        assert options.path is not None
        sessions = workloads.sharegpt(
            options.path,
            filler,
            limits,
            num_prompts=options.num_prompts or DEFAULT_PROMPTS,
            output_len=options.output_len,
            seed=options.seed,
        )
    else:
        shape = _shape(options, limits.max_model_len, target.is_chat)
        if options.workload == "random":
            sessions = workloads.random_prompts(shape, filler, as_ids=as_ids)
        elif options.workload == "shared-prefix":
            sessions = workloads.shared_prefixes(shape, filler, as_ids=as_ids)
        else:
            sessions = workloads.multi_turn(shape, filler)
    return workloads.arriving(sessions, options.request_rate, options.burstiness, options.seed)


def _shape(options: Options, context: int | None, is_chat: bool) -> Shape:
    """Lengths that were given, or defaults that fit into the context.

    Raises:
        ConfigError: what was given does not fit.
    """
    has_prefix = options.workload in ("shared-prefix", "multi-turn")
    num_turns = options.num_turns if options.workload == "multi-turn" else 1
    lengths = (
        options.input_len or DEFAULT_INPUT,
        options.output_len or DEFAULT_OUTPUT,
        0
        if not has_prefix
        else DEFAULT_PREFIX
        if options.prefix_len is None
        else options.prefix_len,
    )
    most = _most(lengths, num_turns, options.range_ratio)
    room = None if context is None else context - (CHAT_MARGIN if is_chat else TEXT_MARGIN)
    if room is not None and most > room:
        if any((options.input_len, options.output_len, options.prefix_len)):
            raise ConfigError(
                f"a request may take {most} tokens, and the model's context is {context}; lower "
                "--input-len, --output-len, --prefix-len, --num-turns or --range-ratio"
            )
        share = int(room / (1 + options.range_ratio) / num_turns)
        output = max(1, min(DEFAULT_OUTPUT, share // ANSWERS_OF_A_CONTEXT))
        prefix = min(DEFAULT_PREFIX, share // 4) if has_prefix else 0
        lengths = (max(1, min(DEFAULT_INPUT, share - output - prefix)), output, prefix)
    return Shape(
        num_prompts=options.num_prompts or DEFAULT_PROMPTS,
        input_len=lengths[0],
        output_len=lengths[1],
        range_ratio=options.range_ratio,
        prefix_len=lengths[2],
        num_prefixes=options.num_prefixes,
        num_turns=options.num_turns,
        think_s=options.think_s,
        seed=options.seed,
    )


def _most(lengths: tuple[int, int, int], num_turns: int, range_ratio: float) -> int:
    """The tokens of the longest request."""
    input_len, output_len, prefix_len = lengths
    return prefix_len + num_turns * int((input_len + output_len) * (1 + range_ratio))


async def _warm_up(
    options: Options,
    filler: Filler,
    limits: Limits,
    http: aiohttp.ClientSession,
    target: Target,
    sessions: list[Session],
) -> None:
    """Requests that are not measured; the first shows whether the server takes such requests.

    Raises:
        JaxserveError: it does not.
    """
    as_ids = filler.has_ids and not target.is_chat
    rng = random.Random(f"warm-up {options.seed}")
    chosen = [sessions[index % len(sessions)].turns[0] for index in range(options.num_warmups)]
    warm = []
    for turn in chosen:
        piece: Any = filler.ids if as_ids else filler.text
        prompt = piece(turn.num_input_tokens, rng)
        warm.append(Session((Turn(prompt, turn.num_input_tokens, turn.num_output_tokens),)))
    if not warm:
        return
    first = warm[0].turns[0]
    answer = await client.ask(http, target, first.prompt, first.num_output_tokens)
    if answer.error:
        raise JaxserveError(_refused(options, answer))
    await load.run(http, target, warm[1:], max_concurrency=options.max_concurrency)


def _refused(options: Options, answer: Answer) -> str:
    hint = ""
    if answer.error == "http 400" and options.ignore_eos:
        hint = " (if it is the field ignore_eos: --no-ignore-eos)"
    return (
        f"{options.url} does not answer the first request: {answer.error}: {answer.message}{hint}"
    )


def _described(
    options: Options, target: Target, entry: dict[str, Any], filler: Filler, total: int
) -> dict[str, Any]:
    infinite = options.request_rate == float("inf")
    return {
        "benchmark": "serve",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jaxserve_version": jaxserve.__version__,
        "python_version": platform.python_version(),
        "url": options.url,
        "backend": options.backend,
        "model_id": target.model,
        "served_by": entry.get("owned_by"),
        "max_model_len": entry.get("max_model_len"),
        "prompts_from": "tokenizer" if filler.tokenizer is not None else "words",
        "workload": options.workload,
        "num_prompts": total,
        "request_rate": "inf" if infinite else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "ignore_eos": options.ignore_eos,
    }
