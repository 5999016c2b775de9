"""/v1/messages: Anthropic's API over the same conversations as chat, and counting their tokens."""

import json
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.answers import Answers
from jaxserve.server.anthropic import error_body
from jaxserve.server.chat import admit, encode
from jaxserve.server.context import Context
from jaxserve.server.errors import from_exception
from jaxserve.server.guard import REQUEST_ID
from jaxserve.server.message_blocks import chat_messages, chat_tool_choice, chat_tools
from jaxserve.server.openai import ChatCompletionRequest, log_unknown
from jaxserve.server.parts import Part, Piece, PieceReader, part_of
from jaxserve.server.streaming import EventStream, named_event, or_gone, to_json
from jaxserve.types import FinishReason

RENAMED = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}
"""Fields of the chat request, as Anthropic's clients call them."""

COPIED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "cache_salt")
EXTRA_COPIED = ("cache_no_store", "priority", "ignore_eos", "min_tokens", "chat_template_kwargs")
SILENT = frozenset({"metadata", "service_tier", "cache_control", "container", "betas", "speed"})


class CountTokensRequest(BaseModel):
    """A conversation whose tokens are counted."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    messages: list[Any]
    system: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """Anthropic's fields, and some of vLLM's under their names."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    cache_salt: str | None = None
    cache_no_store: bool | None = None
    priority: int | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None


async def messages(context: Context, body: MessagesRequest, http: HttpRequest) -> Response:
    """Answer, at once or as a stream of events."""
    context.check_model(body.model)
    extra = {name: value for name, value in (body.model_extra or {}).items() if name not in SILENT}
    log_unknown(extra, context.unknown_fields)
    try:
        answers = await admit(context, _as_chat(body))
    except RequestError as error:
        raise _renamed(error) from error
    message_id = f"msg_{uuid.uuid4().hex}"
    if body.stream:
        events = _events(context, message_id, answers, http.scope[REQUEST_ID])
        return EventStream(events, on_close=answers.close)
    try:
        parts = await or_gone(http.receive, _collect(answers))
    finally:
        answers.close()
    message = _message(context, message_id, answers) | {
        "content": [_block(part) for part in parts],
        **_stop(answers, parts),
    }
    return Response(to_json(message), media_type="application/json")


async def count_tokens(context: Context, body: CountTokensRequest) -> Response:
    """How many tokens a conversation has."""
    context.check_model(body.model)
    try:
        token_ids = await encode(context, _as_chat(body))
    except RequestError as error:
        raise _renamed(error) from error
    return Response(to_json({"input_tokens": len(token_ids)}), media_type="application/json")


def _as_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """The chat request that gets the same answer; a last message of the model is gone on with."""
    fields: dict[str, Any] = {}
    for name in (*COPIED, *EXTRA_COPIED):
        if (value := getattr(body, name, None)) is not None:
            fields[name] = value
    if isinstance(body, MessagesRequest):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
    if body.tools:
        fields |= {"tools": chat_tools(body.tools), **chat_tool_choice(body.tool_choice)}
    wanted = (body.output_config or {}).get("format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        schema = {"name": "answer", "schema": wanted.get("schema"), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.thinking is not None and "chat_template_kwargs" not in fields:
        thinks = body.thinking.get("type") in ("enabled", "adaptive")
        fields["chat_template_kwargs"] = {"enable_thinking": thinks}
    conversation = chat_messages(body.messages, body.system)
    last = conversation[-1] if conversation else {}
    if last.get("role") == "assistant" and last.get("content") and not last.get("tool_calls"):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return ChatCompletionRequest(messages=conversation, **fields)


def _renamed(error: RequestError) -> RequestError:
    """An error about the chat request, about the fields that the client sent."""
    param = error.param
    if param is not None:
        first, dot, rest = param.partition(".")
        param = RENAMED.get(first, first) + dot + rest
    return RequestError(str(error), param=param, code=error.code)


async def _collect(answers: Answers) -> list[Part]:
    parts: list[Part] = []
    async for pieces in PieceReader(answers).pieces():
        for piece in pieces:
            if not parts or not parts[-1].holds(piece):
                parts.append(part_of(piece))
            parts[-1].add(piece)
    return parts


async def _events(
    context: Context, message_id: str, answers: Answers, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The stream's events. An error in the middle is an event too: the status is long sent."""
    blocks = _Blocks()
    try:
        message = _message(context, message_id, answers)
        yield named_event({"type": "message_start", "message": message})
        yield named_event({"type": "ping"})
        async for pieces in PieceReader(answers).pieces():
            for event in blocks.add(pieces):
                yield named_event(event)
        for event in blocks.end():
            yield named_event(event)
        delta = _stop(answers, blocks.parts)
        usage = _usage(answers)
        yield named_event({"type": "message_delta", "delta": delta, "usage": usage})
        yield named_event({"type": "message_stop"})
    except Exception as error:
        told = from_exception(error, request_id)
        yield named_event(error_body(told.status, told.message, request_id))
    finally:
        answers.close()


class _Blocks:
    """The content blocks of a stream, one after the other."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._is_open = False

    def add(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        """Take in pieces; returns the events that tell of them."""
        events: list[dict[str, Any]] = []
        for piece in pieces:
            if not self._is_open or not self.parts[-1].holds(piece):
                events += self.end()
                self.parts.append(part_of(piece))
                self._is_open = True
                block = _block(self.parts[-1])
                events.append(self._event("content_block_start", content_block=block))
            self.parts[-1].add(piece)
            if piece.text:
                events.append(self._event("content_block_delta", delta=_delta(piece)))
        return events

    def end(self) -> list[dict[str, Any]]:
        """The open block is complete."""
        if not self._is_open:
            return []
        self._is_open = False
        return [self._event("content_block_stop")]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "index": len(self.parts) - 1, **fields}


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.kind == "call":
        return {"type": "input_json_delta", "partial_json": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "text_delta", "text": piece.text}


def _block(part: Part) -> dict[str, Any]:
    if part.kind == "call":
        arguments = _arguments(part.text)
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": arguments}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}


def _arguments(text: str) -> dict[str, Any]:
    """Arguments of a call; those that max_tokens cut off are none."""
    try:
        arguments = json.loads(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _message(context: Context, message_id: str, answers: Answers) -> dict[str, Any]:
    """The message as far as it is known, without content."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": context.model_name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(answers),
    }


def _stop(answers: Answers, parts: list[Part]) -> dict[str, Any]:
    (answer,) = answers.processors
    reason, sequence = "end_turn", None
    if answer.finish_reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif isinstance(answer.stop_reason, str):
        reason, sequence = "stop_sequence", answer.stop_reason
    elif any(part.kind == "call" for part in parts):
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(answers: Answers) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart from the other tokens of the prompt."""
    (answer,) = answers.processors
    num_cached = answer.num_cached_tokens
    return {
        "input_tokens": len(answer.request.prompt_ids) - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": len(answer.token_ids),
    }
