"""Clients that take next to nothing of their streams hold nobody up, and are cut off."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from jaxserve.server.protocol import SLOW_READER_S
from tests.server.hostile import Maker
from tests.server.proof.served import AUTHORIZATION, Served, served, wait_until

RECEIVE_BYTES = 1024
PAUSE_S = 0.5
PROBE_TOKENS = 20
ANSWER = {"max_tokens": 400, "ignore_eos": True, "logprobs": 20, "stream": True}
"""A quarter of a megabyte, in 400 steps: more than the system keeps for a client."""

SLOWER_TIMES, SLOWER_S = 2.0, 1.0
"""The slowest answer beside slow readers may take so much longer than beside quick ones."""


def prove(num_clients: int, seed: int) -> dict[str, Any]:
    """Answers to others, beside readers who take everything, and beside those who do not."""
    rng = random.Random(seed)
    with served() as server:
        asyncio.run(_beside(server, num_clients, _read_all, rng))
        before = server.uses()
        quick_s, _ = asyncio.run(_beside(server, num_clients, _read_all, rng))
        slow_s, num_cut_off = asyncio.run(_beside(server, num_clients, _read_slowly, rng))
        free_s = wait_until(server.is_idle, 10)
        after = server.settled(before)
        is_prompt = max(slow_s) <= SLOWER_TIMES * max(quick_s) + SLOWER_S
        return {
            "proof": "slow readers",
            "clients": num_clients,
            "answers_beside": {"quick": _told(quick_s), "slow": _told(slow_s)},
            "cut_off": num_cut_off,
            "seconds_until_free": free_s and round(free_s, 3),
            "logged_failures": server.num_errors_logged(),
            "pages_in_use": server.pages_in_use(),
            "before": before.told(),
            "after": after.told(),
            "holds": is_prompt
            and num_cut_off == num_clients
            and after.is_back_at(before)
            and server.is_idle(),
        }


def _told(latencies_s: list[float]) -> dict[str, Any]:
    ordered = sorted(latencies_s)
    return {
        "answers": len(ordered),
        "median_s": round(ordered[len(ordered) // 2], 3),
        "worst_s": round(ordered[-1], 3),
    }


Read = Callable[[socket.socket], Awaitable[bool]]


async def _beside(
    server: Served, num_clients: int, read: Read, rng: random.Random
) -> "tuple[list[float], int]":
    """Seconds that short answers took while clients read, and how many clients were cut off."""
    clients = [asyncio.create_task(_client(server, read, rng)) for _ in range(num_clients)]
    latencies_s = []
    while not all(client.done() for client in clients):
        body = {"prompt": f"Hello {rng.random()}", "max_tokens": PROBE_TOKENS, "ignore_eos": True}
        start_s = time.monotonic()
        answer = await _whole(server, _request(rng, body))
        latencies_s.append(time.monotonic() - start_s)
        assert f'"completion_tokens":{PROBE_TOKENS}' in answer.decode().replace(" ", ""), answer
        await asyncio.sleep(0.05)
    return latencies_s, sum(await asyncio.gather(*clients))


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


async def _client(server: Served, read: Read, rng: random.Random) -> bool:
    """Ask for a long stream and read it; returns whether it was cut off."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        await loop.sock_sendall(client, _request(rng, {"prompt": str(rng.random()), **ANSWER}))
        return await read(client)


async def _read_all(client: socket.socket) -> bool:
    loop, end = asyncio.get_running_loop(), b""
    while data := await loop.sock_recv(client, 1 << 16):
        end = (end + data)[-100:]
    return b"[DONE]" not in end


async def _read_slowly(client: socket.socket) -> bool:
    """A byte now and then, which is not reading."""
    start_s = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - start_s < 4 * SLOW_READER_S:
            await asyncio.sleep(PAUSE_S)
            if not await asyncio.get_running_loop().sock_recv(client, 1):
                break
    return time.monotonic() - start_s < 4 * SLOW_READER_S
