"""What a server's Prometheus counters say about a run: their increase from before to after.

Works with any server that has /metrics; nothing is wrong if it has none.
"""

from collections.abc import Mapping

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

PREFIXES = ("jaxserve_", "vllm:", "sglang:", "llamacpp:")


async def scrape(
    session: aiohttp.ClientSession, base_url: str, headers: Mapping[str, str]
) -> dict[str, float] | None:
    """Every counter by its name with labels; None if the server has no metrics."""
    url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
    try:
        async with session.get(url, headers=headers) as response:
            if response.status != 200:
                return None
            text = await response.text()
        return counters(text)
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError):
        return None


def counters(text: str) -> dict[str, float]:
    """The counters of one scrape; histograms give their count and sum."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIXES) or family.type not in ("counter", "histogram"):
            continue
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            inner = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            found[f"{sample.name}{{{inner}}}" if inner else sample.name] = sample.value
    return found


def increase(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What went up, by how much."""
    deltas = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: round(value, 6) for name, value in deltas.items() if value}
