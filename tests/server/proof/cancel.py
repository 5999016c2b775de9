"""Many streams at once, all broken off at random: every page is free within a second."""

import asyncio
import json
import random
import time
from collections import Counter
from typing import Any

from tests.server.broken_streams import break_off_streams
from tests.server.hostile import Maker
from tests.server.proof.served import AUTHORIZATION, Served, served, wait_until

NUM_ROUNDS = 10
MAX_DELAY_S = 5.0
FREE_S = 1.0
PATIENCE_S = 30.0


def prove(num_streams: int, seed: int) -> dict[str, Any]:
    """A round to warm up, then NUM_ROUNDS of them."""
    rng = random.Random(seed)
    with served() as server:
        _round(server, rng, num_streams)
        before = server.uses()
        outcomes: Counter[str] = Counter()
        frees_s: list[float | None] = []
        for _ in range(NUM_ROUNDS):
            free_s, ended = _round(server, rng, num_streams)
            outcomes += ended
            frees_s.append(free_s)
        after = server.settled(before)
        known_s = [free_s for free_s in frees_s if free_s is not None]
        are_free = len(known_s) == NUM_ROUNDS and max(known_s) <= FREE_S
        return {
            "proof": "streams broken off",
            "streams": num_streams,
            "rounds": NUM_ROUNDS,
            "left": dict(outcomes),
            "seconds_until_free": [free_s and round(free_s, 3) for free_s in frees_s],
            "logged_failures": server.num_errors_logged(),
            "pages_in_use": server.pages_in_use(),
            "before": before.told(),
            "after": after.told(),
            "holds": are_free and after.is_back_at(before) and server.is_idle(),
        }


def _round(
    server: Served, rng: random.Random, num_streams: int
) -> "tuple[float | None, Counter[str]]":
    """Seconds from the last client's leaving until nothing is held, and how streams ended."""

    def request() -> bytes:
        prompt = f"Tell me a story about {rng.random()}. " * rng.randrange(1, 8)
        body = {"prompt": prompt, "max_tokens": rng.randrange(20, 300), "ignore_eos": True}
        data = json.dumps({**body, "stream": True}).encode()
        return Maker(rng, "/v1/completions", {}, AUTHORIZATION).request(data)

    ended = asyncio.run(break_off_streams(server.port, rng, request, num_streams, MAX_DELAY_S))
    if wait_until(server.is_idle, PATIENCE_S) is None:
        return None, ended.outcomes
    return time.monotonic() - ended.last_s, ended.outcomes
