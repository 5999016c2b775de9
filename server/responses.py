"""/v1/responses: OpenAI's newer API over the same conversations as chat.

A response is asked for as a chat with one answer, and told as items. What is stored may be asked
for again, and gone on from.
"""

import hashlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.answers import Answers
from jaxserve.server.chat import admit
from jaxserve.server.context import Context
from jaxserve.server.errors import from_exception
from jaxserve.server.guard import REQUEST_ID
from jaxserve.server.openai import (
    ChatCompletionRequest,
    SamplingFields,
    check_supported,
    log_unknown,
    usage,
)
from jaxserve.server.parts import PieceReader
from jaxserve.server.response_events import Event, OutputItems
from jaxserve.server.response_items import (
    as_items,
    chat_response_format,
    chat_tool_choice,
    chat_tools,
    messages_of,
)
from jaxserve.server.response_store import StoredResponse
from jaxserve.server.streaming import EventStream, named_event, or_gone, to_json
from jaxserve.types import FinishReason

LOGPROBS = "message.output_text.logprobs"
REFUSED = {"background": (None, False), "conversation": (None,), "prompt": (None,)}
"""Fields that would change what happens and are not supported, with the values that ask for
nothing."""


class _Reasoning(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(SamplingFields):
    """`input` is a text or a list of items; sampling has vLLM's fields beside OpenAI's."""

    input: Any = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: _Reasoning | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """A response on its way."""

    body: ResponsesRequest
    chat: ChatCompletionRequest
    answers: Answers
    reader: PieceReader
    input_items: list[Any]
    history: list[Any]
    owner: str
    response_id: str
    created_s: float
    model_name: str


async def responses(context: Context, body: ResponsesRequest, http: HttpRequest) -> Response:
    """Answer, at once or as a stream of events."""
    context.check_model(body.model)
    _check(body)
    log_unknown(body.model_extra, context.unknown_fields)
    job = await _admit(context, body, owner_of(http))
    output = OutputItems()
    if body.stream:
        events = _events(context, job, output, http.scope[REQUEST_ID])
        return EventStream(events, on_close=job.answers.close)

    async def collect() -> dict[str, Any]:
        async for pieces in job.reader.pieces():
            for _ in output.add(pieces):
                pass
        return _finish(context, job, output)[-1]["response"]

    try:
        response = await or_gone(http.receive, collect())
    finally:
        job.answers.close()
    return Response(to_json(response), media_type="application/json")


def get_response(context: Context, response_id: str, http: HttpRequest) -> Response:
    """A stored response."""
    stored = context.responses.get(response_id, owner_of(http))
    return Response(to_json(stored.response), media_type="application/json")


def delete_response(context: Context, response_id: str, http: HttpRequest) -> Response:
    """Forget a stored response."""
    context.responses.delete(response_id, owner_of(http))
    told = {"id": response_id, "object": "response", "deleted": True}
    return Response(to_json(told), media_type="application/json")


def list_input_items(context: Context, response_id: str, http: HttpRequest) -> Response:
    """What a stored response was an answer to, the newest item first."""
    stored = context.responses.get(response_id, owner_of(http))
    items = [
        {"id": f"item_{response_id[5:21]}_{i}", "type": "message", **item}
        for i, item in enumerate([*stored.history, *stored.input_items])
        if isinstance(item, dict)
    ][::-1]
    ids = [item["id"] for item in items]
    told = {"object": "list", "data": items, "has_more": False}
    told |= {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return Response(to_json(told), media_type="application/json")


def owner_of(http: HttpRequest) -> str:
    """Whose responses a client may see: those that were made with its own key."""
    return hashlib.sha256(http.headers.get("authorization", "").encode()).hexdigest()


def _check(body: ResponsesRequest) -> None:
    check_supported(body)
    extra = body.model_extra or {}
    for name, harmless in REFUSED.items():
        if extra.get(name) not in harmless:
            raise RequestError(
                f"{name} is not supported; leave it out", param=name, code="unsupported"
            )
    if body.n not in (None, 1):
        raise RequestError(f"n is {body.n}; a response has one answer", param="n")


async def _admit(context: Context, body: ResponsesRequest, owner: str) -> _Job:
    history: list[Any] = []
    if body.previous_response_id is not None:
        name = "previous_response_id"
        history = context.responses.get(body.previous_response_id, owner, name).conversation
    items = as_items(body.input)
    chat = _as_chat(body, [*history, *items])
    try:
        answers = await admit(context, chat)
    except RequestError as error:
        raise _renamed(error) from error
    return _Job(
        body,
        chat,
        answers,
        PieceReader(answers),
        items,
        history,
        owner,
        response_id=f"resp_{uuid.uuid4().hex}",
        created_s=int(time.time()),
        model_name=context.model_name,
    )


def _as_chat(body: ResponsesRequest, items: list[Any]) -> ChatCompletionRequest:
    """The chat request that gets the same answer."""
    tools = chat_tools(body.tools or [])
    choice = chat_tool_choice(body.tool_choice, tools)
    fields: dict[str, Any] = {
        name: getattr(body, name)
        for name in SamplingFields.model_fields
        if name not in ("stream", "stream_options") and getattr(body, name) is not None
    }
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if LOGPROBS in (body.include or ()) or body.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if tools:
        fields["tools"] = tools
        fields["parallel_tool_calls"] = body.parallel_tool_calls is not False
        if choice is not None:
            fields["tool_choice"] = choice
    if (response_format := chat_response_format(body.text)) is not None:
        fields["response_format"] = response_format
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.chat_template_kwargs is not None:
        fields["chat_template_kwargs"] = body.chat_template_kwargs
    return ChatCompletionRequest(messages=messages_of(items, body.instructions), **fields)


def _renamed(error: RequestError) -> RequestError:
    """An error about the chat request, about the fields that the client sent."""
    param = error.param
    if param is not None and param.split(".")[0] == "messages":
        param = "input"
    elif param in ("max_tokens", "max_completion_tokens"):
        param = "max_output_tokens"
    return RequestError(str(error), param=param, code=error.code)


async def _events(
    context: Context, job: _Job, output: OutputItems, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The stream's events. An error in the middle is an event too: the status is long sent."""
    try:
        begun = _response(job, "in_progress", [])
        for kind in ("response.created", "response.in_progress"):
            yield named_event(output.numbered(kind, response=begun))
        async for pieces in job.reader.pieces():
            for event in output.add(pieces):
                yield named_event(event)
        for event in _finish(context, job, output):
            yield named_event(event)
    except Exception as error:
        told = from_exception(error, request_id)
        failed = _response(job, "failed", output.items)
        failed["error"] = {"code": "server_error", "message": told.message}
        yield named_event(output.numbered("response.failed", response=failed))
    finally:
        job.answers.close()


def _finish(context: Context, job: _Job, output: OutputItems) -> list[Event]:
    """The last events; the very last one has the response, which is stored."""
    (answer,) = job.answers.processors
    is_cut = answer.finish_reason is FinishReason.LENGTH
    status = "incomplete" if is_cut else "completed"
    events = list(output.finish(status))
    response = _response(job, status, output.items)
    if is_cut:
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    else:
        response["completed_at"] = int(time.time())
    response["usage"] = _usage(job)
    if job.body.store is not False:
        stored = StoredResponse(response, job.input_items, job.history, job.owner)
        context.responses.put(stored)
    return [*events, output.numbered(f"response.{status}", response=response)]


def _usage(job: _Job) -> dict[str, Any]:
    (answer,) = job.answers.processors
    counted = usage([answer], len(answer.token_ids))
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {**counted["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": job.reader.num_reasoning_tokens},
        "total_tokens": counted["total_tokens"],
    }


def _response(job: _Job, status: str, output: list[Any]) -> dict[str, Any]:
    """The response object; what the client left out is as it was used."""
    body, sampling = job.body, job.answers.processors[0].request.sampling
    return {
        "id": job.response_id,
        "object": "response",
        "created_at": job.created_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": job.model_name,
        "output": list(output),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": (body.reasoning or _Reasoning()).model_dump(),
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": (body.model_extra or {}).get("user"),
    }
