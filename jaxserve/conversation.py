"""A conversation with tools, reasoning and a wanted form of answer: prompt, grammar and parser.

`plan_chat` is for every front end: it takes what a request says, and gives the text of the prompt,
what the answer must look like, and readers for the answers. Knows nothing of HTTP or the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.chat_format_choice import ChatFormats
from jaxserve.chat_formats import ReplyParser, Tool, parse_tools
from jaxserve.chat_formats.format import ToolFormat
from jaxserve.chat_history import prepare_messages
from jaxserve.chat_template import Message
from jaxserve.errors import RequestError
from jaxserve.structured import Body, GrammarCompiler
from jaxserve.structured.call_rules import ANY_TEXT, RuleWriter
from jaxserve.structured.grammar import json_rule

BLANKS = "/[ \\n]{0,4}/"
"""What may stand between reasoning and an answer that must have a form."""

HARMONY_NEXT = "<|end|><|start|>assistant"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools a request brings, and what the model may or must do with them.

    Attributes:
        given: as the client wrote them, which is what templates want.
        choice: "auto", "required" or "none"; with `named`, exactly that tool must be called.
        parallel: several calls in one reply are allowed.
    """

    given: tuple[Any, ...] = ()
    tools: tuple[Tool, ...] = ()
    choice: str = "none"
    named: str | None = None
    parallel: bool = True

    @property
    def may_call(self) -> bool:
        return self.choice != "none" and bool(self.tools)

    @property
    def must_call(self) -> bool:
        return self.choice == "required"

    @property
    def callable(self) -> tuple[Tool, ...]:
        """What may be called."""
        if self.named is None:
            return self.tools
        return tuple(tool for tool in self.tools if tool.name == self.named)


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """How to serve one conversation.

    Attributes:
        prompt: the rendered text.
        body: what the answer must look like, after `before`; None: anything.
        tool_format: how calls are read; None: they are not.
        keeps_special: the answers' special tokens must reach the parser as text.
    """

    prompt: str
    formats: ChatFormats
    use: ToolUse
    body: Body | None = None
    before: str = ""
    tool_format: ToolFormat | None = None
    begins_inside: bool = False

    @property
    def needs_parser(self) -> bool:
        """The answer is more than text, or may be."""
        return self.tool_format is not None or self.formats.think is not None

    def parser(self) -> ReplyParser:
        """A reader for one answer, whose text keeps special tokens if `needs_parser`."""
        return ReplyParser(
            self.tool_format,
            self.formats.think,
            begins_inside=self.begins_inside,
            tools=self.use.tools,
            special=self.formats.special,
        )

    def call_id(self, index: int, name: str, given: str | None) -> str:
        """The id of a call: the model's own, or one in the style of the format."""
        return self.formats.call_id(self.tool_format, index, name, given)

    def check(self, grammars: GrammarCompiler) -> str:
        """The compiled grammar of the answer; "" if there is none. Waits up to a second.

        Raises:
            RequestError: it cannot be enforced, naming the part that is to blame.
        """
        if self.body is None:
            return ""
        try:
            return grammars.check(self.body, self.before)
        except RequestError as error:
            if error.code == "invalid_grammar" and self.use.may_call:
                _blame_tool(grammars, self.use)
            raise


def parse_tool_use(tools: Any, tool_choice: Any = None, parallel_tool_calls: Any = None) -> ToolUse:
    """What a request in OpenAI's form says about tools.

    Raises:
        RequestError: naming the field that cannot be used.
    """
    if not tools:
        if tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return ToolUse()
    parsed = parse_tools(tools)
    parallel = parallel_tool_calls is not False
    choice = "auto" if tool_choice is None else tool_choice
    if choice in ("auto", "none", "required"):
        return ToolUse(tuple(tools), parsed, choice, None, parallel)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice is none of 'auto', 'none', 'required' and "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if name not in [tool.name for tool in parsed]:
        raise RequestError(
            f"tool_choice names {name[:80]!r}, which is none of the tools: "
            + ", ".join(tool.name for tool in parsed)[:400],
            param="tool_choice",
        )
    return ToolUse(tuple(tools), parsed, "required", name, False)


def template_options(
    add_generation_prompt: bool,
    options: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """What a chat template is given beside the messages.

    Raises:
        RequestError: a tool that cannot be used.
    """
    found = {"add_generation_prompt": add_generation_prompt, **(options or {})}
    if tools:
        parse_tools(tools)
        found["tools"] = list(tools)
    return found


def plan_chat(
    formats: ChatFormats,
    messages: Sequence[Message],
    *,
    use: ToolUse | None = None,
    body: Body | None = None,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPlan:
    """Render a conversation and say what its answer may look like.

    Args:
        use: what is said about tools.
        body: what the answer must look like, if it is no call.
        template_kwargs: reach the template, such as enable_thinking.

    Raises:
        RequestError: the template refuses the messages, or these are no messages.
    """
    use = use or ToolUse()
    kwargs = dict(template_kwargs or {})
    if use.may_call:
        kwargs["tools"] = list(use.given)
    prompt = formats.tokenizer.render_chat(
        prepare_messages(messages), add_generation_prompt, **kwargs
    )
    begins_inside = formats.think is not None and formats.think.begins_inside(prompt)
    is_marked = formats.is_harmony or bool(
        formats.tools.before_text
    )  # whether there are tools or not
    tool_format = formats.tools if use.may_call or is_marked else None
    if use.must_call:
        assert tool_format is not None
        writer = RuleWriter(formats.markup)
        before = _before(formats, writer, begins_inside)
        rule = writer.calls(tool_format.pattern, use.callable, several=use.parallel)
        body, before = Body("\n".join([rule, *writer.rules]), param="tools"), before
    elif body is not None:
        writer = RuleWriter(formats.markup)
        before = _before(formats, writer, begins_inside, is_final=True)
        if writer.rules:
            body = Body("\n".join([body.rule, *writer.rules]), body.parts, body.schema, body.param)
        if not is_marked:
            tool_format = None  # such an answer is no call, whatever it looks like
    elif use.may_call and any(tool.strict for tool in use.tools):
        writer = RuleWriter(formats.markup)
        before = ""
        if formats.think is not None and any(
            mark in formats.think.begin + formats.think.end for mark in formats.markup
        ):  # no text may have these
            before = _before(formats, writer, begins_inside, is_final=True)
        body = _strict_calls(formats, use, writer)
        before = before if body is not None else ""
    else:
        before = ""
    return ChatPlan(prompt, formats, use, body, before, tool_format, begins_inside)


def _before(
    formats: ChatFormats, writer: RuleWriter, begins_inside: bool, is_final: bool = False
) -> str:
    """What may or must come before an answer that has a form: reasoning."""
    if formats.is_harmony:
        analysis = writer.text("<|channel|>analysis<|message|>")
        thought = f"({analysis} {writer.before(HARMONY_NEXT)})*"
        final = writer.text("<|channel|>final<|message|>")
        return f"{thought} {final}" if is_final else thought
    lead = formats.tools.before_text if is_final else ""
    think = formats.think
    if think is None:
        return writer.text(lead) if lead else ""
    thought = f"{writer.before(think.end)} {BLANKS}"
    if not begins_inside:
        thought = f"({writer.text(think.begin)} {thought})?"
    if not think.always_wraps:
        return thought
    begin, end = map(writer.text, think.wraps[0])
    thought += f" {begin}" if begins_inside else f" ({begin})?"
    return thought if is_final else f"{thought} {end}"


def _strict_calls(formats: ChatFormats, use: ToolUse, writer: RuleWriter) -> Body | None:
    """Any text, but every call in it fits its schema."""
    pattern = formats.tools.pattern
    lead = pattern.begin or str(pattern.call(use.tools[0])[0])
    trigger = next((text for text in formats.tools.marks if lead.startswith(text)), None)
    if trigger is None or formats.is_harmony:
        return None
    calls = writer.calls(pattern, use.tools, several=use.parallel)
    first = writer.text(trigger)
    if first.startswith("<["):
        rule = f"{ANY_TEXT} ({calls})?"
        if formats.think is not None and formats.think.always_wraps:
            end, tail = writer.text(formats.think.wraps[0][1]), writer.text(formats.think.tail[0])
            rule = f"{ANY_TEXT} ({end} ({calls})? ({tail})?)?"
        return Body("\n".join([rule, *writer.rules]), param="tools")
    if " <[" in first:  # a token within the mark: what stands before it alone begins no call
        lead, _, rest = calls.partition(" <[")
        rules = [f"BEFORE_CALLS: {ANY_TEXT} {lead}", f"ANYTHING: {ANY_TEXT}", *writer.rules]
        return Body("\n".join([f"ANYTHING | BEFORE_CALLS <[{rest}", *rules]), param="tools")
    rules = [rule.replace(first.removesuffix('"'), '"', 1) for rule in writer.rules]
    if pattern.begin:
        calls, rules = calls.replace(first.removesuffix('"'), '"', 1), writer.rules
    head = f"head[lazy]: TEXT {first}"
    return Body(
        "\n".join([f"(head {calls})* rest", head, "rest: TEXT", f"TEXT: {ANY_TEXT}", *rules]),
        param="tools",
    )


def _blame_tool(grammars: GrammarCompiler, use: ToolUse) -> None:
    """Raise the error of the tool whose schema cannot be enforced, if one alone is to blame."""
    for i, tool in enumerate(use.tools):
        schema = {"type": "object", **tool.parameters}
        param = f"tools.{i}.function.parameters"
        grammars.check(Body(json_rule(schema), schema=schema, param=param))
