"""The layout that every install route and static tool relies on (docs/architecture.md)."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("models", "pallas_kernels", "server")


def test_packages_in_pyproject_equal_the_folders_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for top in ("jaxserve", *MAPPED):
        for init in (ROOT / top).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            found.add(name if top == "jaxserve" else f"jaxserve.{name}")
    assert found == set(settings["packages"])


@pytest.mark.parametrize("name", MAPPED)
def test_links_point_at_the_mapped_folders(name: str):
    link = ROOT / "jaxserve" / name
    assert link.is_symlink() and str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize("name", MAPPED)
def test_importing_a_mapped_folder_by_its_bare_name_is_refused(name: str):
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0 and f"import jaxserve.{name}" in run.stderr


def test_every_public_name_can_be_imported_and_is_listed():
    jaxserve = importlib.import_module("jaxserve")
    for name in jaxserve.__all__:
        assert getattr(jaxserve, name) is not None
    assert set(jaxserve.__all__) == set(jaxserve._HOME)


def test_importing_jaxserve_or_policy_code_does_not_import_jax():
    modules = "jaxserve, jaxserve.config, jaxserve.plan, jaxserve.scheduler, jaxserve.kv.index"
    code = f"import {modules}, sys; assert 'jax' not in sys.modules, 'jax was imported'"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
