"""Latent pages move through the tiers like any others, and no token changes for it."""

from pathlib import Path
from typing import Any

from tests.engine.tiers_harness import (
    FIXTURES,
    loaded,
    make_engine,
    renamed,
    requests,
    serve,
    settle,
)

MODEL = FIXTURES / "deepseek_v3-v0"
ASKED = requests(24, seed=3)
HOST_BYTES = 24 * 8 * 2 * 24 * 4  # two dozen slots: 8 tokens, 2 layers, 16 + 8 float32


def run(suffix: str = "", **settings: Any) -> tuple[dict, dict[str, int]]:
    """Tokens by request, and blocks that came from lower tiers."""
    engine = make_engine(MODEL, num_pages=30, **settings)
    try:
        tokens = serve(engine, renamed(ASKED, suffix))
        if engine.lower is None:
            return tokens, {}
        settle(engine)
        return tokens, dict(loaded(engine))
    finally:
        engine.close()


def test_host_and_disk_change_no_token_and_two_devices_read_what_one_wrote(tmp_path: Path):
    expected, _ = run(enable_prefix_caching=False)
    store = f"file://{tmp_path}/kv?max_bytes=4MiB"
    tiers = {"kv_host_bytes": HOST_BYTES, "kv_store": store, "kv_load": "load"}
    tokens, sources = run(**tiers)
    assert tokens == expected
    assert sum(sources.values()) > 10  # of what left the device
    tokens, sources = run("b", tensor_parallel_size=2, **tiers)
    assert tokens == {name + "b": value for name, value in expected.items()}
    assert sources.get("disk", 0) > 5
