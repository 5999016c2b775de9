"""What the demo shows, against a fake engine."""

from pathlib import Path

import pytest

from jaxserve import demo
from tests.fake_engine import REPLY, FakeEngine, byte_level_backend
from tests.server.test_live import Live


def test_the_demo_shows_answers_timings_and_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import openai

    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(demo, "checkpoint_path", lambda: tmp_path)
    server = Live(FakeEngine(max_model_len=2000))
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            demo.converse(client)
    finally:
        server.stop()
    out = capsys.readouterr().out
    assert out.count(REPLY[:20]) == 3
    assert "tokens/s" in out and " 0 of them cached" in out and "times sooner" in out


def test_the_demo_says_so_if_the_server_ends_early(capfd: pytest.CaptureFixture[str]):
    assert demo.main(["--page-size", "0"]) == 1
    err = capfd.readouterr().err
    assert "the demo failed: the server ended before it was ready" in err
    assert "jaxserve: error: cache.page_size is 0" in err
