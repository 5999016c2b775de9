from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main
from jaxserve.config import Config, SchedulerConfig
from tests.cli.batch_kills import LINES_A_KILL, kill_and_resume, read_output, write_batch
from tests.fake_engine import REPLY, FakeEngine
from tests.live_server import live_server

NUM_KILLS = 4


@pytest.fixture
def url() -> Iterator[str]:
    with live_server(FakeEngine(step_s=0.002)) as base:
        yield base


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    built: list[FakeEngine] = []

    def build(config: Config, *args: Any) -> FakeEngine:
        built.append(FakeEngine(config=config))
        return built[-1]

    monkeypatch.setattr("jaxserve.engine.build_engine", build)
    return built


def test_every_line_gets_the_answer_of_its_endpoint(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, 20)
    assert main(["run-batch", "-i", str(source), "-o", str(target), "--url", f"{url}/v1"]) == 0
    records = {record["custom_id"]: record for record in read_output(target)}
    assert set(records) == {f"r-{index}" for index in range(20)}
    for index in range(20):
        response = records[f"r-{index}"]["response"]
        assert response["status_code"] == 200 and records[f"r-{index}"]["error"] is None
        expected = "chat.completion" if index % 2 else "text_completion"
        assert response["body"]["object"] == expected and response["request_id"]
    assert "20 answered, 0 failed, of 20" in capsys.readouterr().out


def test_an_engine_of_its_own_answers_where_there_is_no_url(
    engines: list[FakeEngine], tmp_path: Path
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, 3)
    assert main(["run-batch", "-i", str(source), "-o", str(target)]) == 0
    (engine,) = engines
    assert len(engine.added) == 3 and engine.closed
    texts = [r["response"]["body"]["choices"][0] for r in read_output(target)]
    assert all(REPLY.startswith(t["text"] if "text" in t else "") for t in texts)


def test_kills_lose_no_line_and_double_none(url: str, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    num_lines = LINES_A_KILL * NUM_KILLS
    write_batch(source, num_lines)
    killed = kill_and_resume(source, target, url, NUM_KILLS, seed=3)
    assert killed.num_before < num_lines, "the kills came too late to show anything"
    assert killed.exit_status == 0 and not killed.bad
    assert killed.ids == {f"r-{index}": 1 for index in range(num_lines)}


def test_a_request_that_the_server_refuses_has_its_error_in_the_output(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, 1, url="/v1/completions", body={"model": "fake", "top_p": 7, "prompt": "x"})
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--url", url]
    assert main(argv) == 1
    (record,) = read_output(target)
    assert record["response"]["status_code"] == 400
    assert "top_p" in record["response"]["body"]["error"]["message"]
    write_batch(source, 1, url="/v1/completions", body={"model": "fake", "prompt": "x"})
    assert main(argv) == 1, "it is done, and failed"
    assert main([*argv, "--retry-failed"]) == 0
    (record,) = read_output(target)
    assert record["response"]["status_code"] == 200


def test_a_full_queue_is_waited_for(tmp_path: Path):
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_waiting=0)
    engine = FakeEngine(config=Config(scheduler=scheduler), step_s=0.005)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, 3)
    with live_server(engine) as url:
        argv = ["run-batch", "-i", str(source), "-o", str(target), "--url", url]
        assert main(argv) == 0
    assert {r["response"]["status_code"] for r in read_output(target)} == {200}


def test_a_server_out_of_reach_ends_the_run_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxserve.batch_files.runner.FIRST_PAUSE_S", 40.0)
    monkeypatch.setattr("asyncio.sleep", _no_sleep)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, 2)
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--url", "http://127.0.0.1:1"]
    assert main(argv) == 1
    assert "out of reach" in capsys.readouterr().err and target.read_text() == ""


async def _no_sleep(seconds: float) -> None: ...


def test_lines_that_are_no_requests_are_refused_before_anything_runs(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, 2)
    with source.open("a") as file:
        file.write("{broken\n" + source.read_text().splitlines()[0] + "\n")
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--url", url]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "2 of 4 lines" in err and "line 3: not JSON" in err and "that of line 1, too" in err
    assert err.count("\n") == 1 and not target.exists()
    assert main([*argv, "--skip-invalid"]) == 1
    records = read_output(target)
    assert len(records) == 4
    bad = sorted(r["error"]["line"] for r in records if r["error"])
    assert bad == [3, 4] and all(r["response"] is None for r in records if r["error"])
    assert main([*argv, "--skip-invalid"]) == 1
    assert len(read_output(target)) == 4, "lines that are no requests were answered twice"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing option"),
        (["-i", "/nowhere", "-o", "x"], "cannot read /nowhere"),
        (["-i", "{empty}", "-o", "x"], "is empty"),
        (["-i", "{batch}", "-o", "/nowhere/x"], "cannot write /nowhere/x"),
        (["-i", "{batch}", "-o", "{batch}"], "the same file"),
        (["-i", "{batch}", "-o", "x", "--max-concurrency", "0"], "expected 1 to"),
        (["-i", "{batch}", "-o", "x", "--timeout", "-1"], "expected seconds"),
        (["-i", "{batch}", "-o", "x", "m", "--url", "http://x"], "either a model or --url"),
    ],
)
def test_wrong_options_are_one_line_and_exit_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    write_batch(Path("batch"), 1)
    names = {"{empty}": "empty", "{batch}": "batch"}
    assert main(["run-batch", *(names.get(word, word) for word in argv)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
