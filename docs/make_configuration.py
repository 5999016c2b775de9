"""Writes docs/configuration.md from the settings: `python docs/make_configuration.py`."""

from pathlib import Path

from jaxserve.settings import all_settings

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """# Configuration

Every setting is a flag of `jaxserve serve` and `jaxserve generate`, an environment variable, a key
of the YAML file given by `--config` (or `JAXSERVE_CONFIG`), and a keyword of `LLM(...)`. A flag
wins over an environment variable, that over the file, that over the default. Unknown names are
refused. `LLM` reads neither environment nor file.

In the file, keys may stand alone or in their section:

```yaml
model: path/to/checkpoint
cache:
  page_size: 32
  kv_bytes: 4GiB
```

This page is written by `make docs`.
"""


def page() -> str:
    """The whole page."""
    lines, section = [HEAD], None
    for setting in all_settings().values():
        if setting.section != section:
            section = setting.section
            lines.append(f"## {section}\n")
            lines.append("| key | flag | variable | default | meaning |")
            lines.append("|---|---|---|---|---|")
        default = "" if setting.default is None else f"`{setting.default}`"
        choices = f"; one of {', '.join(setting.choices)}" if setting.choices else ""
        lines.append(
            f"| `{setting.name}` | `{setting.flag}` | `{setting.variable}` | {default} "
            f"| {setting.help}{choices} |"
        )
        following = [s for s in all_settings().values() if s.section == section]
        if following[-1].name == setting.name:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
