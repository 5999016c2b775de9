"""POST /v1/chat/completions."""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.outputs import OutputDelta, OutputProcessor, PositionLogprobs, TokenText
from jaxserve.server.answers import Answers
from jaxserve.server.context import Context
from jaxserve.server.errors import from_exception
from jaxserve.server.guard import REQUEST_ID
from jaxserve.server.openai import (
    ChatCompletionRequest,
    check_supported,
    finite,
    sampling_of,
    usage,
)
from jaxserve.server.streaming import DONE, EventStream, or_gone, sse, to_json

RESERVED_TEMPLATE_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


async def chat_completions(
    context: Context, body: ChatCompletionRequest, http: HttpRequest
) -> Response:
    """Answer a conversation, at once or as a stream."""
    context.check_model(body.model)
    check_supported(body)
    answers = await _admit(context, body)
    header = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": context.model_name,
    }
    if body.stream:
        return EventStream(_chunks(answers, header, body, http.scope[REQUEST_ID]))
    try:
        await or_gone(http.receive, answers.finish())
    finally:
        answers.close()
    return Response(to_json(_whole(answers, header, body)), media_type="application/json")


async def _admit(context: Context, body: ChatCompletionRequest) -> Answers:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    kwargs = dict(body.chat_template_kwargs or {})
    if reserved := RESERVED_TEMPLATE_NAMES & kwargs.keys():
        raise RequestError(
            f"chat_template_kwargs may not set {', '.join(sorted(reserved))}",
            param="chat_template_kwargs",
        )
    add_generation_prompt = body.add_generation_prompt is not False
    prompt_ids = await context.encode_chat(body.messages, add_generation_prompt, kwargs)
    limit = body.max_completion_tokens
    sampling = sampling_of(
        body,
        context.tokenizer.generation_config,
        max_tokens=body.max_tokens if limit is None else limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return await context.submit(
        context.requests(uuid.uuid4().hex, prompt_ids, sampling, body, "messages")
    )


def _whole(answers: Answers, header: dict[str, Any], body: ChatCompletionRequest) -> dict[str, Any]:
    response = {
        **header,
        "choices": [_choice(i, answer, body) for i, answer in enumerate(answers.processors)],
        "usage": _usage(answers),
    }
    prompt_logprobs = answers.processors[0].prompt_logprobs
    if prompt_logprobs is not None:
        response["prompt_logprobs"] = [
            None if entry is None else prompt_logprobs_entry(entry) for entry in prompt_logprobs
        ]
    return response


def _choice(index: int, answer: OutputProcessor, body: ChatCompletionRequest) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": _logprobs(answer.logprobs) if body.logprobs else None,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


async def _chunks(
    answers: Answers, header: dict[str, Any], body: ChatCompletionRequest, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The stream's events. An error in the middle is an event too: the status is long sent."""
    null_usage = {"usage": None} if body.include_usage else {}
    # A chunk with nothing but text is by far the commonest: all but the text is made once.
    begin = b"data: " + to_json(header)[:-1] + b',"choices":[{"index":'
    end = b'},"logprobs":null,"finish_reason":null}]' + (b',"usage":null' if null_usage else b"")
    end += b"}\n\n"
    started: set[int] = set()
    try:
        async for index, delta in answers.deltas():
            if index not in started:
                started.add(index)
                first = {"index": index, "delta": {"role": "assistant", "content": ""}}
                first |= {"logprobs": None, "finish_reason": None}
                yield sse({**header, "choices": [first], **null_usage})
            if delta.finish_reason is None and not delta.logprobs:
                text = json.dumps(delta.text).encode()
                yield b"%s%d" % (begin, index) + b',"delta":{"content":' + text + end
            else:
                choice = _chunk_choice(index, delta, body)
                yield sse({**header, "choices": [choice], **null_usage})
        if body.include_usage:
            yield sse({**header, "choices": [], "usage": _usage(answers)})
    except Exception as error:
        yield b"data: " + from_exception(error, request_id).json() + b"\n\n"
    finally:
        answers.close()
    yield DONE


def _chunk_choice(index: int, delta: OutputDelta, body: ChatCompletionRequest) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "delta": {"content": delta.text} if delta.text or delta.logprobs else {},
        "logprobs": _logprobs(delta.logprobs) if body.logprobs and delta.logprobs else None,
        "finish_reason": delta.finish_reason,
    }
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _usage(answers: Answers) -> dict[str, Any]:
    num_generated = sum(len(answer.token_ids) for answer in answers.processors)
    return usage(answers.processors[:1], num_generated)


def _logprobs(entries: "list[PositionLogprobs] | tuple[PositionLogprobs, ...]") -> dict[str, Any]:
    return {
        "content": [
            {**_token(entry.token), "top_logprobs": [_token(token) for token in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _token(token: TokenText) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": finite(token.logprob),
        "bytes": list(token.token_bytes),
    }


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
