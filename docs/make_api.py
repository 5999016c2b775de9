"""Writes docs/api.md from the code: `python docs/make_api.py`."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import jaxserve
from jaxserve.engine.kv_admin import KVAdmin
from jaxserve.kv.stats import KVStats, StoreStats, TierStats
from jaxserve.llm import EmbeddingOutput, EmbeddingRequestOutput, Logprob
from jaxserve.outputs import OutputDelta
from jaxserve.types import LoadDecision

PAGE = Path(__file__).parent / "api.md"

HEAD = """# Python API

What `import jaxserve` offers, and what its calls return; names are vLLM's where they mean the same.
How to use it: [notebook.md](notebook.md). Settings that `LLM(...)` takes as keywords:
[configuration.md](configuration.md). This page is written by `make docs`.
"""

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
PARTS: dict[str, list[Any]] = {
    "Models": [jaxserve.LLM],
    "Sampling": [jaxserve.SamplingParams],
    "Results": [
        jaxserve.RequestOutput,
        jaxserve.CompletionOutput,
        Logprob,
        OutputDelta,
        LoadDecision,
        EmbeddingRequestOutput,
        EmbeddingOutput,
    ],
    "KV tiers": [KVAdmin, KVStats, TierStats, StoreStats],
    "Errors": [
        getattr(jaxserve, name) for name in sorted(jaxserve.__all__) if name.endswith("Error")
    ],
}


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, classes in PARTS.items():
        lines.append(f"## {title}\n")
        for one in classes:
            lines += _class(one)
    return "\n".join(lines).rstrip() + "\n"


def _class(one: type) -> list[str]:
    home = one.__module__ + "." if not hasattr(jaxserve, one.__name__) else "jaxserve."
    lines = [f"### `{home}{one.__name__}`\n"]
    if dataclasses.is_dataclass(one):
        lines += _prose(inspect.getdoc(one) or "")
        rows = [f"| `{f.name}` | {_default(f)} |" for f in dataclasses.fields(one)]
        lines += ["| field | default |", "|---|---|", *rows, ""]
    else:
        if one.__init__ is not object.__init__ and not issubclass(one, Exception):
            lines += _signature(one.__name__, one)
        lines += _prose(inspect.getdoc(one) or "")
    for name, member in vars(one).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        lines.append(f"#### `{one.__name__}.{name}`\n")
        if inspect.isfunction(member):
            lines += _signature(name, member)
        lines += _prose(inspect.getdoc(member) or "")
    return lines


def _signature(name: str, function: Any) -> list[str]:
    """Without types: these are in the code, and named in the text where they matter."""
    parameters = []
    star = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            parameters.append("*")
        shown = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD:
            shown = f"**{shown}"
        if parameter.default is not parameter.empty:
            default = "..." if callable(parameter.default) else repr(parameter.default)
            shown += f"={default}"
        parameters.append(shown)
    return ["```python", f"{name}({', '.join(parameters)})", "```", ""]


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return ""


def _prose(doc: str) -> list[str]:
    """A docstring as Markdown: its sections become lists, their lines flow."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", doc):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            lines += [f"*{head}*", ""]
            items = re.split(r"\n(?=    \S)", "\n" + rest)
            lines += ["- " + _item(item) for item in items if item.strip()]
        elif block.startswith("    "):
            lines += ["```python", inspect.cleandoc(block), "```"]
        else:
            lines.append(" ".join(block.split()))
        lines.append("")
    return lines


def _item(text: str) -> str:
    text = " ".join(text.split())
    names, colon, rest = text.partition(": ")
    if colon and re.fullmatch(r"[\w, *]+", names):
        return ", ".join(f"`{name.strip()}`" for name in names.split(",")) + ": " + rest
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
