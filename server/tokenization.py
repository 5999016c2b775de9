"""POST /tokenize and /detokenize, with vLLM's fields: what the tokenizer makes of a text."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.sampling_bounds import check_token_ids
from jaxserve.server.chat import encode
from jaxserve.server.context import Context
from jaxserve.server.openai import ChatCompletionRequest, TokenIdsField, log_unknown
from jaxserve.server.streaming import to_json


class TokenizeRequest(BaseModel):
    """Either a `prompt`, or `messages` with what a chat request may say about its template."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: TokenIdsField = None


async def tokenize(context: Context, body: TokenizeRequest) -> Response:
    """The token ids of a text, or of a conversation."""
    context.check_model(body.model)
    log_unknown(body.model_extra, context.unknown_fields)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("expected either prompt or messages", param="prompt")
    if body.messages is not None:
        chat = ChatCompletionRequest(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            add_special_tokens=body.add_special_tokens,
            tools=body.tools,  # pyright: ignore[reportCallIssue]
        )
        token_ids = await encode(context, chat)
    else:
        assert body.prompt is not None
        token_ids = await context.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    names = context.tokenizer.token_names(token_ids) if body.return_token_strs else None
    response = {
        "count": len(token_ids),
        "max_model_len": context.limits.max_model_len,
        "tokens": token_ids,
        "token_strs": names,
    }
    return Response(to_json(response), media_type="application/json")


def tokenizer_info(context: Context) -> Response:
    """What clients that render chats themselves ask: special tokens, the chat template, limits."""
    tokenizer = context.tokenizer
    response = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token")),
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": context.limits.max_model_len,
    }
    return Response(to_json(response), media_type="application/json")


async def detokenize(context: Context, body: DetokenizeRequest) -> Response:
    """The text of token ids, special tokens included."""
    context.check_model(body.model)
    log_unknown(body.model_extra, context.unknown_fields)
    token_ids = check_token_ids(body.tokens, "tokens", context.limits.vocab_size)
    text = context.tokenizer.decode(token_ids, skip_special_tokens=False)
    return Response(to_json({"prompt": text}), media_type="application/json")
