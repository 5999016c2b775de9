import json
import os
from pathlib import Path

import pytest
import yaml

from jaxserve.cli import main
from jaxserve.settings import all_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith("JAXSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")


def test_show_tells_where_each_value_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "c.yaml"
    file.write_text("port: 9\ncache:\n  # small\n  page-size: 32\n")
    monkeypatch.setenv("JAXSERVE_SEED", "4")
    assert main(["config", "show", "--config", str(file), "--host", "127.0.0.4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["port"]["value"] == 9 and shown["port"]["origin"] == f"{file}:1"
    assert shown["page_size"]["value"] == 32 and shown["page_size"]["origin"] == f"{file}:4"
    assert shown["seed"]["value"] == 4 and shown["seed"]["origin"] == "JAXSERVE_SEED"
    assert shown["host"]["value"] == "127.0.0.4" and shown["host"]["origin"] == "--host"
    assert shown["max_num_seqs"]["origin"] == "default"
    assert list(shown) == list(all_settings())
    assert main(["config", "show", "--seed", "5", "--changed"]) == 0
    out = capsys.readouterr().out
    assert "--seed" in out and "port" not in out


def test_show_hides_keys_and_passwords(capsys: pytest.CaptureFixture[str]):
    argv = ["config", "show", "--api-key", "s3cret", "--kv-host-bytes", "1GiB"]
    argv += ["--kv-store", "redis://me:hunter2@10.0.0.1/0"]
    for how in ([], ["--json"], ["--yaml"]):
        assert main([*argv, *how]) == 0
        out = capsys.readouterr().out
        assert "s3cret" not in out and "hunter2" not in out and "10.0.0.1" in out


def test_what_show_prints_as_yaml_is_a_file_that_says_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    argv = ["config", "show", "--page-size", "32", "--no-warmup", "--policy", "priority"]
    assert main([*argv, "--yaml"]) == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert main([*argv, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["config", "show", "--config", str(file), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert {n: v["value"] for n, v in first.items()} == {n: v["value"] for n, v in second.items()}


def test_check_accepts_a_right_file_and_points_into_a_wrong_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "c.yaml"
    file.write_text("port: 9\nserver:\n")
    assert main(["config", "check", str(file)]) == 0
    assert "1 settings, all right" in capsys.readouterr().out
    file.write_text("port: 9\npage_sise: 3\n")
    assert main(["config", "check", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:2: unknown key 'page_sise'; did you mean page_size?" in err
    assert err.count("\n") == 1


def test_the_schema_has_every_setting_flat_and_in_its_section(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for name, setting in all_settings().items():
        assert name in schema["properties"]
        section = schema["properties"][setting.section]
        section = section.get("anyOf", [section])[-1]  # `model` is a key, too
        assert name in section["properties"]
    assert schema["properties"]["dtype"]["enum"][0] == "auto"
    assert yaml.safe_load("port: 1") and not schema["additionalProperties"]
