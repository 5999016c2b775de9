"""The simulator against figures of an independent one, and by hand where that is possible."""

import gzip
import json
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.kv.simulate import TierSpec, belady_hit_ratio, replay
from jaxserve.kv.traces import Trace, load_trace, make_trace

HEAD = Path(__file__).parents[1] / "fixtures" / "traces" / "mooncake_conversation_head.jsonl.gz"
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
INDEPENDENT = {
    "lru": (0.0373, 0.0373, 0.0412, 0.0629, 0.1402, 0.2327),
    "arc": (0.0396, 0.0396, 0.0501, 0.0748, 0.1446, 0.2386),
    "s3fifo": (0.0373, 0.0382, 0.0562, 0.0839, 0.1395, 0.2209),
    "lru?store_threshold=2": (0.0372, 0.0409, 0.0724, 0.0878, 0.1077, 0.1077),
    "belady": (0.0930, 0.1329, 0.2054, 0.2597, 0.2654, 0.2654),
}
"""Hit ratios of the head of the trace by a simulator that shares no code with this one."""


@pytest.fixture(scope="module")
def head() -> Trace:
    return load_trace(HEAD)


def one_tier(trace: Trace, policy: str, capacity: int):
    return replay(trace, [TierSpec("tier", policy, capacity)])


@pytest.mark.parametrize("policy", INDEPENDENT)
def test_hit_ratios_are_those_of_an_independent_simulator(head: Trace, policy: str):
    for share, expected in zip(SHARES, INDEPENDENT[policy], strict=True):
        capacity = int(head.num_unique * share)
        if policy == "belady":
            found = belady_hit_ratio(head, capacity)
        else:
            found = one_tier(head, policy, capacity).hit_ratio
        assert found == pytest.approx(expected, abs=0.005), f"{policy} at {share}"


def test_the_head_of_the_trace_is_read_whole(head: Trace):
    assert (len(head.requests), head.num_references, head.num_unique) == (1500, 41_702, 30_634)
    assert head.ceiling == pytest.approx(0.2654, abs=5e-5)
    assert 500 < head.duration_s < 520


def test_only_leading_blocks_count_as_hits():
    trace = make_trace([["a", "b", "c"], ["x", "b", "c"], ["a", "b", "y"]])
    assert one_tier(trace, "lru", 100).tiers[0].num_hits == 2
    assert trace.ceiling == pytest.approx(2 / 9)


def test_a_suffix_is_evicted_before_its_head():
    trace = make_trace([["a", "b", "c"], ["x"], ["a", "b"]])
    assert one_tier(trace, "lru", 3).tiers[0].num_hits == 2


def test_a_cascade_is_read_nearest_first_and_holds_as_much_as_its_largest_tier():
    requests = [[f"{number}", f"{number} tail"] for number in range(10)]
    trace = make_trace(requests + requests[::-1])
    result = replay(trace, [TierSpec("device", "lru", 4), TierSpec("disk", "lru", 20)])
    device, disk = result.tiers
    assert (device.num_hits, disk.num_hits) == (4, 16)
    assert result.hit_ratio == 0.5
    assert disk.num_stores == 20 and disk.num_evictions == 0
    assert device.num_stores == 20 + 16


def test_a_gate_writes_a_fraction_of_what_lru_writes(head: Trace):
    capacity = head.num_unique // 20
    gate = one_tier(head, "lru?store_threshold=2", capacity)
    assert (
        gate.stores_per_reference
        < 0.25
        < 0.9
        < one_tier(head, "lru", capacity).stores_per_reference
    )


@pytest.mark.parametrize("share", SHARES)
def test_no_policy_beats_the_bound(head: Trace, share: float):
    capacity = int(head.num_unique * share)
    bound = belady_hit_ratio(head, capacity)
    for policy in ("auto", "tinylfu"):
        assert one_tier(head, policy, capacity).hit_ratio <= bound


def test_the_bound_by_hand():
    trace = make_trace([["a"], ["b"], ["c"], ["a"], ["b"], ["c"]])
    assert belady_hit_ratio(trace, 1) == pytest.approx(1 / 6)
    assert belady_hit_ratio(trace, 2) == pytest.approx(2 / 6)
    assert belady_hit_ratio(trace, 3) == trace.ceiling == 0.5


def test_a_repeated_block_of_a_request_counts_once():
    assert make_trace([["a", "a", "b"]]).num_references == 2


def test_times_in_milliseconds_and_in_seconds(tmp_path: Path):
    rows = [{"timestamp": 5000, "hash_ids": [1]}, {"timestamp": 2000, "hash_ids": [2]}]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert load_trace(path).duration_s == pytest.approx(3.0)
    assert load_trace(path).requests[0] == make_trace([[2]]).requests[0]
    path.write_text(
        '{"timestamp": 0.5, "hash_ids": [1], "chat_id": 7}\n{"timestamp": 61.25, "hash_ids": ["a"]}'
    )
    assert load_trace(path).duration_s == pytest.approx(60.75)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"hash_ids": [1]}\n\n{"hash', r"line 3 is not JSON \(Unterminated .*at character 2\)"),
        (100_000 * "[", r"line 1 is not JSON \(nested too deeply\)"),
        ('{"hash_ids": [' + 5000 * "9" + "]}", "line 1 is not JSON .Exceeds the limit"),
        ("[1]", "no hash_ids"),
        ('{"hash_ids": 3}', "hash_ids 3; expected a list"),
        ('{"hash_ids": [1.5]}', "1.5 in hash_ids; expected names"),
        ('{"hash_ids": [[1]]}', r"\[1\] in hash_ids; expected names"),
        ('{"hash_ids": [true]}', "True in hash_ids; expected names"),
        ('{"hash_ids": [1], "timestamp": ' + 400 * "9" + "}", "timestamp 9999"),
        ('{"hash_ids": [1], "timestamp": 1e400}', "timestamp inf"),
        ('{"hash_ids": [1], "timestamp": "noon"}', "timestamp 'noon'"),
        ('{"hash_ids": [1], "timestamp": NaN}', "timestamp nan"),
        ('{"hash_ids": ["' + 300 * "x" + '"]}', "more than 256 characters"),
        ('{"hash_ids": []}', "no requests"),
        ("", "no requests"),
    ],
)
def test_what_is_not_a_trace_is_refused(tmp_path: Path, line: str, told: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=told):
        load_trace(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    cut, damaged = tmp_path / "cut.jsonl.gz", tmp_path / "damaged.jsonl.gz"
    packed = gzip.compress(b'{"hash_ids": [1]}\n')
    cut.write_bytes(packed[:-6])
    damaged.write_bytes(packed[:10] + b"\xff" + packed[11:])
    for path, why in (
        (tmp_path / "none.jsonl", "No such file"),
        (tmp_path, "Is a directory"),
        (cut, "ended before"),
        (damaged, "invalid block type"),
    ):
        with pytest.raises(ConfigError, match=f"cannot read the trace {path}.*: .*{why}"):
            load_trace(path)
