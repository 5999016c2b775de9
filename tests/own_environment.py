"""Interpreters with packages that the tests' own environment does not have."""

import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_with(packages: Sequence[str], name: str) -> str:
    """An interpreter that has the packages, in `.venv-NAME`; installs them on the first call.

    NAME_PYTHON in the environment names another interpreter to use instead.
    """
    if given := os.environ.get(f"{name.upper().replace('-', '_')}_PYTHON"):
        return given
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing {', '.join(packages)} into {folder.name} (once)", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / ".installed").touch()
    return str(python)
