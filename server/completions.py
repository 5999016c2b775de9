"""POST /v1/completions: prompts as text or token ids, one or several, and the old logprobs."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.outputs import OutputDelta, OutputProcessor, PositionLogprobs, TokenText
from jaxserve.sampling_bounds import check_sampling
from jaxserve.server.answers import Answers
from jaxserve.server.chat import prompt_logprobs_entry, token_name
from jaxserve.server.context import Context
from jaxserve.server.errors import from_exception
from jaxserve.server.forms import form_of
from jaxserve.server.guard import REQUEST_ID
from jaxserve.server.openai import (
    CompletionRequest,
    check_num_answers,
    check_supported,
    finite,
    log_unknown,
    prompts_of,
    sampling_of,
    usage,
)
from jaxserve.server.streaming import DONE, EventStream, or_gone, sse, to_json
from jaxserve.types import Request, SamplingParams

DEFAULT_MAX_TOKENS = 16


async def completions(context: Context, body: CompletionRequest, http: HttpRequest) -> Response:
    """Continue prompts, at once or as a stream."""
    context.check_model(body.model)
    check_supported(body)
    log_unknown(body.model_extra, context.unknown_fields)
    job = await _admit(context, body)
    header = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": context.model_name,
    }
    if body.stream:
        chunks = _chunks(job, header, body, http.scope[REQUEST_ID])
        return EventStream(chunks, on_close=job.answers.close)
    try:
        await or_gone(http.receive, job.answers.finish())
    finally:
        job.answers.close()
    choices = [_choice(job, i, body) for i in range(len(job.answers.processors))]
    response = {**header, "choices": choices, "usage": job.usage()}
    return Response(to_json(response), media_type="application/json")


@dataclass
class _Job:
    """The answers to all prompts, prompt by prompt, and what the client wants to see of them.

    `only_echo` is true for max_tokens 0, which scores a prompt: one token is generated, since the
    engine has to, but not shown.
    """

    answers: Answers
    prompt_texts: list[str]
    n: int
    only_echo: bool = False
    offsets: dict[int, int] = field(default_factory=dict)  # characters sent so far, by answer

    def prompt_of(self, index: int) -> str:
        return self.prompt_texts[index // self.n]

    def usage(self) -> dict[str, Any]:
        firsts = self.answers.processors[:: self.n]
        num_generated = sum(len(answer.token_ids) for answer in self.answers.processors)
        return usage(firsts, 0 if self.only_echo else num_generated)


async def _admit(context: Context, body: CompletionRequest) -> _Job:
    prompts = prompts_of(body.prompt)
    sampling = _sampling(context, body)
    only_echo = body.max_tokens == 0 and bool(body.echo)
    if only_echo:
        sampling = replace(sampling, max_tokens=1, min_tokens=0)
    sampling = check_sampling(context.without_words(sampling), context.limits)
    check_num_answers(len(prompts), sampling.n)
    grammar = await context.compile(form_of(body))
    requests: list[Request] = []
    texts: list[str] = []
    for i, prompt in enumerate(prompts):
        param = f"prompt.{i}" if len(prompts) > 1 else "prompt"
        ids = prompt
        if isinstance(prompt, str):
            add_special_tokens = body.add_special_tokens is not False
            ids = await context.encode(prompt, add_special_tokens=add_special_tokens)
        if body.truncate_prompt_tokens is not None and isinstance(ids, list):
            ids = context.truncated(ids, body.truncate_prompt_tokens)
        group = context.requests(uuid.uuid4().hex, ids, sampling, body, param, grammar)  # pyright: ignore[reportArgumentType]
        requests += group
        if isinstance(prompt, str):
            texts.append(prompt)
        else:
            texts.append(context.tokenizer.decode(group[0].prompt_ids, False) if body.echo else "")
    return _Job(await context.submit(requests), texts, sampling.n, only_echo)


def _sampling(context: Context, body: CompletionRequest) -> SamplingParams:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is only supported if it equals n", param="best_of")
    sampling = sampling_of(
        body,
        context.tokenizer.generation_config,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None and sampling.prompt_logprobs is None:
        sampling = replace(sampling, prompt_logprobs=body.logprobs)
    return sampling


def _choice(job: _Job, index: int, body: CompletionRequest) -> dict[str, Any]:
    answer = job.answers.processors[index]
    prompt = job.prompt_of(index) if body.echo else ""
    logprobs = _Logprobs(as_ids=bool(body.return_tokens_as_token_ids))
    if body.echo:
        logprobs.add_prompt(answer)
    if not job.only_echo:
        logprobs.add(answer.logprobs)
    choice = {
        "index": index,
        "text": prompt if job.only_echo else prompt + answer.text,
        "logprobs": None if body.logprobs is None else logprobs.body(),
        "finish_reason": "length" if job.only_echo else answer.finish_reason,
        "stop_reason": None if job.only_echo else answer.stop_reason,
    }
    if body.prompt_logprobs is not None and answer.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [
            None if entry is None else prompt_logprobs_entry(entry)
            for entry in answer.prompt_logprobs
        ]
    if body.return_token_ids:
        choice["prompt_token_ids"] = list(answer.request.prompt_ids)
        choice["token_ids"] = [] if job.only_echo else answer.token_ids
    return choice


async def _chunks(
    job: _Job, header: dict[str, Any], body: CompletionRequest, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The stream's events; see `chat` for errors."""
    null_usage = {"usage": None} if body.include_usage else {}
    try:
        async for index, delta in job.answers.deltas():
            choice = _chunk_choice(job, index, delta, body)
            usage_now = {"usage": job.usage()} if body.continuous_usage else null_usage
            yield sse({**header, "choices": [choice], **usage_now})
        if body.include_usage:
            yield sse({**header, "choices": [], "usage": job.usage()})
    except Exception as error:
        yield b"data: " + from_exception(error, request_id).json() + b"\n\n"
    finally:
        job.answers.close()
    yield DONE


def _chunk_choice(
    job: _Job, index: int, delta: OutputDelta, body: CompletionRequest
) -> dict[str, Any]:
    is_first = index not in job.offsets
    logprobs = _Logprobs(job.offsets.get(index, 0), as_ids=bool(body.return_tokens_as_token_ids))
    text = "" if job.only_echo else delta.text
    if is_first and body.echo:
        logprobs.add_prompt(job.answers.processors[index])
        text = job.prompt_of(index) + text
    if not job.only_echo:
        logprobs.add(delta.logprobs)
    job.offsets[index] = logprobs.offset
    finish_reason = delta.finish_reason
    choice = {
        "index": index,
        "text": text,
        "logprobs": None if body.logprobs is None else logprobs.body(),
        "finish_reason": "length" if job.only_echo and finish_reason else finish_reason,
        "stop_reason": None if job.only_echo else delta.stop_reason,
    }
    if body.return_token_ids:
        if is_first:
            choice["prompt_token_ids"] = list(job.answers.processors[index].request.prompt_ids)
        choice["token_ids"] = [] if job.only_echo else list(delta.token_ids)
    return choice


class _Logprobs:
    """OpenAI's old format: parallel lists over tokens. `offset` counts characters so far."""

    def __init__(self, offset: int = 0, *, as_ids: bool = False):
        self.offset = offset
        self._as_ids = as_ids
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._text_offsets: list[int] = []

    def add_prompt(self, answer: OutputProcessor) -> None:
        """The prompt's tokens; the first has no log-probability, since nothing precedes it."""
        for i, entry in enumerate(answer.prompt_logprobs or ()):
            if entry is None:
                self._append(answer.prompt_token(i), None, None)
            else:
                self.add((entry,))

    def add(self, entries: Sequence[PositionLogprobs]) -> None:
        for entry in entries:
            names = {token_name(token, self._as_ids): token for token in reversed(entry.top)}
            top = {name: finite(token.logprob) for name, token in names.items()}
            if entry.top:
                name = token_name(entry.token, self._as_ids)
                top.setdefault(name, finite(entry.token.logprob))
            self._append(entry.token, finite(entry.token.logprob), top)

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._text_offsets,
        }

    def _append(
        self, token: TokenText, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        self._tokens.append(token_name(token, self._as_ids))
        self._token_logprobs.append(logprob)
        self._top_logprobs.append(top)
        self._text_offsets.append(self.offset)
        self.offset += len(token.text)
