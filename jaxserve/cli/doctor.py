"""`jaxserve doctor`: what this machine offers, what is missing, and what to do about it."""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from jaxserve.cli.app import option
from jaxserve.cli.flags import config_flag, expand, settings_of
from jaxserve.settings import Settings, all_settings

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("bad", "bold red")}


def _with_config(function: Callable[..., int]) -> Callable[..., int]:
    def build(values: dict[str, Any]) -> Settings:
        return settings_of(dict.fromkeys(all_settings()), values["config_file"])

    return expand(function, "settings", [config_flag()], build)


@_with_config
def doctor(
    *,
    as_json: Annotated[bool, option("--json", help="print JSON")] = False,
    settings: Settings,
) -> int:
    """Check device, versions, kernels, memory, disk and limits, and say what to do about them.

    Looks at the port and the folders that the settings in force name. Exit status 1 if something is
    bad: serving would fail.
    """
    from jaxserve.doctor import examine

    findings = examine(settings.config)
    num_bad = sum(finding.state == "bad" for finding in findings)
    if as_json:
        rows = [
            {
                "area": f.area,
                "name": f.name,
                "state": f.state,
                "value": f.value,
                "advice": f.advice or None,
            }
            for f in findings
        ]
        print(json.dumps({"findings": rows, "num_bad": num_bad}, indent=1))
    else:
        _print(findings)
    return 1 if num_bad else 0


def _print(findings: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    area = None
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.area != area:
            area = finding.area
            console.print(Text(area, style="bold"))
        mark, style = MARKS[finding.state]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=4)
        row.add_column(width=width)
        row.add_column(overflow="fold")
        row.add_row(Text(mark, style=style), finding.name, Text(finding.value))
        if finding.advice:
            row.add_row("", "", Text(finding.advice, style="italic"))
        console.print(Padding(row, (0, 0, 0, 2)))
    counts = {state: sum(f.state == state for f in findings) for state in MARKS}
    parts = [f"{counts['ok']} ok"]
    parts += [f"{counts['note']} could be better"] if counts["note"] else []
    parts += [f"{counts['bad']} bad"] if counts["bad"] else []
    console.print(Text(", ".join(parts), style="bold"))
