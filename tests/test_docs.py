"""Docs that cannot drift from the code."""

import asyncio
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.cli.commands import ENTRIES
from jaxserve.config import Config, ServerConfig
from jaxserve.server.app import create_app
from tests.fake_engine import FakeEngine
from tests.server.conftest import serving
from tests.web.watched_engine import WatchedEngine

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def maker(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words() -> str:
    """All pages together."""
    return "\n".join(page.read_text() for page in (ROOT / "README.md", *DOCS.glob("*.md")))


@pytest.mark.parametrize("name", ["make_configuration", "make_api"])
def test_pages_that_are_generated_are_what_the_code_says(name: str):
    module = maker(name)
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
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, place = target.partition("#")
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            if place and file.suffix == ".md":
                assert place in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_every_page_can_be_reached_from_the_index():
    found, left = set[str](), ["README.md"]
    while left:
        name = left.pop()
        found.add(name)
        linked = re.findall(r"\]\(([\w.-]+\.md)[)#]", (DOCS / name).read_text())
        left += [other for other in set(linked) - found if (DOCS / other).exists()]
    missing = {page.name for page in DOCS.glob("*.md")} - found
    assert not missing, f"no page links to {missing}: add them to docs/README.md"


def test_every_endpoint_is_documented():
    engine = FakeEngine(config=Config(server=ServerConfig(admin_key="boss")))
    documented = words()
    app: Any = create_app(engine)
    while not hasattr(app, "routes"):  # what wraps the routes
        app = getattr(app, "_app", None) or app.app
    for route in app.routes:
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        path = re.sub(r"/\{.*", "", route.path)
        shown = path.removeprefix("/admin/kv/") if path.startswith("/admin/kv/") else path
        pattern = rf"(?<![\w/]){re.escape(shown)}(?![\w-])"
        assert re.search(pattern, documented), f"{path} is on no page"


def test_every_metric_is_documented():
    async def scrape() -> str:
        async with serving(WatchedEngine()) as http:
            return (await http.get("/metrics")).text

    documented = words()
    text = asyncio.run(scrape())
    ours = (one for one in text_string_to_metric_families(text) if one.name.startswith("jaxserve_"))
    families = list(ours)
    assert len(families) > 20
    for family in families:
        name = re.escape(family.name.removeprefix("jaxserve_"))
        assert re.search(rf"{name}(_total)?`", documented), f"{family.name} is on no page"


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
