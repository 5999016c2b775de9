"""Which formats a model's replies have: chosen once, from its chat template or by name."""

import secrets
from dataclasses import dataclass, field

from jaxserve.chat_formats import harmony
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_formats.registry import AUTO, find_think_format, find_tool_format
from jaxserve.chat_formats.thinking import ThinkFormat
from jaxserve.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatFormats:
    """The formats of one model.

    Attributes:
        tools: how it writes calls.
        think: how it marks reasoning; None: not at all, or (harmony) in channels.
        markup: ids of the tokens that are no text, by their text.
        special: texts of special tokens, which clients do not see.
    """

    tokenizer: Tokenizer
    tools: ToolFormat
    think: ThinkFormat | None
    markup: dict[str, int] = field(repr=False)
    special: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO
    ) -> "ChatFormats":
        """The formats of these names; "auto": what the chat template shows.

        Raises:
            ConfigError: nothing is called so.
        """
        template = "\n".join(tokenizer.chat_template_sources)
        tools = find_tool_format(tool_call_parser, template)
        if reasoning_parser in harmony.FORMAT.names:
            tools = harmony.FORMAT
        is_harmony = tools is harmony.FORMAT
        think = None if is_harmony else find_think_format(reasoning_parser, template)
        markup = {text: token_id for token_id, text in tokenizer.markup.items()}
        return cls(tokenizer, tools, think, markup, tokenizer.special_texts)

    @property
    def is_harmony(self) -> bool:
        """Replies are rows of messages, whether there are tools or not."""
        return self.tools is harmony.FORMAT

    def call_id(
        self, tool_format: ToolFormat | None, index: int, name: str, given: str | None
    ) -> str:
        """The id of a call: the model's own, or one in the style of the format."""
        if given:
            return given
        if tool_format is not None and tool_format.make_id is not None:
            return tool_format.make_id(index, name)
        return f"call_{secrets.token_hex(12)}"
