"""Sends the requests of a batch to an OpenAI server, so many at once, and hands answers on.

A server that is busy (429, 503) is asked again after a while. One that cannot be reached ends the
run: what has no answer is done when the batch is run again. Knows nothing of files.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

from jaxserve.batch_files.lines import BatchLine
from jaxserve.batch_files.output import answered, refused, unanswered
from jaxserve.errors import JaxserveError

BUSY = (429, 503)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
MAX_BODY_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: of the server, without /v1.
        socket: path of a Unix socket to use instead of the network.
        max_busy_s: how long a request is repeated while the server says it is busy.
        max_lost_s: how long the server may be out of reach.
    """

    url: str
    api_key: str | None = None
    socket: str | None = None
    timeout_s: float = 3600.0
    max_busy_s: float = 3600.0
    max_lost_s: float = 30.0

    def connect(self) -> aiohttp.ClientSession:
        if self.socket is None:
            connector: aiohttp.BaseConnector = aiohttp.TCPConnector(limit=0)
        else:
            connector = aiohttp.UnixConnector(self.socket, limit=0)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        timeout = aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=30)
        return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)


async def run(
    endpoint: Endpoint,
    lines: Iterable[BatchLine],
    max_concurrency: int,
    write: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Answer every line; `write` gets output lines as they are ready, from a thread.

    Raises:
        JaxserveError: the server is out of reach, or `write` failed; other lines may be unanswered.
    """
    ready: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    source = iter(lines)
    async with endpoint.connect() as http:

        async def work() -> None:
            for line in source:  # shared: every worker takes the next line
                await ready.put(await _answer(http, endpoint, line))

        async def work_all() -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(max_concurrency):
                    tasks.create_task(work())

        async def write_all() -> None:
            async for batch in _batches(ready):
                await asyncio.to_thread(write, batch)

        writer = asyncio.create_task(write_all())
        workers = asyncio.create_task(work_all())
        try:
            await asyncio.wait([writer, workers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not workers.done():
                workers.cancel()
            await asyncio.gather(workers, return_exceptions=True)
            await ready.put(None)
            await asyncio.gather(writer, return_exceptions=True)
    for task in (writer, workers):
        if not task.cancelled() and (error := task.exception()) is not None:
            raise _first(error)


async def _batches(
    ready: "asyncio.Queue[dict[str, Any] | None]",
) -> AsyncIterator[list[dict[str, Any]]]:
    """Whatever is ready at once; one sync then serves several lines."""
    while (record := await ready.get()) is not None:
        batch = [record]
        while not ready.empty():
            if (record := ready.get_nowait()) is None:
                yield batch
                return
            batch.append(record)
        yield batch


async def _answer(
    http: aiohttp.ClientSession, endpoint: Endpoint, line: BatchLine
) -> dict[str, Any]:
    if line.problem:
        return refused(line)
    data = json.dumps(line.body).encode()
    busy_s = lost_s = 0.0
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            async with http.post(endpoint.url + line.url, data=data) as response:
                text = await response.text(errors="replace")
                status, headers = response.status, response.headers
        except TimeoutError:
            return unanswered(line, "timeout", f"no answer within {endpoint.timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            if lost_s >= endpoint.max_lost_s:
                raise JaxserveError(
                    f"{endpoint.url or 'the engine'} is out of reach: {error}; run the same "
                    "command again to go on"
                ) from error
            lost_s += pause_s
        else:
            if status not in BUSY or busy_s >= endpoint.max_busy_s:
                return answered(line, status, headers.get("x-request-id", ""), _body(text))
            wait_s = _retry_after_s(headers.get("Retry-After")) or pause_s
            busy_s += wait_s
            await asyncio.sleep(wait_s)
            continue
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _retry_after_s(value: str | None) -> float:
    try:
        return min(max(float(value or 0), 0.0), 60.0)
    except ValueError:  # a date
        return 1.0


def _body(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        message = " ".join(text.split())[:MAX_BODY_CHARS]
        return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
