"""Writes `jaxserve.json`, the Grafana dashboard: python docs/grafana/make_dashboard.py"""

import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "jaxserve.json"
MODEL = 'model_name="$model"'
RATE = "[$__rate_interval]"


def quantiles(name: str) -> dict[str, str]:
    """p50, p90 and p99 of one of vLLM's histograms."""
    return {
        f"p{round(100 * q)}": (
            f"histogram_quantile({q}, sum by (le) (rate(vllm:{name}_bucket{{{MODEL}}}{RATE})))"
        )
        for q in (0.5, 0.9, 0.99)
    }


def rate(name: str, labels: str = MODEL, by: str = "") -> str:
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({name}{{{labels}}}{RATE}))"


PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Between tokens", "s", quantiles("inter_token_latency_seconds")),
    ("Whole request", "s", quantiles("e2e_request_latency_seconds")),
    (
        "Where the time goes (mean)",
        "s",
        {
            part: f"{rate(f'vllm:request_{part}_time_seconds_sum')} / "
            f"{rate(f'vllm:request_{part}_time_seconds_count')}"
            for part in ("queue", "prefill", "decode")
        },
    ),
    (
        "Tokens per second",
        "short",
        {
            "prompt": rate("vllm:prompt_tokens_total"),
            "answer": rate("vllm:generation_tokens_total"),
        },
    ),
    (
        "Requests",
        "short",
        {
            "running": f"vllm:num_requests_running{{{MODEL}}}",
            "waiting": f"vllm:num_requests_waiting{{{MODEL}}}",
        },
    ),
    (
        "Requests per second, by how they ended",
        "short",
        {"{{finished_reason}}": rate("vllm:request_success_total", by="finished_reason")},
    ),
    ("Device pages in use", "percentunit", {"used": f"vllm:kv_cache_usage_perc{{{MODEL}}}"}),
    (
        "Prompt tokens not computed, by tier",
        "short",
        {"{{source}}": rate("jaxserve_kv_hit_tokens_total", "", "source")},
    ),
    ("Bytes in each tier", "bytes", {"{{tier}}": "jaxserve_kv_resident_bytes"}),
    (
        "Moved between tiers",
        "Bps",
        {"{{direction}} {{tier}}": rate("jaxserve_kv_moved_bytes_total", "", "direction, tier")},
    ),
    (
        "Load or recompute",
        "short",
        {"{{choice}}": rate("jaxserve_kv_plan_decisions_total", "", "choice")},
    ),
    (
        "Preemptions, recomputed tokens",
        "short",
        {
            "preemptions": rate("jaxserve_preemptions_total", ""),
            "recomputed tokens": rate("jaxserve_recomputed_tokens_total", ""),
        },
    ),
    (
        "Records that failed their check",
        "short",
        {"{{reason}}": rate("jaxserve_kv_rejected_records_total", "", "reason")},
    ),
]


def dashboard() -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"x": 12 * (i % 2), "y": 8 * (i // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
            "targets": [
                {"refId": chr(65 + n), "datasource": source, "expr": expr, "legendFormat": legend}
                for n, (legend, expr) in enumerate(queries.items())
            ],
        }
        for i, (title, unit, queries) in enumerate(PANELS)
    ]
    return {
        "title": "jaxserve",
        "uid": "jaxserve",
        "tags": ["jaxserve", "llm"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": source,
                    "query": "label_values(vllm:prompt_tokens_total, model_name)",
                    "refresh": 2,
                },
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(dashboard(), indent=1) + "\n")
