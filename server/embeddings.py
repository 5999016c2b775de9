"""POST /v1/embeddings: hidden states after the model's final norm, pooled over each input.

The engine ends such a request after its prompt. Inputs are admitted a wave at a time, so that a
long list of them does not fill the queue.
"""

import base64
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.outputs import OutputProcessor
from jaxserve.requests import check_dimensions, make_pooling_request
from jaxserve.results import embedding_of
from jaxserve.server.context import Context
from jaxserve.server.openai import PromptField, log_unknown, prompts_of
from jaxserve.server.streaming import or_gone, to_json
from jaxserve.types import Request

MAX_INPUTS = 2048
"""OpenAI's bound."""
WAVE = 64
"""Inputs that are with the engine at once."""

ENCODINGS = ("float", "base64")


class EmbeddingRequest(BaseModel):
    """`input` is a text, token ids, or a list of either; `messages` a conversation instead."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    input: PromptField = None
    messages: list[dict[str, Any]] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    pooling: str | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    cache_no_store: bool | None = None
    priority: int | None = None


async def embeddings(context: Context, body: EmbeddingRequest, http: HttpRequest) -> Response:
    """Embed all inputs."""
    context.check_model(body.model)
    log_unknown(body.model_extra, context.unknown_fields)
    encoding = body.encoding_format or "float"
    if encoding not in ENCODINGS:
        raise RequestError(
            f"encoding_format is {encoding[:60]!r}; expected one of {', '.join(ENCODINGS)}",
            param="encoding_format",
        )
    dimensions = check_dimensions(body.dimensions, context.limits)
    requests = await _requests(context, body)
    normalize = body.normalize is not False

    async def embed() -> list[Any]:
        data = []
        async with aclosing(_processed(context, requests)) as processors:
            async for processor in processors:
                vector = embedding_of(processor, normalize=normalize, dimensions=dimensions)
                data.append(encoded(vector, encoding))
        return data

    vectors = await or_gone(http.receive, embed())
    num_tokens = sum(len(request.prompt_ids) for request in requests)
    response = {
        "id": f"embd-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": context.model_name,
        "data": [
            {"object": "embedding", "index": i, "embedding": vector}
            for i, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return Response(to_json(response), media_type="application/json")


def encoded(vector: np.ndarray, encoding: str) -> Any:
    """An embedding as a list of numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


async def _requests(context: Context, body: EmbeddingRequest) -> list[Request]:
    requests = []
    prompts = await _prompts(context, body)
    for i, ids in enumerate(prompts):
        if isinstance(ids, list):
            ids = context.truncated(ids, body.truncate_prompt_tokens)
        requests.append(
            make_pooling_request(
                uuid.uuid4().hex,
                ids,
                context.limits,
                pooling=body.pooling or "last",
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
                no_store=bool(body.cache_no_store),
                param=f"input.{i}" if len(prompts) > 1 else "input",
            )
        )
    return requests


async def _prompts(context: Context, body: EmbeddingRequest) -> list[list[int]]:
    if body.messages is not None:
        if body.input is not None:
            raise RequestError("input and messages exclude each other", param="messages")
        return [await context.encode_chat(body.messages, False, {})]
    add_special_tokens = body.add_special_tokens is not False
    return [
        await context.encode(prompt, add_special_tokens=add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts_of(body.input, param="input", most=MAX_INPUTS)
    ]


async def _processed(
    context: Context, requests: Sequence[Request]
) -> AsyncGenerator[OutputProcessor, None]:
    """The finished requests, in order; what is not finished is aborted when this is closed."""
    for start in range(0, len(requests), WAVE):
        answers = await context.submit(requests[start : start + WAVE])
        try:
            await answers.finish()
        finally:
            answers.close()
        for processor in answers.processors:
            yield processor
