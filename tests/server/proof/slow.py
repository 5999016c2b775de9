"""Clients that take next to nothing of their streams hold nobody up.

Cutting them off is for the small tests: here the system itself takes megabytes for each client,
more than any of these answers.
"""

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from tests.server.hostile import Maker
from tests.server.proof.served import AUTHORIZATION, Served, served, wait_until

RECEIVE_BYTES = 1024
PAUSE_S = 0.5
PROBE_TOKENS = 20
READ_FOR_S = 60.0
ANSWER = {"max_tokens": 400, "ignore_eos": True, "logprobs": 20, "stream": True}
SLOWER_TIMES, SLOWER_S = 2.0, 1.0
"""Answers beside slow readers, and their own, may take so much longer than beside quick ones."""


def prove(num_clients: int, seed: int) -> dict[str, Any]:
    """Answers to others, beside readers who take everything, and beside those who do not."""
    rng = random.Random(seed)
    with served() as server:
        asyncio.run(_beside(server, num_clients, _read_all, rng))
        before = server.uses()
        quick = asyncio.run(_beside(server, num_clients, _read_all, rng))
        slow = asyncio.run(_beside(server, num_clients, _read_slowly, rng))
        free_s = wait_until(server.is_idle, 10)
        after = server.settled(before)
        return {
            "proof": "slow readers",
            "clients": num_clients,
            "answers_beside": {"quick": quick.told(), "slow": slow.told()},
            "seconds_until_free": free_s and round(free_s, 3),
            "logged_failures": server.num_errors_logged(),
            "pages_in_use": server.pages_in_use(),
            "before": before.told(),
            "after": after.told(),
            "holds": slow.is_as_good_as(quick) and after.is_back_at(before) and server.is_idle(),
        }


@dataclass(frozen=True, slots=True)
class Beside:
    """How others fared beside readers.

    Attributes:
        latencies_s: of short answers to others.
        computed_s: when the readers' own answers were computed, whether read or not.
    """

    latencies_s: list[float]
    computed_s: float

    def is_as_good_as(self, other: "Beside") -> bool:
        pairs = (
            (max(self.latencies_s), max(other.latencies_s)),
            (self.computed_s, other.computed_s),
        )
        return all(ours_s <= SLOWER_TIMES * theirs_s + SLOWER_S for ours_s, theirs_s in pairs)

    def told(self) -> dict[str, Any]:
        ordered = sorted(self.latencies_s)
        return {
            "answers": len(ordered),
            "median_s": round(ordered[len(ordered) // 2], 3),
            "worst_s": round(ordered[-1], 3),
            "readers_computed_s": round(self.computed_s, 2),
        }


Read: TypeAlias = Callable[[socket.socket], Awaitable[None]]


async def _beside(server: Served, num_clients: int, read: Read, rng: random.Random) -> Beside:
    """Ask for short answers until all clients have read or left."""
    began_s, computed_s, latencies_s = time.monotonic(), 0.0, []
    clients = [asyncio.create_task(_client(server, read, rng)) for _ in range(num_clients)]
    while not (computed_s and all(client.done() for client in clients)):
        body = {"prompt": f"Hello {rng.random()}", "max_tokens": PROBE_TOKENS, "ignore_eos": True}
        start_s = time.monotonic()
        answer = await _whole(server, _request(rng, body))
        latencies_s.append(time.monotonic() - start_s)
        assert f'"completion_tokens":{PROBE_TOKENS}' in answer.decode().replace(" ", ""), answer
        if not computed_s and await asyncio.to_thread(server.is_idle):
            computed_s = time.monotonic() - began_s
        await asyncio.sleep(0.05)
    await asyncio.gather(*clients)
    return Beside(latencies_s, computed_s)


def _request(rng: random.Random, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return Maker(rng, "/v1/completions", {}, AUTHORIZATION).request(data)


async def _whole(server: Served, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


async def _client(server: Served, read: Read, rng: random.Random) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        await loop.sock_sendall(client, _request(rng, {"prompt": str(rng.random()), **ANSWER}))
        await read(client)


async def _read_all(client: socket.socket) -> None:
    loop, end = asyncio.get_running_loop(), b""
    while data := await loop.sock_recv(client, 1 << 16):
        end = (end + data)[-100:]
    assert b"[DONE]" in end, end


async def _read_slowly(client: socket.socket) -> None:
    """A byte now and then, which is not reading; then leave."""
    start_s = time.monotonic()
    with suppress(ConnectionError):  # it may be cut off
        while time.monotonic() - start_s < READ_FOR_S:
            await asyncio.sleep(PAUSE_S)
            if not await asyncio.get_running_loop().sock_recv(client, 1):
                return
