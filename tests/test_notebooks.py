"""The notebooks run from top to bottom, and what they were committed with is what they show."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def kinds(notebook: Any) -> list[list[str]]:
    """What kinds of things each cell shows."""
    return [
        sorted({kind for output in cell.get("outputs", ()) for kind in output.get("data", ())})
        for cell in notebook.cells
    ]


def test_there_are_two_notebooks():
    assert NAMES == ["looking_inside.ipynb", "serving_and_reading_results.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_with_its_outputs_and_without_errors(name: str):
    notebook = read(name)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    whole = (NOTEBOOKS / name).read_text()
    assert not [place for place in ("/root/", "/home/", "/work/") if place in whole]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_the_same_kinds_of_things(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' several devices
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    committed, running = read(name), read(name)
    kernel = {
        "kernel_name": "python3",
        "timeout": 900,
        "resources": {"metadata": {"path": NOTEBOOKS}},
    }
    NotebookClient(running, **kernel).execute()
    assert kinds(running) == kinds(committed)
    texts = ["".join(o.get("text", "") for o in c.get("outputs", ())) for c in running.cells]
    assert not [text for text in texts if "Traceback" in text]
    if name.startswith("serving"):
        assert texts[-1].strip() == "freed"
    else:
        assert "nothing is damaged" in texts[-1]
    assert os.environ.get("XDG_CACHE_HOME")  # nothing went into the user's own cache
