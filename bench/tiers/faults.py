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
WAIT_S = 3.0
FAULTS = {
    "hangs at look-up": FaultPlan(hang=True),
    "hangs at loading": FaultPlan(hang=True),
    "slow at look-up": FaultPlan(latency_s=0.5, bytes_per_s=2e6),
    "slow at loading": FaultPlan(latency_s=0.5, bytes_per_s=2e6),
}


def measure(setting: Setting, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields a line for each fault and prompt length.

    An engine whose blocks all lie in a store that has been fast so far takes turns with one that
    has no tiers. Then the store begins to hang or crawl: at once ("at look-up"), or when it is
    known already what it has ("at loading").
    """
    sizes, vocab = setting.sizes, setting.shape.vocab
    rng = random.Random(setting.seed)
    asks = [
        Ask(random_prompt(rng, length, vocab), ANSWER)
        for _ in range(NUM_EACH)
        for length in sizes.faulty
    ]
    room = max(sizes.faulty) + 4 * ANSWER
    host_bytes = int(1.2 * room * setting.token_bytes)
    off = Client(setting.engine(room))
    on = Client(setting.engine(room, kv_host_bytes=host_bytes, kv_store="fault+memory://"))
    assert on.engine.lower is not None and on.engine.lower.cascade is not None
    cascade = on.engine.lower.cascade
    store = cascade.workers[0].store
    assert isinstance(store, FaultyStore)

    def serve(client: Client, ask: Ask) -> float:
        (one,) = client.serve([ask])
        if client is off or not store.plan.hang:
            client.settle()
        return one.ttft_s

    for ask in (*asks, *asks):
        serve(on, ask)
    for name, plan in FAULTS.items():
        healthy_s = [serve(on, ask) for ask in asks]
        if name.endswith("look-up"):
            cascade.forget_all()
        store.plan = plan
        pairs = [(serve(off, ask), serve(on, ask)) for ask in asks]
        store.plan = FaultPlan()
        on.wait_for_store(WAIT_S)
        for length in sizes.faulty:
            chosen = [i for i, ask in enumerate(asks) if len(ask.prompt) == length]
            ratios = [pairs[i][1] / pairs[i][0] for i in chosen]
            yield {
                "measure": "faults",
                "fault": name,
                "prompt_tokens": length,
                "ttft_ms": ms([pairs[i][1] for i in chosen]),
                "recompute_ms": ms([pairs[i][0] for i in chosen]),
                "healthy_ms": ms([healthy_s[i] for i in chosen]),
                "ratio": round(median(ratios), 3),
                "worst_ratio": round(max(ratios), 3),
                "asked": ASKED,
            }
    off.close()
    on.close()
