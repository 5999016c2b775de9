"""Every format, by name and by what a chat template looks like."""

from jaxserve.chat_formats import (
    deepseek,
    gemma,
    glm,
    harmony,
    hermes,
    invoke,
    json_list,
    kimi,
    llama3_json,
    longcat,
    mistral,
    pythonic,
    qwen3_xml,
)
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_formats.thinking import THINK_FORMATS, ThinkFormat
from jaxserve.errors import ConfigError

AUTO, NONE = "auto", "none"

TOOL_FORMATS: tuple[ToolFormat, ...] = (
    harmony.FORMAT,
    deepseek.V3,
    deepseek.V31,
    invoke.DEEPSEEK_V32,
    invoke.DEEPSEEK_V4,
    invoke.MINIMAX,
    kimi.FORMAT,
    longcat.TAGGED,
    longcat.FORMAT,
    glm.HUNYUAN,
    glm.WITHOUT_BREAKS,
    glm.FORMAT,
    qwen3_xml.SEED,
    qwen3_xml.FORMAT,
    gemma.FORMAT,
    gemma.FUNCTION_GEMMA,
    mistral.FORMAT,
    mistral.OLD_FORMAT,
    pythonic.FORMAT,
    pythonic.LFM2,
    pythonic.OLMO3,
    llama3_json.FORMAT,
    json_list.PHI,
    json_list.GRANITE,
    json_list.HUNYUAN,
    json_list.NEMOTRON,
    json_list.GIGACHAT_31,
    json_list.GIGACHAT,
    json_list.COMMAND,
    hermes.FORMAT,
)
"""In the order in which a template is tried: the most telling marks first."""

GENERAL = hermes.FORMAT
"""For templates that show no format."""


def tool_format_names() -> tuple[str, ...]:
    return tuple(name for tool_format in TOOL_FORMATS for name in tool_format.names)


def think_format_names() -> tuple[str, ...]:
    return (*(name for think in THINK_FORMATS for name in think.names), *harmony.FORMAT.names)


def find_tool_format(name: str, template: str) -> ToolFormat:
    """The format of this name; for "auto", the one that the template uses.

    Raises:
        ConfigError: nothing is called so.
    """
    if name == AUTO:
        return next((form for form in TOOL_FORMATS if form.detect(template)), GENERAL)
    for tool_format in TOOL_FORMATS:
        if name in tool_format.names:
            return tool_format
    raise ConfigError(
        f"unknown tool call parser {name!r:.100}; expected auto or one of "
        + ", ".join(tool_format_names())
    )


def find_think_format(name: str, template: str) -> ThinkFormat | None:
    """The way of marking reasoning of this name; for "auto", the template's; None: there is none.

    Raises:
        ConfigError: nothing is called so.
    """
    if name == NONE or name in harmony.FORMAT.names:
        return None
    if name == AUTO:
        return next((think for think in THINK_FORMATS if think.detect(template)), None)
    for think in THINK_FORMATS:
        if name in think.names:
            return think
    raise ConfigError(
        f"unknown reasoning parser {name!r:.100}; expected auto, none or one of "
        + ", ".join(think_format_names())
    )
