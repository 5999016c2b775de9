"""How models write tool calls and reasoning, and how that is read back from their text.

One file a format, each with a parser over a `Source` and a pattern for grammars; `registry` finds
the one that a chat template uses. Knows nothing of tokens, grammars or HTTP.
"""

from jaxserve.chat_formats.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    Reasoning,
    Reply,
    Text,
    ToolCall,
    assemble,
)
from jaxserve.chat_formats.reply import ReplyParser, parse_whole
from jaxserve.chat_formats.tools import Tool, parse_tools

__all__ = [
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Event",
    "Reasoning",
    "Reply",
    "ReplyParser",
    "Text",
    "Tool",
    "ToolCall",
    "assemble",
    "parse_tools",
    "parse_whole",
]
