"""A response that is streamed, with the server's side of the connection played by hand."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from jaxserve.server.app import create_app
from jaxserve.server.streaming import EventStream
from tests.fake_engine import FakeEngine
from tests.server.conftest import lifespan

USER = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/messages": {"messages": USER, "max_tokens": 3000},
    "/v1/responses": {"input": "Hello"},
}


def test_a_connection_that_breaks_while_a_chunk_is_sent_closes_the_chunks():
    async def main() -> list[str]:
        seen: list[str] = []

        async def chunks() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"data: x\n\n"
            finally:
                seen.append("closed")

        async def receive() -> MutableMapping[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError("the client says nothing")

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body":
                raise OSError("broken pipe")

        held = chunks()  # so that only the response can close it
        await EventStream(held)({"type": "http"}, receive, send)
        return list(seen)

    assert asyncio.run(main()) == ["closed"]


@pytest.mark.parametrize("path", BODIES)
def test_a_connection_that_breaks_before_the_stream_begins_ends_its_requests(path: str):
    engine = FakeEngine(max_model_len=5000, step_s=0.001)
    engine.reply = lambda request: [40] * 3000
    body = json.dumps(BODIES[path] | {"stream": True}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> MutableMapping[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        raise OSError("broken pipe")

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }

    async def main() -> None:
        app: Any = create_app(engine)
        async with lifespan(app):
            with contextlib.suppress(OSError):
                await app(scope, receive, send)
            while engine.has_work or not engine.added:
                await asyncio.sleep(0.01)
            assert len(engine.aborted) == 1

    asyncio.run(main())
