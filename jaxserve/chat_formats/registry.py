"""Every format, by name and by what a chat template looks like."""

from jaxserve.chat_formats import (
    apertus,
    deepseek,
    functionary,
    gemma,
    glm,
    harmony,
    hermes,
    hunyuan,
    invoke,
    json_list,
    kimi,
    kimi_k3,
    llama3_json,
    longcat,
    minimax_m3,
    mistral,
    pythonic,
    qwen3_xml,
)
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_formats.thinking import THINK_FORMATS as MARKED
from jaxserve.chat_formats.thinking import ThinkFormat
from jaxserve.errors import ConfigError

AUTO, NONE = "auto", "none"

TOOL_FORMATS: tuple[ToolFormat, ...] = (
    harmony.FORMAT,
    deepseek.V3,
    deepseek.V31,
    invoke.DEEPSEEK_V32,
    invoke.DEEPSEEK_V4,
    minimax_m3.FORMAT,
    invoke.MINIMAX,
    invoke.STEP3,
    kimi.FORMAT,
    kimi_k3.FORMAT,
    apertus.FORMAT,
    functionary.FORMAT,
    longcat.TAGGED,
    longcat.FORMAT,
    hunyuan.V3,
    hunyuan.V4,
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
    json_list.OLD_COMMAND,
    hermes.FORMAT,
)
"""In the order in which a template is tried: the most telling marks first."""

THINK_FORMATS: tuple[ThinkFormat, ...] = (hunyuan.THINK, *MARKED)

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
    for tool_format in TOOL_FORMATS:
        if tool_format.detect(template) if name == AUTO else name in tool_format.names:
            return tool_format.fit(template) if tool_format.fit else tool_format
    if name == AUTO:
        return GENERAL
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
    for think in THINK_FORMATS:
        if think.detect(template) if name == AUTO else name in think.names:
            return think.fit(template) if think.fit else think
    if name == AUTO:
        return None
    raise ConfigError(
        f"unknown reasoning parser {name!r:.100}; expected auto, none or one of "
        + ", ".join(think_format_names())
    )
