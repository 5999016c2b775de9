"""The HTTP routes over one engine. Routes only: what they do is in `chat` and `completions`.

create_app(engine) -> ASGI app; the engine runs from start-up to shut-down of the app. make_app is
the same for an engine that comes later, and may be in another process.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

import jaxserve
from jaxserve.config import ServerConfig
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
from jaxserve.server.keys import access_of
from jaxserve.server.lifecycle import Lifecycle
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
    """An ASGI app that serves an engine of this process, and owns it from its start-up on.

    Its keys are those in the engine's config.
    """

    async def open_engine(lifecycle: Lifecycle) -> None:
        lifecycle.become_ready(Context.of_engine(engine))

    return make_app(engine.config.server, Lifecycle(), open_engine)


def make_app(
    config: ServerConfig,
    lifecycle: Lifecycle,
    open_engine: Callable[[Lifecycle], Awaitable[None]] | None = None,
) -> App:
    """An ASGI app that serves whatever context its lifecycle gets.

    Args:
        open_engine: awaited at start-up, before anything is served; None: somebody else will see
            to the context, and until then requests get 503.

    Raises:
        ConfigError: a key file that cannot be read.
    """
    access = access_of(config)
    guard = Guard(
        _routes(lifecycle, open_engine, has_admin=access.admin_key is not None),
        access,
        lifecycle,
        request_timeout_s=config.request_timeout_s,
    )
    app = AnthropicFront(guard)
    if not access.origins:
        return app
    return CORSMiddleware(  # pyright: ignore[reportReturnType]
        app,  # pyright: ignore[reportArgumentType]
        allow_origins=access.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _routes(
    lifecycle: Lifecycle,
    open_engine: Callable[[Lifecycle], Awaitable[None]] | None,
    *,
    has_admin: bool,
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if open_engine is not None:
            await open_engine(lifecycle)
        yield
        if lifecycle.context is not None:
            lifecycle.context.live.close()
            await lifecycle.context.bridge.stop()
            lifecycle.context.grammars.close()

    app = FastAPI(
        title="jaxserve",
        version=jaxserve.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _handle_errors(app)

    def context_of(request: Request) -> Context:
        assert lifecycle.context is not None, "the guard lets nobody in before"
        return lifecycle.context

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        told = lifecycle.health()
        if told["status"] == "ok":
            return JSONResponse(told)
        error = unavailable(told["status"])
        return JSONResponse({**told, **error.body()}, 503, dict(error.headers))

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
        return await completions(context_of(request), body, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def post_chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await chat_completions(context_of(request), body, request)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(await context_of(request).metrics(), media_type=METRICS_TYPE)

    add_page_routes(app, context_of)
    _add_other_apis(app, context_of)
    _add_small_routes(app, context_of)

    if has_admin:
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
