"""POST /v1/chat/completions."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.chat_formats import parse_whole
from jaxserve.chat_template import normalise_messages
from jaxserve.conversation import ChatPlan, parse_tool_use
from jaxserve.errors import RequestError
from jaxserve.outputs import OutputDelta, OutputProcessor, PositionLogprobs, TokenText
from jaxserve.server.answers import Answers
from jaxserve.server.context import Context
from jaxserve.server.errors import from_exception
from jaxserve.server.forms import form_of
from jaxserve.server.guard import REQUEST_ID
from jaxserve.server.openai import (
    ChatCompletionRequest,
    check_supported,
    finite,
    log_unknown,
    sampling_of,
    usage,
)
from jaxserve.server.replies import ReplyDelta, ReplyReader, finish_of, reply_fields
from jaxserve.server.streaming import DONE, EventStream, or_gone, sse, to_json

RESERVED_TEMPLATE_NAMES = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "self"}
)
"""What a request says elsewhere; and `self`, which Jinja takes for the template itself."""


async def chat_completions(
    context: Context, body: ChatCompletionRequest, http: HttpRequest
) -> Response:
    """Answer a conversation, at once or as a stream."""
    context.check_model(body.model)
    check_supported(body)
    log_unknown(body.model_extra, context.unknown_fields)
    answers = await admit(context, body)
    header = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": context.model_name,
    }
    if body.stream:
        chunks = _chunks(answers, header, body, http.scope[REQUEST_ID])
        return EventStream(chunks, on_close=answers.close)
    try:
        await or_gone(http.receive, answers.finish())
    finally:
        answers.close()
    return Response(to_json(_whole(answers, header, body)), media_type="application/json")


async def admit(context: Context, body: ChatCompletionRequest) -> Answers:
    """Render, tokenise, check and queue a conversation; /v1/responses and /v1/messages do it so,
    too.

    Raises:
        RequestError: whatever is wrong with it.
    """
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    plan, prompt_ids = await _plan(context, body)
    grammar = await context.grammar_of(plan)
    prompt_ids = context.truncated(prompt_ids, body.truncate_prompt_tokens)
    limit = body.max_completion_tokens
    sampling = sampling_of(
        body,
        context.tokenizer.generation_config,
        max_tokens=body.max_tokens if limit is None else limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    if plan.needs_parser:
        sampling = replace(sampling, skip_special_tokens=False)
    answers = await context.submit(
        context.requests(uuid.uuid4().hex, prompt_ids, sampling, body, "messages", grammar)
    )
    if plan.needs_parser:
        answers.plan = plan
    return answers


async def encode(context: Context, body: ChatCompletionRequest) -> list[int]:
    """The prompt that a conversation makes.

    Raises:
        RequestError: the template cannot render it so.
    """
    return (await _plan(context, body))[1]


async def _plan(context: Context, body: ChatCompletionRequest) -> tuple[ChatPlan, list[int]]:
    kwargs = dict(body.chat_template_kwargs or {})
    if reserved := RESERVED_TEMPLATE_NAMES & kwargs.keys():
        raise RequestError(
            f"chat_template_kwargs may not set {', '.join(sorted(reserved))}",
            param="chat_template_kwargs",
        )
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    if continues:
        kwargs["continue_final_message"] = True
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return await context.plan_chat(
        body.messages,
        use=parse_tool_use(body.tools, body.tool_choice, body.parallel_tool_calls),
        form=form_of(body),
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        template_kwargs=kwargs,
        add_special_tokens=bool(body.add_special_tokens),
    )


def _echoed(body: ChatCompletionRequest) -> str:
    """What `echo` puts before an answer: the text of a last message that is the model's own."""
    last = body.messages[-1]
    is_own = body.echo and last.get("role") == "assistant"
    return normalise_messages([last])[0]["content"] if is_own else ""


def _whole(answers: Answers, header: dict[str, Any], body: ChatCompletionRequest) -> dict[str, Any]:
    response = {
        **header,
        "choices": [
            _choice(answers.plan, i, answer, body) for i, answer in enumerate(answers.processors)
        ],
        "usage": _usage(answers),
    }
    prompt_logprobs = answers.processors[0].prompt_logprobs
    if prompt_logprobs is not None:
        response["prompt_logprobs"] = [
            None if entry is None else prompt_logprobs_entry(entry) for entry in prompt_logprobs
        ]
    if body.return_token_ids:
        response["prompt_token_ids"] = list(answers.processors[0].request.prompt_ids)
    return response


def _choice(
    plan: ChatPlan | None, index: int, answer: OutputProcessor, body: ChatCompletionRequest
) -> dict[str, Any]:
    text = _echoed(body) + answer.text
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish_reason: str | None = answer.finish_reason
    if plan is not None:
        reply = parse_whole(plan.parser(), answer.text)
        message |= reply_fields(plan, reply, body.include_reasoning is not False)
        finish_reason = finish_of(plan, answer.finish_reason, len(reply.calls))
    choice = {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answer.logprobs, body) if body.logprobs else None,
        "finish_reason": finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


async def _chunks(
    answers: Answers, header: dict[str, Any], body: ChatCompletionRequest, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The stream's events. An error in the middle is an event too: the status is long sent."""
    shows = body.include_reasoning is not False
    readers = (
        [ReplyReader(plan, shows) for _ in answers.processors] if (plan := answers.plan) else []
    )
    null_usage = {"usage": None} if body.include_usage else {}
    # A chunk with nothing but text is by far the commonest: all but the text is made once.
    begin = b"data: " + to_json(header)[:-1] + b',"choices":[{"index":'
    end = b'},"logprobs":null,"finish_reason":null}]' + (b',"usage":null' if null_usage else b"")
    end += b"}\n\n"
    is_plain = not (body.return_token_ids or body.continuous_usage)
    started: set[int] = set()
    try:
        async for index, delta in answers.deltas():
            if index not in started:
                started.add(index)
                first = {"index": index, "delta": {"role": "assistant", "content": _echoed(body)}}
                first |= {"logprobs": None, "finish_reason": None}
                extra = null_usage
                if body.return_token_ids:
                    ids = list(answers.processors[index].request.prompt_ids)
                    extra = {"prompt_token_ids": ids, **null_usage}
                yield sse({**header, "choices": [first], **extra})
            if readers:
                for piece in readers[index].read(delta):
                    choice = _piece_choice(index, piece, delta, body)
                    usage_now = {"usage": _usage(answers)} if body.continuous_usage else null_usage
                    yield sse({**header, "choices": [choice], **usage_now})
            elif is_plain and delta.finish_reason is None and not delta.logprobs:
                text = json.dumps(delta.text).encode()
                yield b"%s%d" % (begin, index) + b',"delta":{"content":' + text + end
            else:
                choice = _chunk_choice(index, delta, body)
                usage_now = null_usage
                if body.continuous_usage:
                    usage_now = {"usage": _usage(answers)}
                yield sse({**header, "choices": [choice], **usage_now})
        if body.include_usage:
            yield sse({**header, "choices": [], "usage": _usage(answers)})
    except Exception as error:
        yield b"data: " + from_exception(error, request_id).json() + b"\n\n"
    finally:
        answers.close()
    yield DONE


def _piece_choice(
    index: int, piece: ReplyDelta, delta: OutputDelta, body: ChatCompletionRequest
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "delta": piece.fields,
        "logprobs": _logprobs(piece.logprobs, body) if body.logprobs and piece.logprobs else None,
        "finish_reason": piece.finish_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = list(piece.token_ids)
    if piece.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _chunk_choice(index: int, delta: OutputDelta, body: ChatCompletionRequest) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "delta": {"content": delta.text} if delta.text or delta.logprobs else {},
        "logprobs": _logprobs(delta.logprobs, body) if body.logprobs and delta.logprobs else None,
        "finish_reason": delta.finish_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = list(delta.token_ids)
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _usage(answers: Answers) -> dict[str, Any]:
    num_generated = sum(len(answer.token_ids) for answer in answers.processors)
    return usage(answers.processors[:1], num_generated)


def _logprobs(entries: "Sequence[PositionLogprobs]", body: ChatCompletionRequest) -> dict[str, Any]:
    return {
        "content": chat_logprobs(entries, bool(body.return_tokens_as_token_ids)),
        "refusal": None,
    }


def chat_logprobs(
    entries: "Sequence[PositionLogprobs]", as_ids: bool = False
) -> list[dict[str, Any]]:
    """Log-probabilities in the chat format.

    Args:
        as_ids: name tokens by their ids, as vLLM does it.
    """
    return [
        {
            **_token(entry.token, as_ids),
            "top_logprobs": [_token(token, as_ids) for token in entry.top],
        }
        for entry in entries
    ]


def _token(token: TokenText, as_ids: bool) -> dict[str, Any]:
    return {
        "token": token_name(token, as_ids),
        "logprob": finite(token.logprob),
        "bytes": list(token.token_bytes),
    }


def token_name(token: TokenText, as_ids: bool) -> str:
    """How a token is called: by its text, or `token_id:N`, which tells all tokens apart."""
    return f"token_id:{token.token_id}" if as_ids else token.text


def prompt_logprobs_entry(entry: PositionLogprobs) -> dict[str, Any]:
    """One position of vLLM's `prompt_logprobs`: by token id, the prompt's own token first."""
    ranks = {token.token_id: rank for rank, token in enumerate(entry.top, start=1)}
    return {
        str(token.token_id): {
            "logprob": finite(token.logprob),
            "rank": ranks.get(token.token_id),
            "decoded_token": token.text,
        }
        for token in (entry.token, *entry.top)
    }
