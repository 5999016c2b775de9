"""TTFT when a store hangs or has become very slow, beside computing everything."""

import random
from collections.abc import Iterator
from typing import Any

from bench.peers.workload import random_prompt
from bench.tiers.client import Ask, Client
from bench.tiers.limits import Limits
from bench.tiers.setting import Setting, median, ms
from jaxserve.kv.stores.faults import FaultPlan, FaultyStore

ANSWER = 2
ASKED = 1.2
NUM_EACH = 3
FAULTS = {
    "hangs at look-up": FaultPlan(hang=True),
    "hangs at loading": FaultPlan(hang=True),
    "slow at look-up": FaultPlan(latency_s=0.5, bytes_per_s=2e6),
    "slow at loading": FaultPlan(latency_s=0.5, bytes_per_s=2e6),
}


def measure(setting: Setting, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields a line for each fault and prompt length.

    For each fault an engine starts on a disk store that has all blocks, and learns on other
    prompts how fast it is. Then the store begins to hang or crawl: at once ("at look-up"), or when
    it is known already what it has ("at loading"). The engine takes turns with one without tiers.
    """
    sizes, vocab = setting.sizes, setting.shape.vocab
    rng = random.Random(setting.seed)
    asks, learning = (
        [
            Ask(random_prompt(rng, length, vocab), ANSWER)
            for _ in range(NUM_EACH)
            for length in sizes.faulty
        ]
        for _ in range(2)
    )
    room = max(sizes.faulty) + 4 * ANSWER
    tiers = {"kv_host_bytes": int(1.2 * room * setting.token_bytes)}
    setting.clear("faults")
    off = Client(setting.engine(room))
    filler = Client(setting.engine(room, kv_store=setting.disk_url("faults"), **tiers))
    for ask in (*asks, *learning):
        _serve(filler, ask)
    filler.close()
    for name, plan in FAULTS.items():
        on = Client(
            setting.engine(room, kv_store=setting.disk_url("faults", "fault+file"), **tiers)
        )
        warm = learning if name.endswith("look-up") else [*learning, *asks]
        healthy_s = [_serve(on, ask) for ask in warm]
        assert on.engine.lower is not None and on.engine.lower.cascade is not None
        store = on.engine.lower.cascade.workers[0].store
        assert isinstance(store, FaultyStore)
        store.plan = plan
        pairs = []
        for ask in asks:
            (one,) = on.serve([ask])
            pairs.append((_serve(off, ask), one.ttft_s))
        store.plan = FaultPlan()
        on.close()
        for length in sizes.faulty:
            chosen = [i for i, ask in enumerate(asks) if len(ask.prompt) == length]
            healthy = [
                s for s, ask in zip(healthy_s, warm, strict=True) if len(ask.prompt) == length
            ]
            ratios = [pairs[i][1] / pairs[i][0] for i in chosen]
            yield {
                "measure": "faults",
                "fault": name,
                "prompt_tokens": length,
                "ttft_ms": ms([pairs[i][1] for i in chosen]),
                "recompute_ms": ms([pairs[i][0] for i in chosen]),
                "healthy_ms": ms(healthy),
                "ratio": round(median(ratios), 3),
                "worst_ratio": round(max(ratios), 3),
                "asked": ASKED,
            }
    off.close()
    setting.clear("faults")


def _serve(client: Client, ask: Ask) -> float:
    """TTFT, with nothing left under way."""
    (one,) = client.serve([ask])
    client.settle()
    return one.ttft_s
