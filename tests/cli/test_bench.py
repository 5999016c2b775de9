import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.benchmarks.in_process import Weights
from jaxserve.benchmarks.machine import MachineLimits, product_flops, read_bytes_per_s
from jaxserve.cli import main
from jaxserve.config import Config, SchedulerConfig
from tests.fake_engine import FakeEngine
from tests.live_server import live_server


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_model_len=4000, reply=lambda request: [40] * 5000, step_s=0.002)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with live_server(engine) as base:
        yield base


def run(capsys: pytest.CaptureFixture[str], url: str, *argv: str, status: int = 0) -> Any:
    assert main(["bench", "serve", "--url", url, *argv]) == status
    out = capsys.readouterr().out
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_serve_counts_what_the_server_counts(
    url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str], backend: str
):
    argv = ["--num-prompts", "12", "--input-len", "50", "--output-len", "9", "--backend", backend]
    line = run(capsys, url, *argv, "--request-rate", "200", "--goodput", "ttft:5000")
    assert line["completed"] == 12 and line["failed"] == 0 and line["errors"] == {}
    assert line["total_output_tokens"] == 12 * 9 and line["tokens_counted_by"] == "usage"
    assert line["request_goodput"] == line["request_throughput"] and line["goodput_share"] == 1
    prompts = [len(request.prompt_ids) for request in engine.added[-12:]]
    assert line["total_input_tokens"] == sum(prompts)
    assert abs(sum(prompts) / 12 - 50) < 15, "words were to make 50 tokens on average"
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert 0 <= line[f"median_{metric}_ms"] <= line[f"p99_{metric}_ms"]
    assert all(request.sampling.ignore_eos for request in engine.added[-12:])
    assert line["server_metrics"] is not None


def test_serve_keeps_to_the_concurrency_and_runs_turns_one_after_the_other(
    url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
):
    argv = ["--workload", "multi-turn", "--num-prompts", "6", "--num-turns", "3"]
    argv += ["--input-len", "20", "--prefix-len", "30", "--output-len", "5"]
    line = run(capsys, url, *argv, "--max-concurrency", "1", "--num-warmups", "0")
    assert line["completed"] == 6 and line["max_concurrent_requests"] == 1
    prompts = [engine.tokenizer.decode(r.prompt_ids, False) for r in engine.added[-6:]]
    starts = [sum(other.startswith(prompt) for other in prompts) for prompt in prompts]
    assert sorted(starts) == [1, 1, 2, 2, 3, 3], "a turn continues the turns before it"


def test_serve_counts_failures_by_kind(capsys: pytest.CaptureFixture[str]):
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_waiting=0)
    engine = FakeEngine(config=Config(scheduler=scheduler), max_model_len=2000, step_s=0.02)
    with live_server(engine) as url:
        argv = ["--num-prompts", "6", "--input-len", "5", "--output-len", "4"]
        line = run(capsys, url, *argv)
    assert line["completed"] >= 1 and line["failed"] == 6 - line["completed"] > 0
    assert line["errors"] == {"http 429": line["failed"]} and line["first_error"]


def test_serve_writes_a_line_every_request_and_a_picture(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out, plot = tmp_path / "out.jsonl", tmp_path / "p.png"
    argv = ["--num-prompts", "5", "--input-len", "20", "--output-len", "5", "--detailed"]
    run(capsys, url, *argv, "--out", str(out))
    line = run(capsys, url, *argv, "--out", str(out), "--plot", str(plot))
    first, second = map(json.loads, out.read_text().splitlines())
    assert second == line and first["seed"] == line["seed"] and len(line["requests"]) == 5
    assert all(one["output_tokens"] == 5 for one in line["requests"])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--url", "http://127.0.0.1:1"], 1, "no answer from http://127.0.0.1:1/v1"),
        (["--url", "nonsense"], 2, "is not a URL"),
        (["--model", "other"], 1, "serves no model 'other'"),
        (["--workload", "rnd"], 2, "did you mean random?"),
        (["--backend", "vllm"], 2, "openai, openai-chat"),
        (["--workload", "trace"], 2, "--dataset-path FILE"),
        (["--workload", "trace", "--dataset-path", "/nowhere"], 2, "cannot read /nowhere"),
        (["--dataset-path", "x"], 2, "is for trace and sharegpt"),
        (["--request-rate", "0"], 2, "more than 0"),
        (["--request-rate", "nan"], 2, "more than 0"),
        (["--burstiness", "-1"], 2, "more than 0"),
        (["--range-ratio", "2"], 2, "at most 1"),
        (["--num-prompts", "0"], 2, "at least 1"),
        (["--metric-percentiles", "101"], 2, "between 0 and 100"),
        (["--goodput", "ttft"], 2, "--goodput has 'ttft'"),
        (["--input-len", "90000"], 2, "context is 4000"),
        (["--tokenizer", "/nowhere"], 2, "--tokenizer /nowhere"),
        (["--plot", "p.gif"], 2, ".png, .svg, .pdf"),
        (["--plot", "/nowhere/p.png"], 2, "there is no folder"),
    ],
)
def test_serve_tells_what_cannot_be_in_one_line(
    url: str,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    status: int,
    message: str,
):
    assert main(["bench", "serve", *([] if "--url" in argv else ["--url", url]), *argv]) == status
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


LIMITS = MachineLimits(read_bytes_per_s=1e12, flops=1e15)


@pytest.mark.parametrize("what", ["throughput", "latency"])
def test_the_engine_alone_stands_beside_the_machines_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
):
    engines: list[FakeEngine] = []

    def build(config: Config, *args: Any) -> FakeEngine:
        reply = [40] * 500
        engines.append(FakeEngine(config=config, reply=lambda request: reply, step_s=0.001))
        return engines[-1]

    monkeypatch.setattr("jaxserve.engine.build_engine", build)
    monkeypatch.setattr("jaxserve.benchmarks.machine.measure_limits", lambda dtype: LIMITS)
    weights = Weights(num_bytes=10**9, num_multiplied=10**9, kv_bytes_per_token=1000.0)
    monkeypatch.setattr("jaxserve.benchmarks.in_process.weights_of", lambda engine: weights)
    argv = ["bench", what, "--input-len", "20", "--output-len", "5", "--json"]
    if what == "throughput":
        assert main([*argv, "--num-prompts", "3"]) == 0
        line = json.loads(capsys.readouterr().out)
        assert line["num_requests"] == 3 and line["total_num_tokens"] == 3 * 25
        least_s = 2e9 * 60 / 1e15 + 4 * (1e9 + 3 * 22_500) / 1e12
        assert line["share_of_limit"] * line["elapsed_time"] == pytest.approx(least_s, rel=0.02)
        assert len({request.prompt_ids for request in engines[0].added}) == 4
    else:
        assert main([*argv, "--batch-size", "2", "--num-iters", "3"]) == 0
        line = json.loads(capsys.readouterr().out)
        assert line["avg_latency"] > 0 and line["percentiles"]["99"] >= line["percentiles"]["50"]
        step_s = line["decode_step_ms"] / 1e3
        share = (1e9 + 2 * 22_500) / 1e12 / step_s
        assert line["decode_share_of_limit"] == pytest.approx(share, rel=0.02)
    assert main(["bench", what, "--input-len", "500"]) == 2
    assert "the model's context is 256" in capsys.readouterr().err
    assert main(["bench", what, "--output-len", "0"]) == 2


def test_the_machines_limits_are_measured():
    assert 1e8 < read_bytes_per_s(4 << 20) < 1e14
    assert 1e7 < product_flops("float32", 128) < 1e15
