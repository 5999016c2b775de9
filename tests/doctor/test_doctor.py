import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main
from jaxserve.doctor import host, packages
from jaxserve.doctor.finding import Finding, size


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in list(os.environ):
        if name.startswith("JAXSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(host, "PROBE_BYTES", 4 << 20)


def findings(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}


def test_this_machine_can_serve_and_is_described(capsys: pytest.CaptureFixture[str]):
    found = findings(capsys)
    assert {one["state"] for one in found.values()} <= {"ok", "note"}
    assert "cpu" in found["devices"]["value"] and "jaxlib" in found["jax"]["value"]
    assert "pinned_host gives back what it got" in found["memory kinds"]["value"]
    assert "reference" in found["attention"]["value"]
    assert "mosaic_gpu: needs an NVIDIA GPU" in found["not usable here"]["value"]
    assert "GB/s" in found["cache folder"]["value"] and "free" in found["memory"]["value"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "software" in out and "memlock" in out and " ok" in out.splitlines()[-1]


def test_what_would_fail_is_bad_with_advice_and_exit_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXSERVE_KV_HOST_BYTES", "900TiB")
    monkeypatch.setenv("JAXSERVE_ATTENTION_BACKEND", "tpu")
    found = findings(capsys, status=1)
    assert found["memory"]["state"] == "bad" and "--kv-host-bytes" in found["memory"]["advice"]
    assert found["attention"]["state"] == "bad" and "auto" in found["attention"]["advice"]


def test_a_port_in_use_and_few_files_are_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(host.resource, "getrlimit", lambda what: (256, 4096))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("JAXSERVE_PORT", str(taken.getsockname()[1]))
        found = findings(capsys)
    assert found["port"]["state"] == "note" and "--port" in found["port"]["advice"]
    assert found["ulimit -n"]["advice"] == "ulimit -n 4096 before serving"


@pytest.mark.parametrize(
    ("versions", "state", "advice"),
    [
        ({"jax": "0.11.2", "jaxlib": "0.11.2"}, "ok", ""),
        ({"jax": "0.11.2", "jaxlib": "0.10.2"}, "bad", "of one release"),
        ({"jax": "0.11.2", "jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.0"}, "bad", "0.11.2"),
        ({"jax": "0.11.1", "jaxlib": "0.11.1"}, "note", "copies arrays"),
        ({"jax": "0.10.2"}, "bad", "pip install"),
    ],
)
def test_versions_that_do_not_fit_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], state: str, advice: str
):
    monkeypatch.setattr(packages, "_version", versions.get)
    found = packages._jax()
    assert found.state == state and advice in found.advice


def test_a_check_that_fails_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(config: Any) -> list[Finding]:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr("jaxserve.doctor.device_findings", fail)
    found = findings(capsys, status=1)
    assert found["check"]["value"] == "RuntimeError: no such thing"


def test_a_folder_that_cannot_be_written_is_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(host.os, "access", lambda path, mode: False)
    assert host._folder("x", tmp_path / "new").state == "bad"
    assert size(3 << 30) == "3.0 GiB"
