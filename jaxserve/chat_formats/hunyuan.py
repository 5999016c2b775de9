"""Hunyuan HY-V3 and V4: as GLM, within a section, with a suffix in every tag.

    <tool_calls:opensource>
    <tool_call:opensource>get_weather<tool_sep:opensource>
    <arg_key:opensource>city</arg_key:opensource>
    <arg_value:opensource>Paris</arg_value:opensource>
    </tool_call:opensource>
    </tool_calls:opensource>

V4 has neither the separator nor line breaks. Each checkpoint has a suffix of its own, which its
chat template names once; there may be none.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from jaxserve.chat_formats import glm
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_formats.thinking import ThinkFormat

SUFFIX = re.compile(r"""HYTK\s*=\s*["'](:[\w.-]+)["']|<tool_calls(:[\w.-]+)>""")


def suffix_of(template: str) -> str:
    """What the names of tags end with."""
    found = SUFFIX.search(template)
    return (found[1] or found[2]) if found else ""


def _format(
    name: str, separator: str, line_break: str, detect: Callable[[str], bool]
) -> ToolFormat:
    def fit(template: str) -> ToolFormat:
        suffix = suffix_of(template)
        tags = glm.Tags(
            suffix=suffix,
            after_name=separator and f"<{separator}{suffix}>",
            section=f"<tool_calls{suffix}>",
            section_end=f"</tool_calls{suffix}>",
        )
        return ToolFormat(
            names=(name,),
            parse=glm.parse_with(tags),
            pattern=glm.pattern_with(tags, line_break),
            detect=detect,
            marks=tags.marks,
            fit=fit,
        )

    return fit("")


V3 = _format(
    "hy_v3", "tool_sep", "\n", lambda template: "<tool_sep" in template and "<arg_key" in template
)
V4 = _format("hy_v4", "", "", lambda template: "<tool_calls" in template and "<arg_key" in template)


def _fit_thinking(template: str) -> ThinkFormat:
    suffix = suffix_of(template)
    return replace(THINK, begin=f"<think{suffix}>", end=f"</think{suffix}>")


THINK = ThinkFormat(("hy_v3", "hy_v4"), "<think>", "</think>", shown_by="HYTK", fit=_fit_thinking)
