"""Docs that cannot drift from the code."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from jaxserve.cli.commands import ENTRIES
from jaxserve.config import Config

ROOT = Path(__file__).parents[1]


def maker(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_the_settings_say():
    module = maker("make_configuration")
    assert module.PAGE.read_text() == module.page(), "run `make docs`"


def test_the_command_page_has_every_command_and_flag():
    module = maker("make_cli")
    assert module.PAGE.read_text() == module.page(), "run `make docs`"
    for name in ENTRIES:
        assert f"## jaxserve {name}\n" in module.page()


def test_every_command_of_the_task_pages_exists_with_its_flags():
    known = {name: entry.load(name) for name, entry in ENTRIES.items()}
    for page in ("serve", "chat", "batch", "benchmark"):
        text = (ROOT / "docs" / f"{page}.md").read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:^|`|\$ |\| )jaxserve ([a-z][^`\n]*)", text, re.MULTILINE):
            command: Any = known[line.split()[0]]
            below = getattr(command, "entries", None)
            if below is not None:
                command = below[line.split()[1]].load(line.split()[1])
            flags = {spelt for p in command.params for spelt in (*p.opts, *p.secondary_opts)}
            for flag in re.findall(r"(?<!\S)-{1,2}[a-z][a-z-]*", line.partition("#")[0]):
                assert flag in flags, f"docs/{page}.md: jaxserve {line}: {flag}"


def test_every_link_between_the_docs_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_in_the_readme_tree_exists():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if not line.startswith(" "):
            folder = names[0]
            assert (ROOT / folder).is_dir(), folder
            continue
        for name in names:
            assert (ROOT / folder / name).exists(), f"{folder}{name}"


def test_the_architecture_page_names_every_layer():
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c for c in contracts["contracts"] if c["type"] == "layers")["layers"]
    page = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    rows = [re.split(r"\s{2,}", row)[0] for row in page.strip().splitlines()]
    assert [row.replace(", ", " | ") for row in rows] == layers


def test_the_default_config_is_valid():
    Config()


def test_the_performance_page_has_what_the_result_files_say():
    path = ROOT / "docs" / "make_performance.py"
    spec = importlib.util.spec_from_file_location("make_performance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `make docs`"
