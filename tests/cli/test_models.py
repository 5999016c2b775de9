import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.embedded import checkpoint_path
from tests.cli.fake_hub import FakeHub, fake_hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(checkpoint_path(), folder / "good")
    (folder / "good" / "pytorch_model.bin").write_bytes(b"a pickle")
    shutil.copytree(checkpoint_path(), folder / "strange")
    config = json.loads((folder / "good" / "config.json").read_text())
    config |= {"architectures": ["StrangeForCausalLM"], "model_type": "strange"}
    (folder / "strange" / "config.json").write_text(json.dumps(config))
    names = {"org/good": folder / "good", "org/strange": folder / "strange"}
    with fake_hub(names) as running:
        yield running


class Home:
    """A user whose caches are empty at first."""

    def __init__(self, folder: Path, hub: FakeHub):
        self.folder = folder
        self._environ = {
            **os.environ,
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "COLUMNS": "100",
        }

    def run(self, *argv: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "jaxserve.cli", *argv]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environ,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def home(tmp_path: Path, hub: FakeHub) -> Home:
    hub.asked.clear()
    return Home(tmp_path, hub)


def test_a_model_is_pulled_listed_and_removed(home: Home, hub: FakeHub):
    assert "no models" in home.run("list").stdout
    done = home.run("pull", "org/good")
    assert "LlamaForCausalLM, bfloat16" in done.stdout and "jaxserve serve org/good" in done.stdout
    assert "%" in done.stderr, "no progress was shown"
    assert not [asked for asked in hub.asked if asked.endswith(".bin")], "a pickle was fetched"
    (model,) = json.loads(home.run("list", "--json").stdout)
    weights = (checkpoint_path() / "model.safetensors").stat().st_size
    assert model["name"] == "org/good" and model["servable"] and model["num_bytes"] > weights
    assert (Path(model["folder"]) / "model.safetensors").stat().st_size == weights
    shown = home.run("list").stdout
    assert "org/good" in shown and "MiB" in shown and "yes" in shown
    err = home.run("rm", "org/good", status=2).stderr
    assert "nobody is there to ask; give --yes" in err and Path(model["folder"]).exists()
    assert "did you mean org/good?" in home.run("rm", "org/god", status=2).stderr
    assert "deleted org/good" in home.run("rm", "org/good", "--yes").stdout
    assert not Path(model["folder"]).exists() and "no models" in home.run("list").stdout


def test_a_model_that_cannot_be_served_is_not_fetched(home: Home, hub: FakeHub):
    err = home.run("pull", "org/strange", status=1).stderr
    assert "org/strange cannot be served" in err and "--force" in err and err.count("\n") == 1
    assert not [asked for asked in hub.asked if "safetensors" in asked]
    done = home.run("pull", "org/strange", "--force")
    assert "cannot be served" in done.stderr
    (model,) = json.loads(home.run("list", "--json").stdout)
    assert not model["servable"] and "strange" in model["problem"].lower()


def test_a_download_that_breaks_goes_on_where_it_stopped(home: Home, hub: FakeHub):
    hub.cut_after = 500_000
    first = subprocess.run  # the client itself may go on; if not, the second call does
    assert first is not None
    try:
        home.run("pull", "org/good")
    except AssertionError:
        home.run("pull", "org/good")
    (model,) = json.loads(home.run("list", "--json").stdout)
    fetched = (Path(model["folder"]) / "model.safetensors").read_bytes()
    assert fetched == (checkpoint_path() / "model.safetensors").read_bytes()


def test_converted_checkpoints_are_listed_and_removed(home: Home):
    target = home.folder / "orbax"
    home.run("convert", str(checkpoint_path()), str(target))
    (model,) = json.loads(home.run("list", "--json").stdout)
    assert model["name"] == str(target.resolve()) and model["kind"] == "orbax"
    assert model["servable"] and model["dtype"] == "bfloat16" and model["num_bytes"] > 1 << 20
    home.run("rm", str(target.resolve()), "-y")
    assert not target.exists() and json.loads(home.run("list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["pull"], 2, "missing argument 'NAME'"),
        (["pull", "nothing"], 2, "no hub name; expected one such as org/model"),
        (["pull", "org/nothing"], 1, "config.json cannot be fetched"),
        (["rm"], 2, "missing argument 'NAME...'"),
        (["rm", "x", "--yes"], 2, "there are no models"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(home: Home, argv: list[str], status: int, message: str):
    err = home.run(*argv, status=status).stderr
    assert message in err and err.count("\n") == 1
