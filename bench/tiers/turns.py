"""Conversations that take turns, with more blocks than the device holds: tiers on and off."""

import random
import time
from collections.abc import Iterator
from typing import Any

from bench.peers.workload import random_prompt
from bench.tiers.client import Ask, Client
from bench.tiers.limits import Limits
from bench.tiers.setting import Setting, median

AT_ONCE = 4
POOL_SHARE = 4
ASKED = 1.5


def measure(setting: Setting, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields a line for the host alone, and one for a small host before a disk.

    Every user opens a conversation, and in each round of turns everybody, in random order, adds a
    message to what was said. At the end all conversations together are `POOL_SHARE` times what the
    device's pool holds. Engines take turns on the same conversations.
    """
    sizes = setting.sizes
    final = sizes.opening + (sizes.turns - 1) * sizes.turn + sizes.turns * sizes.answer
    working_set = final * sizes.users
    pool = setting.engine(working_set // POOL_SHARE)
    all_bytes = int(1.2 * working_set * setting.token_bytes)
    rounds = max(1, sizes.rounds // 2)
    ways: dict[str, dict[str, Any]] = {
        "host": {"kv_host_bytes": all_bytes * rounds},
        "disk": {"kv_host_bytes": all_bytes // 4, "kv_store": setting.disk_url("turns")},
    }
    off = Client(pool)
    for way, tiers in ways.items():
        setting.clear("turns")
        on = Client({**pool, **tiers})
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        hits: dict[str, float] = {}
        num_tokens = 0
        for index in range(rounds):
            order = {"off": off, "on": on} if index % 2 else {"on": on, "off": off}
            for name, client in order.items():
                rng = random.Random(f"{setting.seed} {way} {index}")
                taken_s, num_tokens, hits[name] = _converse(setting, client, rng)
                client.settle()
                seconds[name].append(taken_s)
        about = on.about()
        on.close()
        ratios = [a / b for a, b in zip(seconds["off"], seconds["on"], strict=True)]
        yield {
            "measure": "turns",
            "tiers": way,
            "users": sizes.users,
            "turns": sizes.turns,
            "tokens_at_end": working_set,
            "pool_tokens": 16 * pool["num_pages"],
            "host_mib": round(tiers["kv_host_bytes"] / 2**20),
            "tokens_per_s": {
                name: round(num_tokens * len(taken) / sum(taken), 1)
                for name, taken in seconds.items()
            },
            "cached_share": {name: round(share, 3) for name, share in hits.items()},
            "ratio": round(median(ratios), 3),
            "ratios": [round(x, 3) for x in ratios],
            "asked": ASKED,
            "counters": about,
        }
    off.close()
    setting.clear("turns")


def _converse(setting: Setting, client: Client, rng: random.Random) -> tuple[float, int, float]:
    """Seconds for all turns, tokens of all prompts and answers, and which share was cached."""
    sizes, vocab = setting.sizes, setting.shape.vocab
    said: list[tuple[int, ...]] = [()] * sizes.users
    taken_s, num_tokens, num_prompt, num_cached = 0.0, 0, 0, 0
    for turn in range(sizes.turns):
        length = sizes.turn if turn else sizes.opening
        asks: list[Ask] = []
        order = rng.sample(range(sizes.users), sizes.users)
        for user in order:
            asks.append(Ask((*said[user], *random_prompt(rng, length, vocab)), sizes.answer))
        start_s = time.perf_counter()
        served = client.serve(asks, AT_ONCE)
        taken_s += time.perf_counter() - start_s
        for user, ask, one in zip(order, asks, served, strict=True):
            said[user] = (*ask.prompt, *one.tokens)
            num_tokens += len(ask.prompt) + len(one.tokens)
            num_prompt += len(ask.prompt)
            num_cached += one.num_cached
    return taken_s, num_tokens, num_cached / num_prompt
