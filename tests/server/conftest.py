"""A server over the fake engine, without a socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from jaxserve.server.app import create_app
from tests.fake_engine import FakeEngine

Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """What a server does around an app: start it up, shut it down."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan"}, messages.get, replies.put))
    await messages.put({"type": "lifespan.startup"})
    assert (await replies.get())["type"] == "lifespan.startup.complete"
    yield
    await messages.put({"type": "lifespan.shutdown"})
    assert (await replies.get())["type"] == "lifespan.shutdown.complete"
    await task


@asynccontextmanager
async def serving(engine: FakeEngine, **client: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of a server over `engine`, for as long as the block lasts."""
    app: Any = create_app(engine)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with lifespan(app):
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=20, **client
        ) as http:
            yield http


@pytest.fixture
def serve() -> Serve:
    return serving


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the server does."""
    return "asyncio"
