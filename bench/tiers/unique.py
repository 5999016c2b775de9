"""What the tiers cost where they cannot help: prompts that nobody has ever sent before."""

import random
import time
from collections.abc import Iterator
from typing import Any

from bench.peers.workload import random_prompt
from bench.tiers.client import Ask, Client
from bench.tiers.limits import Limits
from bench.tiers.setting import PAGE_SIZE, Setting, median

AT_ONCE = 4
ASKED = 0.97


def measure(setting: Setting, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields a line for the host alone, and one for host and disk.

    Three engines take turns on the same prompts: tiers off, host, host and disk. Every block is
    saved to the host and written to the disk; `settled` includes waiting until all has arrived.
    """
    sizes = setting.sizes
    setting.clear("unique")
    room = AT_ONCE * (sizes.unique[1] + sizes.answer) * 2
    host: dict[str, Any] = {
        "kv_host_bytes": room * setting.token_bytes,
        "kv_offload": "eager",
    }
    ways: dict[str, dict[str, Any]] = {
        "off": {},
        "host": host,
        "disk": {**host, "kv_store": setting.disk_url("unique")},
    }
    clients = {way: Client(setting.engine(room, **tiers)) for way, tiers in ways.items()}
    served_s: dict[str, list[float]] = {way: [] for way in ways}
    settled_s: dict[str, list[float]] = {way: [] for way in ways}
    rng = random.Random(setting.seed)
    num_tokens, saved_before = 0, 0
    for round_index in range(-1, sizes.unique_rounds):
        asks = []
        for _ in range(sizes.num_unique):
            length = rng.randint(*sizes.unique)
            asks.append(Ask(random_prompt(rng, length, setting.shape.vocab), sizes.answer))
        for way in rng.sample(list(ways), len(ways)):
            start_s = time.perf_counter()
            clients[way].serve(asks, AT_ONCE)
            served = time.perf_counter() - start_s
            clients[way].settle()
            if round_index >= 0:
                served_s[way].append(served)
                settled_s[way].append(time.perf_counter() - start_s)
        if round_index < 0:
            saved_before = clients["disk"].about()["saved"]
        else:
            num_tokens += sum(len(ask.prompt) + ask.answer_len for ask in asks)
    abouts = {way: client.about() for way, client in clients.items()}
    for client in clients.values():
        client.close()
    setting.clear("unique")
    stored_bytes = (abouts["disk"]["saved"] - saved_before) * setting.token_bytes * PAGE_SIZE
    for way in ("host", "disk"):
        ratios = [a / b for a, b in zip(served_s["off"], served_s[way], strict=True)]
        settled = [a / b for a, b in zip(served_s["off"], settled_s[way], strict=True)]
        line: dict[str, Any] = {
            "measure": "unique",
            "tiers": way,
            "tokens_per_s": {
                "off": round(num_tokens / sum(served_s["off"]), 1),
                "on": round(num_tokens / sum(served_s[way]), 1),
            },
            "ratio": round(median(ratios), 4),
            "ratio_settled": round(median(settled), 4),
            "ratio_of_sums": round(sum(served_s["off"]) / sum(served_s[way]), 4),
            "ratios": [round(x, 4) for x in ratios],
            "asked": ASKED,
            "counters": abouts[way],
        }
        if way == "disk":
            line["stored_mb_per_s"] = round(stored_bytes / sum(settled_s[way]) / 1e6, 1)
        yield line
