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
    """Yields a line. Two engines take turns on the same prompts: tiers off, tiers on.

    Every block is saved to the host and written to the disk. The time of the engine with tiers
    includes waiting until everything has arrived there.
    """
    sizes = setting.sizes
    setting.clear("unique")
    room = AT_ONCE * (sizes.unique[1] + sizes.answer) * 2
    off = Client(setting.engine(room))
    tiers = {"kv_host_bytes": room * setting.token_bytes, "kv_offload": "eager"}
    on = Client(setting.engine(room, kv_store=setting.disk_url("unique"), **tiers))
    seconds: dict[str, list[float]] = {"off": [], "on": [], "settled": []}
    rng = random.Random(setting.seed)
    num_tokens: list[int] = []
    num_before = 0
    for round_index in range(-1, sizes.unique_rounds):
        asks = []
        for _ in range(sizes.num_unique):
            length = rng.randint(*sizes.unique)
            asks.append(Ask(random_prompt(rng, length, setting.shape.vocab), sizes.answer))
        order = (off, on) if round_index % 2 else (on, off)
        for client in order:
            start_s = time.perf_counter()
            client.serve(asks, AT_ONCE)
            served_s = time.perf_counter() - start_s
            client.settle()
            settled_s = time.perf_counter() - start_s
            if round_index < 0:
                continue
            if client is on:
                seconds["on"].append(served_s)
                seconds["settled"].append(settled_s)
            else:
                seconds["off"].append(served_s)
        if round_index < 0:
            num_before = on.about()["saved"]
        else:
            num_tokens.append(sum(len(ask.prompt) + ask.answer_len for ask in asks))
    about = on.about()
    off.close()
    on.close()
    setting.clear("unique")
    ratios = {
        name: [off_s / on_s for off_s, on_s in zip(seconds["off"], seconds[name], strict=True)]
        for name in ("on", "settled")
    }
    stored_bytes = (about["saved"] - num_before) * setting.token_bytes * PAGE_SIZE
    all_s = sum(seconds["settled"])
    yield {
        "measure": "unique",
        "tokens_per_s": {
            name: round(sum(num_tokens) / sum(taken), 1) for name, taken in seconds.items()
        },
        "ratio": round(median(ratios["on"]), 4),
        "ratio_settled": round(median(ratios["settled"]), 4),
        "ratios": [round(x, 4) for x in ratios["on"]],
        "asked": ASKED,
        "stored_mb_per_s": round(stored_bytes / all_s / 1e6, 1),
        "counters": about,
    }
