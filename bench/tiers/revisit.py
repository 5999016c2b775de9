"""TTFT of a long prompt: computed, and from the device, the host and, after a restart, the disk."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.tiers.client import Ask, Client, Served, prompts
from bench.tiers.limits import Limits
from bench.tiers.setting import Setting, median, ms

ANSWER = 2
ASKED = {"host": 8.0, "disk": 4.0}


def measure(setting: Setting, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields one line for each place.

    The device holds two prompts, and prompts come in a cycle, so it never has the next one. The
    engine that starts on the store of another one has a host tier of two prompts, for the same
    reason.
    """
    sizes = setting.sizes
    rng = random.Random(setting.seed)
    asks = [
        Ask(prompt, ANSWER)
        for prompt in prompts(rng, sizes.num_prompts, sizes.prompt, setting.shape.vocab)
    ]
    two = 2 * (sizes.prompt + 2 * ANSWER)
    prompt_bytes = sizes.prompt * setting.token_bytes
    setting.clear("revisit")
    url = setting.disk_url("revisit")

    found: dict[str, _Visit] = {}
    client = Client(setting.engine(two))
    found["recompute"] = _visit(client, asks)
    found["device"] = _visit(client, [asks[-1]] * len(asks))
    client.close()

    host_bytes = (sizes.num_prompts + 1) * prompt_bytes
    client = Client(setting.engine(two, kv_host_bytes=host_bytes, kv_store=url))
    found["fill"] = _visit(client, asks)
    found["host"] = _visit(client, asks * 2)
    client.close()

    client = Client(setting.engine(two, kv_host_bytes=int(2.2 * prompt_bytes), kv_store=url))
    found["disk, first"] = _visit(client, asks[:1])
    found["disk"] = _visit(client, asks[1:] + asks)
    client.close()
    setting.clear("revisit")

    reference = median([one.ttft_s for one in found["recompute"].served])
    answers = {
        ask.prompt: one.tokens for ask, one in zip(asks, found["recompute"].served, strict=True)
    }
    ways = {"host": limits.copy, "disk": limits.disk_read, "disk, first": limits.disk_read}
    for place, visit in found.items():
        served = visit.served
        ttft_s = median([one.ttft_s for one in served])
        line: dict[str, Any] = {
            "measure": "revisit",
            "place": place,
            "prompt_tokens": sizes.prompt,
            "ttft_ms": round(1e3 * ttft_s, 1),
            "rounds_ms": ms([one.ttft_s for one in served]),
            "times_faster": round(reference / ttft_s, 2),
            "asked": ASKED.get(place),
            "cached_tokens": sorted({one.num_cached for one in served}),
            "loaded": visit.loaded,
            "same_answers": visit.same_answers(answers),
            "prompt_mib": round(prompt_bytes / 2**20, 1),
        }
        if place in ways:
            line["limit_ms"] = round(1e3 * prompt_bytes / ways[place], 1)
        yield line


@dataclass(frozen=True, slots=True)
class _Visit:
    """What came of prompts, and how many blocks came from each tier."""

    asks: list[Ask]
    served: list[Served]
    loaded: dict[str, int]

    def same_answers(self, answers: dict[tuple[int, ...], tuple[int, ...]]) -> float:
        pairs = zip(self.asks, self.served, strict=True)
        return sum(answers[ask.prompt] == one.tokens for ask, one in pairs) / len(self.asks)


def _visit(client: Client, asks: list[Ask]) -> _Visit:
    """One after the other, with nothing left under way between them."""
    before: dict[str, int] = client.about().get("loaded", {})
    served: list[Served] = []
    for ask in asks:
        served += client.serve([ask])
        client.settle()
    after: dict[str, int] = client.about().get("loaded", {})
    return _Visit(asks, served, {name: n - before.get(name, 0) for name, n in after.items()})
