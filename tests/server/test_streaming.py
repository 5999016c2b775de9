"""A response that is streamed, with the server's side of the connection played by hand."""

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

from jaxserve.server.streaming import EventStream


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
