"""Every example of docs/calling.md runs, against a live server over a fake engine."""

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_engine import REPLY, FakeEngine
from tests.server.live import Live

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
TINY = ROOT / "tests" / "fixtures" / "tiny" / "llama31-v0"
TINY_LLM = f'LLM("{TINY}", dtype="float32", max_model_len=96, warmup=False, progress=False)'


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "calling.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Live(FakeEngine(model_name="jaxserve-embedded"))
    yield server.url
    server.stop()


@pytest.mark.parametrize("block", [b for b in blocks("python") if "LLM" not in b])
def test_the_python_examples_run(
    url: str, block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "example.py"
    path.write_text(block.replace(URL, url))
    runpy.run_path(str(path))
    printed = capsys.readouterr().out
    assert "Hello" in printed or "embeddings of" in printed, REPLY


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("block", blocks("sh"))
def test_the_curl_examples_run(url: str, block: str):
    for command in re.findall(r"curl .*?(?=\ncurl|\Z)", block, re.DOTALL):
        run = subprocess.run(
            ["bash", "-c", command.replace(URL, url)], capture_output=True, text=True, timeout=30
        )
        answer = json.loads(run.stdout)
        assert ("error" in answer) == ('"temperature": -1' in command), answer


def test_the_notebook_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (block,) = [b for b in blocks("python") if "LLM" in b]
    path = tmp_path / "example.py"
    path.write_text(re.sub(r"LLM\(max_num_seqs=4\)", TINY_LLM, block))
    runpy.run_path(str(path))
    assert "(8, 256) (8, 64)" in capsys.readouterr().out


def test_the_page_lists_every_route(url: str):
    from jaxserve.server.app import create_app

    page = (ROOT / "docs" / "calling.md").read_text()
    app = create_app(FakeEngine())
    while not hasattr(app, "routes"):
        app = app._app  # pyright: ignore
    for route in app.routes:  # pyright: ignore
        path = re.sub(r"\{.*?\}", "{id}", route.path)
        known = path.startswith(("/admin/kv/", "/web/")) or path == "/openapi.json"
        assert known or path.removesuffix("/input_items") in page, path
