import json
from pathlib import Path

import pytest

from jaxserve.cli import main

REQUESTS = [[number, 1000 + number] for number in range(50)]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 10 * index, "hash_ids": names} for index, names in enumerate(2 * REQUESTS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_table_compares_policies_at_each_size(trace: str, capsys: pytest.CaptureFixture[str]):
    code = main(["kv", "simulate", trace, "--policies", "lru,arc", "--sizes", "50%,100%"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == 2 + 4
    assert "100 requests" in lines[0] and "hit ratio without bounds 0.500" in lines[0]
    assert lines[2].split()[:2] == ["tier", "lru,"] and " 0.000 " in lines[2]
    assert all(" 0.500 " in line for line in lines[4:])


def test_json_gives_bytes_of_a_cascade(trace: str, capsys: pytest.CaptureFixture[str]):
    tiers = "device:10%:lru,disk:200KiB:lru?store_threshold=1"
    code = main(["kv", "simulate", trace, "--tiers", tiers, "--block-bytes", "2KiB", "--json"])
    row = json.loads(capsys.readouterr().out)
    device, disk = row["tiers"]
    assert code == 0 and row["hit_ratio"] == 0.5 == row["belady_bound"]
    assert (device["name"], device["blocks"], disk["blocks"]) == ("device", 10, 100)
    assert disk["loaded_bytes"] == 100 * 2048 and device["loaded_bytes"] == 0
    assert disk["written_bytes"] == 100 * 2048 and device["written_bytes"] == 200 * 2048
    assert row["duration_s"] == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policies", "lfu"], "did you mean"),
        (["--policies", "lru,"], "separated by commas"),
        (["--sizes", "0%"], "--sizes has the size '0%'; expected a share"),
        (["--sizes", "101%"], "--sizes has the size '101%'; expected a share"),
        (["--tiers", "host:x%:lru"], "--tiers has the size 'x%'; expected a share"),
        (["--sizes", "5"], "--sizes has the size '5', which is 0 blocks"),
        (["--sizes", "much"], "--sizes has the size 'much'; expected a share such as"),
        (["--sizes", ""], "--sizes is ''"),
        (["--tiers", ""], "--tiers is ''"),
        (["--tiers", "h:5%:lru,h:9%:lru"], "a name of its own"),
        (["--block-tokens", "0"], "--block-tokens is 0"),
        (["--block-bytes", "0"], "expected a number of bytes"),
        (["--tiers", "host:5%"], "name:size:policy"),
        (["--tiers", "host:5%:lru", "--sizes", "5%"], "either --sizes or --tiers"),
        (["--tiers", "d:1%:lru,h:5%:lru:1GiB"], "no --prefill-rate"),
        (["--prefill-rate", "1000"], "bytes per second"),
        (["--tiers", "d:1%:lru,h:5%:lru", "--prefill-rate", "1000"], "bytes per second"),
        (["--tiers", "d:1%:lru,h:5%:lru:1GiB", "--prefill-rate", "-1"], "tokens above 0"),
        (["--tiers", "d:1%:lru,h:5%:lru:x", "--prefill-rate", "9"], "the speed in --tiers of h"),
        (["--sizzes", "5%"], "--sizes"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    trace: str, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["kv", "simulate", trace, *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_missing_command_or_file_is_told(capsys: pytest.CaptureFixture[str]):
    assert main(["kv"]) == 2 and main(["kv", "simulate", "/no/such/file"]) == 2
    assert "cannot read the trace" in capsys.readouterr().err


def test_with_speeds_the_planner_is_asked(trace: str, capsys: pytest.CaptureFixture[str]):
    tiers = "device:10%:lru,host:100%:lru:1GiB"
    options = ["--tiers", tiers, "--prefill-rate", "100", "--block-bytes", "1KiB"]
    assert main(["kv", "simulate", trace, *options, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["decisions"] == {"load": 50, "split": 0, "recompute": 0}
    assert row["prefill_s"]["never_load"] == pytest.approx(200 * 16 / 100)
    assert row["prefill_s"]["planned"] == pytest.approx(100 * 16 / 100, rel=0.01)
    assert main(["kv", "simulate", trace, *options]) == 0
    assert "planner: 50 load, 0 split, 0 recompute" in capsys.readouterr().out
