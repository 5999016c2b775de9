"""A client that holds many streams open and reads them as fast as they come. A process of its own.

    python -m bench.streams.client URL STREAMS TOKENS

Speaks HTTP by hand: a real client library would use more processor time than the server it drives.
Prints one JSON line: engine steps between the first token of the last stream and the end of the
first stream, how long they took, and what arrived.
"""

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

STEPS = "jaxserve_steps_total "
PROMPT = "Tell me a short story about a fox who lost a hat, number {}."
END = b"data: [DONE]\n\n"


class Stream(asyncio.Protocol):
    """One streamed answer: counts chunks and reads of the socket, keeps only the last bytes."""

    def __init__(self, index: int, num_tokens: int, host: str):
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.num_chunks = self.num_reads = 0
        self._tail = b""
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": PROMPT.format(index)}],
                "stream": True,
                "max_tokens": num_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
        ).encode()
        self._request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.num_reads += 1
        self.num_chunks += data.count(b"data: {")
        if self.num_chunks > 1:
            self.begun.set()
        self._tail = (self._tail + data)[-40:]
        if END in self._tail:
            self.ended.set()
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.begun.set()
        self.ended.set()


async def steps(http: httpx.AsyncClient) -> int:
    """How many steps the engine has planned."""
    text = (await http.get("/metrics")).text
    return int(float(next(x for x in text.splitlines() if x.startswith(STEPS)).split()[-1]))


async def main(url: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    streams = [Stream(i, num_tokens, parts.netloc) for i in range(num_streams)]
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await steps(http)
        started_s = time.perf_counter()
        for stream in streams:
            await loop.create_connection(
                lambda stream=stream: stream, parts.hostname or "", parts.port or 80
            )
        for stream in streams:
            await stream.begun.wait()
        first, first_s = await steps(http), time.perf_counter()
        begun_chunks = sum(stream.num_chunks for stream in streams)
        await asyncio.wait(
            [asyncio.ensure_future(stream.ended.wait()) for stream in streams],
            return_when=asyncio.FIRST_COMPLETED,
        )
        last, last_s = await steps(http), time.perf_counter()
        num_chunks = sum(stream.num_chunks for stream in streams) - begun_chunks
        for stream in streams:
            await stream.ended.wait()
    return {
        "steps": last - first,
        "window_s": round(last_s - first_s, 3),
        "begin_s": round(first_s - started_s, 3),
        "tokens_per_chunk": round((last - first) * num_streams / max(num_chunks, 1), 3),
        "chunks": sum(stream.num_chunks for stream in streams),
        "reads": sum(stream.num_reads for stream in streams),
    }


if __name__ == "__main__":
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    print(json.dumps(run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
