import json
import signal
import sys
import time
from pathlib import Path

import pytest

from bench import peers_cpu
from bench.peers import checkpoint, gguf, machine
from bench.peers.engines import Process
from bench.peers.measures import TooFast, decode_rate
from bench.peers.report import ratios
from bench.peers.workload import Run


def test_a_run_without_peers_prints_a_line_for_every_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "lines.jsonl"
    options = ["--shape", "tiny", "--dtypes", "float32", "--modes", "process", "--peers", ""]
    options += ["--rounds", "1", "--patience", "0", "--cache", str(tmp_path), "--out", str(out)]
    assert peers_cpu.main(options) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    figures = {f"{x['measure']} {x['figure']}": x for x in lines if "measure" in x}
    assert set(figures) == {
        "decode_1 rate",
        "decode_3 rate",
        "ragged_4 rate",
        "prefill_48 rate",
        "ttft time",
        "prefix_64 cold",
        "prefix_64 warm",
        "prefix_64 gain",
        "memory peak_rss",
    }
    assert all(x["values"]["jaxserve"] > 0 for x in figures.values())
    assert all(x["commit"] and x["date"] and x["device"] for x in lines)
    assert 0 < figures["decode_1 rate"]["fraction_of_limit"]["jaxserve"] < 1
    assert "decode_3 rate" in printed.err


def test_decode_rate_counts_the_tokens_after_the_last_prompt_is_done():
    # Two answers of four tokens; one of them comes in pieces of two tokens.
    run = Run(((1.0, 2.0, 3.0, 4.0), (2.0, 4.0)), (4, 4))
    assert decode_rate(run) == (2 + 2) / 2.0


def test_decode_rate_refuses_answers_that_came_in_one_piece():
    with pytest.raises(TooFast):
        decode_rate(Run(((1.0,),), (4,)))


def test_ratios_are_above_one_where_jaxserve_is_better():
    assert ratios({"jaxserve": 30.0, "a": 10.0}, more_is_better=True) == {"a": 3.0}
    assert ratios({"jaxserve": 30.0, "a": 60.0}, more_is_better=False) == {"a": 2.0}


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_the_gguf_file_holds_the_tensors_of_the_checkpoint(tmp_path: Path, dtype: str):
    shape = checkpoint.SHAPES["tiny"]
    folder = checkpoint.make("tiny", dtype, tmp_path)
    data = gguf.write(folder, shape, dtype).read_bytes()
    weights = (folder / "model.safetensors").read_bytes()
    header_size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + header_size])
    begin, end = header["lm_head.weight"]["data_offsets"]
    head = weights[8 + header_size + begin : 8 + header_size + end]
    assert data.endswith(head) and len(data) % gguf.ALIGNMENT == 0


def test_an_engine_that_left_its_servers_session_is_counted_and_ended_with_it(tmp_path: Path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "print(child.pid, file=open('child', 'w'), flush=True)\n"
        "time.sleep(600)\n"
    )
    server = Process("server", [sys.executable, "-c", code], tmp_path, {}, has_pipe=False)
    try:
        written = tmp_path / "child"
        while not written.exists() or not written.read_text().endswith("\n"):
            assert server.popen.poll() is None
            time.sleep(0.01)
        child = int(written.read_text())
        assert machine.sessions_of(server.popen.pid) == {server.popen.pid, child}
        assert machine.peak_rss_bytes(server.popen.pid) > machine.peak_rss_bytes(child) > 0
        server.signal(signal.SIGSTOP)
    finally:
        server.close()  # the server dies at once, and the child has no living parent to be found by
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and _is_running(child):
        time.sleep(0.01)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    """Neither gone nor dead and waiting for somebody to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
