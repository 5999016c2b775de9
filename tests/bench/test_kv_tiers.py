import json
from pathlib import Path

from bench import kv_tiers


def run(tmp_path: Path, only: str) -> "list[dict]":
    """The lines of a run on the tiny shape."""
    out = tmp_path / "lines.jsonl"
    options = ["--shape", "tiny", "--dtype", "float32", "--only", only, "--out", str(out)]
    options += ["--cache", str(tmp_path / "cache"), "--folder", str(tmp_path / "store")]
    assert kv_tiers.main(options) == 0
    assert not any((tmp_path / "store").iterdir()), "a store was left behind"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line["commit"] and line["device"] and line["limits"] for line in lines)
    return lines


def test_revisits_are_told_by_place_and_the_cost_in_vain_by_tier(tmp_path: Path):
    *revisits, host, disk = run(tmp_path, "revisit,unique")
    lines = {line["place"]: line for line in revisits}
    assert set(lines) == {"recompute", "device", "fill", "host", "disk, first", "disk"}
    assert lines["recompute"]["cached_tokens"] == [0] == lines["fill"]["cached_tokens"]
    assert lines["device"]["cached_tokens"] == [96]
    assert lines["host"]["loaded"]["host"] > 0 and lines["disk"]["loaded"]["disk"] > 0
    assert all(line["same_answers"] == 1 for line in lines.values())
    assert (host["tiers"], disk["tiers"]) == ("host", "disk")
    for line in (host, disk):
        assert line["ratio"] > 0 and line["counters"]["saved"] > 0
