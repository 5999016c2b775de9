"""Writes docs/cli.md from the commands themselves, so that no flag can be missing there."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxserve.cli.commands import root_group

PAGE = Path(__file__).parent / "cli.md"

HEAD = """# The command

Every command and flag of `jaxserve`. Most commands also take a flag for each setting in
[configuration.md](configuration.md), which are not repeated here; `jaxserve COMMAND --help` has all
of them. `jaxserve --install-completion` makes the shell complete commands, flags and choices.

A mistake in the command line or in the settings is one line on standard error and exit status 2;
any other failure is one line and exit status 1; Ctrl-C is 130.

This page is written by `make docs`.
"""

SETTINGS_SUFFIX = " settings"


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_sections(root_group(), [])).rstrip() + "\n"


def _sections(command: Any, words: list[str]) -> Iterator[str]:
    ctx = command.make_context(" ".join(["jaxserve", *words]), [], resilient_parsing=True)
    if words:
        yield "\n" + _section(command, ctx, words)
    for name in getattr(command, "entries", {}):
        yield from _sections(command.get_command(ctx, name), [*words, name])


def _section(command: Any, ctx: Any, words: list[str]) -> str:
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    lines = [f"{'#' * (len(words) + 1)} jaxserve {' '.join(words)}", ""]
    for paragraph in paragraphs:
        lines += [" ".join(paragraph.split()), ""]
    rows, has_settings = [], False
    for param in command.get_params(ctx):
        section = getattr(param, "rich_help_panel", None) or ""
        if section.endswith(SETTINGS_SUFFIX):
            has_settings = True
        elif param.name != "help" and not getattr(param, "hidden", False):
            rows.append(
                f"| `{_spelling(param)}` | {(param.help or '').replace('|', chr(92) + '|')} |"
            )
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    if has_settings:
        lines += ["And a flag for each [setting](configuration.md).", ""]
    return "\n".join(lines)


def _spelling(param: Any) -> str:
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper()
    if len(param.opts) == 1 and param.secondary_opts:
        return "--[no-]" + param.opts[0].removeprefix("--")
    text = ", ".join(sorted(param.opts, key=len))
    return text if param.is_flag or not param.metavar else f"{text} {param.metavar}"


if __name__ == "__main__":
    PAGE.write_text(page())
