"""The HTTP routes over one engine. Routes only: what they do is in `chat` and `completions`.

create_app(engine) -> ASGI app; the engine runs from start-up to shut-down of the app.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import jaxserve
from jaxserve.errors import EngineDeadError, RequestError, StoreError
from jaxserve.llm import EngineLike
from jaxserve.server.admin import add_admin_routes
from jaxserve.server.anthropic import AnthropicFront
from jaxserve.server.chat import chat_completions
from jaxserve.server.completions import completions
from jaxserve.server.context import Context
from jaxserve.server.embeddings import EmbeddingRequest, embeddings
from jaxserve.server.errors import ApiError, from_exception, from_validation, unavailable
from jaxserve.server.guard import REQUEST_ID, App, Guard
from jaxserve.server.messages import (
    CountTokensRequest,
    MessagesRequest,
    count_tokens,
    messages,
)
from jaxserve.server.metrics import METRICS_TYPE
from jaxserve.server.openai import ChatCompletionRequest, CompletionRequest
from jaxserve.server.page import add_page_routes
from jaxserve.server.responses import (
    ResponsesRequest,
    delete_response,
    get_response,
    list_input_items,
    responses,
)
from jaxserve.server.streaming import ClientGoneError
from jaxserve.server.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499


def create_app(engine: EngineLike) -> App:
    """An ASGI app that serves `engine`, and owns it from its start-up on.

    Its API key and admin key are those in the engine's config.
    """
    server = engine.config.server
    guard = Guard(_routes(engine), api_key=server.api_key, admin_key=server.admin_key)
    return AnthropicFront(guard)


def _routes(engine: EngineLike) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.context = context = Context.of_engine(engine)
        yield
        context.live.close()
        await context.bridge.stop()

    app = FastAPI(
        title="jaxserve",
        version=jaxserve.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _handle_errors(app)

    def context_of(request: Request) -> Context:
        return request.app.state.context

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health(request: Request) -> Response:
        if context_of(request).bridge.error is not None:
            return unavailable().response()
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        model = _model(context_of(request))
        return {
            "object": "list",
            "data": [model],
            "has_more": False,
            "first_id": model["id"],
            "last_id": model["id"],
        }

    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> dict[str, Any]:
        context_of(request).check_model(name)
        return _model(context_of(request))

    @app.post("/v1/completions", response_model=None)
    async def post_completions(body: CompletionRequest, request: Request) -> Response:
        context = context_of(request)
        if context.bridge.error is not None:
            return unavailable().response()
        return await completions(context, body, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def post_chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        context = context_of(request)
        if context.bridge.error is not None:
            return unavailable().response()
        return await chat_completions(context, body, request)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(await context_of(request).metrics(), media_type=METRICS_TYPE)

    add_page_routes(app, context_of)
    _add_other_apis(app, context_of)
    _add_small_routes(app, context_of)

    if engine.config.server.admin_key is not None:
        add_admin_routes(app, context_of)
    return app


def _add_other_apis(app: FastAPI, context_of: Callable[[Request], Context]) -> None:
    """OpenAI's responses and Anthropic's messages."""

    @app.post("/v1/responses", response_model=None)
    async def post_responses(body: ResponsesRequest, request: Request) -> Response:
        return await responses(context_of(request), body, request)

    @app.get("/v1/responses/{response_id}", response_model=None)
    async def get_stored(response_id: str, request: Request) -> Response:
        return get_response(context_of(request), response_id, request)

    @app.delete("/v1/responses/{response_id}", response_model=None)
    async def delete_stored(response_id: str, request: Request) -> Response:
        return delete_response(context_of(request), response_id, request)

    @app.get("/v1/responses/{response_id}/input_items", response_model=None)
    async def get_input_items(response_id: str, request: Request) -> Response:
        return list_input_items(context_of(request), response_id, request)

    @app.post("/v1/messages", response_model=None)
    async def post_messages(body: MessagesRequest, request: Request) -> Response:
        return await messages(context_of(request), body, request)

    @app.post("/v1/messages/count_tokens", response_model=None)
    async def post_count_tokens(body: CountTokensRequest, request: Request) -> Response:
        return await count_tokens(context_of(request), body)


def _add_small_routes(app: FastAPI, context_of: Callable[[Request], Context]) -> None:
    """Embeddings, the tokenizer, and what load balancers ask."""

    @app.post("/v1/embeddings", response_model=None)
    async def post_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await embeddings(context_of(request), body, request)

    @app.post("/tokenize", response_model=None)
    async def post_tokenize(body: TokenizeRequest, request: Request) -> Response:
        return await tokenize(context_of(request), body)

    @app.post("/detokenize", response_model=None)
    async def post_detokenize(body: DetokenizeRequest, request: Request) -> Response:
        return await detokenize(context_of(request), body)

    @app.get("/tokenizer_info", response_model=None)
    async def get_tokenizer_info(request: Request) -> Response:
        return tokenizer_info(context_of(request))

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": jaxserve.__version__}

    @app.get("/load")
    async def load(request: Request) -> dict[str, int]:
        return {"server_load": context_of(request).bridge.num_live}


def _model(context: Context) -> dict[str, Any]:
    """The model as OpenAI's, vLLM's and Anthropic's clients know it."""
    created = datetime.fromtimestamp(context.created_s, UTC)
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "jaxserve",
        "root": context.model_name,
        "parent": None,
        "max_model_len": context.limits.max_model_len,
        "type": "model",
        "display_name": context.model_name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
    }


def _handle_errors(app: FastAPI) -> None:
    """Make every failure an OpenAI error; FastAPI's own 422 becomes 400."""

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return from_exception(error, request.scope[REQUEST_ID]).response()

    @app.exception_handler(StoreError)
    async def store_error(request: Request, error: StoreError) -> Response:
        return from_exception(error, request.scope[REQUEST_ID]).response()

    @app.exception_handler(EngineDeadError)
    async def engine_dead(request: Request, error: EngineDeadError) -> Response:
        return from_exception(error, request.scope[REQUEST_ID]).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return ApiError(
            error.status_code,
            error.detail if error.status_code in (400, 413) else message,
            headers=error.headers or {},
        ).response()

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        request_id = request.scope[REQUEST_ID]
        logger.error("request %s failed", request_id, exc_info=error)
        return from_exception(error, request_id).response()
