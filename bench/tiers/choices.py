"""Load or recompute: `--kv-load auto` beside always doing the one and always doing the other."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.peers.workload import random_prompt
from bench.tiers.client import Ask, Client
from bench.tiers.limits import Limits
from bench.tiers.setting import Setting, ms

MODES = ("auto", "load", "recompute")
WORKLOADS = ("short", "long", "mix", "varied")
ANSWER = 2
MOST_VARIED = 64
"""Tokens after a prefix of the varied workload: 1 to so many."""
LEAST_RATIO = {"short": 0.95, "long": 0.95, "mix": 1.0, "varied": 1.0}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a store adds to each call; up to four calls run at once."""

    latency_ms: int
    mb_per_s: int

    def options(self) -> dict[str, str]:
        return {"latency": f"{self.latency_ms / 1e3}s", "bandwidth": f"{self.mb_per_s}MB"}


STORES = {"slow": Speed(50, 5), "normal": Speed(20, 100), "fast": Speed(5, 1000)}


def measure(store: str, setting: Setting, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields a line for each workload: only short prefixes, only long ones, both mixed, and varied.

    Where a machine computes so slowly that loading even the short ones pays, `mix` has nothing to
    decide. In `varied` prefixes are of all lengths from short to long, and what follows them is of
    1 to 64 tokens: where that leaves the padded step as large as it would be anyhow, a short
    prefix is cheaper to compute than to load from any store.

    A first engine puts all prefixes into a store; three others, one for each mode, start on copies
    of it and take turns, request by request. Each prefix is asked for once, with a suffix of its
    own, so it always comes from the store. What counts is the sum of the TTFTs. Before that, every
    engine serves a few requests of its own, from which it learns what things cost.
    """
    sizes, vocab = setting.sizes, setting.shape.vocab
    rng = random.Random(f"{setting.seed} {store}")

    def some(num: int, length: int) -> list[tuple[int, ...]]:
        return [random_prompt(rng, length, vocab) for _ in range(num)]

    short, long = some(2 * sizes.num_short, sizes.short), some(2 * sizes.num_long, sizes.long)
    mix = short[sizes.num_short :] + long[sizes.num_long :]
    rng.shuffle(mix)
    varied = [
        random_prompt(rng, int(sizes.short * (sizes.long / sizes.short) ** rng.random()), vocab)
        for _ in range(sizes.num_varied)
    ]
    workloads = {
        "short": short[: sizes.num_short],
        "long": long[: sizes.num_long],
        "mix": mix,
        "varied": varied,
    }
    learning = some(3, sizes.short) + some(2, sizes.long)

    longest_suffix = max(sizes.suffix, MOST_VARIED)
    room = 2 * (sizes.long + longest_suffix + ANSWER)
    host_bytes = 2 * room * setting.token_bytes
    folder = f"planner-{store}"
    filler = Client(
        setting.engine(room, kv_host_bytes=host_bytes, kv_store=setting.disk_url(folder))
    )
    for prefix in (*short, *long, *varied, *learning):
        filler.serve([Ask((*prefix, 3), 1)])
        filler.settle()
    filler.close()
    clients: dict[str, Client] = {}
    for mode in MODES:
        shutil.copytree(setting.folder / folder, setting.folder / f"{folder}-{mode}")
        (setting.folder / f"{folder}-{mode}").chmod(0o700)
        url = setting.disk_url(f"{folder}-{mode}", "fault+file", **STORES[store].options())
        clients[mode] = Client(
            setting.engine(room, kv_host_bytes=host_bytes, kv_store=url, kv_load=mode)
        )

    def serve(prefix: tuple[int, ...], num_more: int = sizes.suffix) -> dict[str, float]:
        suffix = random_prompt(rng, num_more, vocab)
        ttft_s = {}
        for mode in rng.sample(MODES, len(MODES)):
            (one,) = clients[mode].serve([Ask((*prefix, *suffix), ANSWER)])
            clients[mode].settle()
            ttft_s[mode] = one.ttft_s
        return ttft_s

    for length in (sizes.short, sizes.suffix, 8 * sizes.suffix, sizes.long // 2):
        serve(random_prompt(rng, length, vocab))
    for prefix in learning:
        serve(prefix)
    for name in WORKLOADS:
        is_varied = name == "varied"
        taken = [
            serve(prefix, rng.randint(1, MOST_VARIED) if is_varied else sizes.suffix)
            for prefix in workloads[name]
        ]
        sums = {mode: sum(one[mode] for one in taken) for mode in MODES}
        best = min(sums["load"], sums["recompute"])
        yield {
            "measure": "planner",
            "store": store,
            "latency_ms": STORES[store].latency_ms,
            "mb_per_s_per_call": STORES[store].mb_per_s,
            "workload": name,
            "prefix_tokens": sorted({len(prefix) for prefix in workloads[name]}),
            "mean_ttft_ms": {
                mode: round(1e3 * total / len(taken), 1) for mode, total in sums.items()
            },
            "ratio_to_better": round(best / sums["auto"], 3),
            "asked": LEAST_RATIO[name],
            "ttft_ms": {mode: ms([one[mode] for one in taken]) for mode in MODES},
        }
    for mode, client in clients.items():
        client.close()
        setting.clear(f"{folder}-{mode}")
    setting.clear(folder)
