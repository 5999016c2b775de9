"""The GPU suite works where there is no GPU: the same parts, tiny and interpreted.

All parts with GPU_SUITE_IN_FULL=1 (`make test-gpu-suite`), otherwise two of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.parts import BACKGROUND, PARTS, Part
from bench.gpu.report import append, read_limits, read_lines
from bench.gpu.suite import _run
from bench.gpu.summary import summary

ROOT = Path(__file__).parents[2]
IN_FULL = os.environ.get("GPU_SUITE_IN_FULL") == "1"
ALWAYS = {"limits", "kernels", "layers", "tiers"}
TWICE = {"tests", "quick-tests", "steps-qwen3", "steps-graphs"}
"""The same code as another part, or tests that run by themselves."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a tiny run of the parts writes."""
    folder = tmp_path_factory.mktemp("suite")
    known = {part.name for part in PARTS} - TWICE
    names = known if IN_FULL else ALWAYS
    command = ["bash", "bench/gpu/suite.sh", "--tiny", "--out", str(folder), "--only"]
    done = subprocess.run(
        [*command, ",".join(sorted(names))],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "WHEELS": str(folder / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    (path,) = folder.glob("gpu-tiny-*.jsonl")
    found = list(read_lines(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return found


def test_no_part_fails_and_every_line_says_what_it_was_measured_on(lines: list[dict[str, Any]]):
    assert [line for line in lines if "failed" in line] == []
    for line in lines:
        assert {"part", "commit", "date", "device", "versions"} <= line.keys() and line["tiny"]


def test_each_part_measures_what_it_is_for(lines: list[dict[str, Any]]):
    def of(part: str, name: str) -> set[Any]:
        return {line[name] for line in lines if line["part"] == part and name in line}

    assert {"copy_bytes_per_s", "read_bytes_per_s", "bf16_flops"} <= of("limits", "limit")
    assert {"to_host_bytes_per_s", "to_device_bytes_per_s"} <= of("limits", "limit")
    assert of("kernels", "backend") >= {"mosaic_gpu", "triton", "xla"}
    assert {"save, all hops", "load, all hops", "step with saves under way"} <= of(
        "tiers", "figure"
    )
    assert of("layers", "loop") == {"unrolled", "scan"}
    if not IN_FULL:
        return
    assert {"prefill", "decode", "profile"} <= of("steps", "figure")
    assert of("tune", "backend") == {"mosaic_gpu", "triton"}


def test_figures_stand_beside_the_limit_of_the_same_machine(lines: list[dict[str, Any]]):
    kernels = [x for x in lines if x["part"] == "kernels" and "us" in x]
    # Not above 0: rounded, it is 0 if something else takes the cores meanwhile.
    assert kernels and all(line["fraction"] is not None for line in kernels)
    # bfloat16, against the plain XLA backend on the same arrays.
    errors = [line["error"] for line in kernels if line.get("error") is not None]
    assert errors and max(errors) < 0.02


def crashing(kind: str) -> Part:
    return Part(kind, "", 20.0, "a part that is not well")


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import os; print('its last words', flush=True); os.kill(os.getpid(), 11)", "failed"),
        ("import time; print('its last words', flush=True); time.sleep(99)", "stopped"),
    ],
)
def test_a_part_that_crashes_or_hangs_costs_itself_and_leaves_its_last_words(
    code: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def start(part: Any, out: Any, log: Any, is_tiny: Any, limit_s: Any) -> Any:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True
        )

    monkeypatch.setattr("bench.gpu.suite._start", start)
    monkeypatch.setattr("bench.gpu.suite.MIN_S", 0.0)
    with (tmp_path / "log").open("ab") as log:
        found = _run(crashing("ill"), tmp_path / "out", log, is_tiny=True, left_s=3.0)
    assert found["outcome"].startswith(outcome)
    assert "its last words" in found["log_tail"]


def test_a_result_that_was_cut_off_does_not_spoil_those_before_it(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append(path, {"part": "limits", "limit": "read_bytes_per_s", "rate": 4e12})
    with path.open("a") as file:
        file.write('{"part": "limits", "limit": "copy_by')
    assert read_limits(path).read_bytes_per_s == 4e12
    assert read_limits(path).seconds(4e12) == 1.0


def test_the_summary_shows_fractions_and_names_what_failed():
    lines = [
        {"part": "kernels", "job": "attention decode", "backend": "triton", "us": 5.0}
        | {"fraction": 0.87},
        {"part": "tiers", "figure": "moves", "failed": "XlaRuntimeError: out of memory"},
    ]
    text = summary(lines)
    assert "87%" in text and "FAILED tiers: moves: XlaRuntimeError" in text


def test_every_part_can_be_started_by_its_name():
    for part in (*PARTS, BACKGROUND):
        if part.module:
            source = (ROOT / "bench" / "gpu" / f"{part.module}.py").read_text()
            assert f"\ndef {part.function}(context: Context)" in source, part.name
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.suite", "--list", "--only", "tune,limits"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["limits", "tune"]


def test_tuned_sizes_are_written_in_the_form_that_kernels_read(lines: list[dict[str, Any]]):
    if not IN_FULL:
        pytest.skip("GPU_SUITE_IN_FULL=1 runs the part that tunes")
    best = [line["best"] for line in lines if line["part"] == "tune" and "best" in line]
    package = ROOT / "pallas_kernels" / "paged_attention" / "tuned"
    for found in best:
        name = "triton" if "num_sms" in found else "mosaic_gpu"
        known = json.loads((package / f"{name}.json").read_text())["NVIDIA H200"]
        assert found.keys() <= known.keys() and found["decode"][0].keys() == (
            known["decode"][0].keys()
        )
