"""Calls that are demanded: whatever a model prefers, what comes out is read back as those calls."""

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken

from jaxserve.chat_format_choice import ChatFormats
from jaxserve.chat_formats import parse_whole
from jaxserve.chat_formats.format import Digits, Json, ToolFormat
from jaxserve.chat_formats.registry import TOOL_FORMATS, find_tool_format
from jaxserve.conversation import ChatPlan, parse_tool_use, plan_chat
from jaxserve.structured import Body, GrammarCompiler, fill_masks
from jaxserve.tokenizer import Tokenizer
from tests.fake_engine import CHAT_TEMPLATE, EOS_ID, byte_level_backend

SHORT = {"type": "string", "maxLength": 4, "pattern": "^[a-z]*$"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "metric": {"type": "boolean"},
                    "tags": {"type": "array", "items": SHORT, "maxItems": 2},
                },
                "required": ["unit", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters") for tool in TOOLS}


def tokenizer_with(marks: tuple[str, ...]) -> Tokenizer:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken(mark, special=True) for mark in marks])
    return Tokenizer(
        backend,
        special_tokens={"bos_token": "<|begin|>", "eos_token": "<|end|>"},
        chat_templates={"default": CHAT_TEMPLATE},
    )


def plan_for(tokenizer: Tokenizer, tool_format: ToolFormat, **asked: Any) -> ChatPlan:
    formats = ChatFormats.of(tokenizer, tool_format.names[0], "none")
    messages = [{"role": "user", "content": "Hello"}]
    return plan_chat(formats, messages, use=parse_tool_use(TOOLS, **asked))


def random_answer(plan: ChatPlan, tokenizer: Tokenizer, seed: int) -> str | None:
    """A random walk through what is allowed; None if it did not end."""
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size, [EOS_ID])
    grammar = plan.check(grammars)
    constraint = grammars.constraint(grammars.start(grammar))
    rng, ids = random.Random(seed), []
    masks = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.int32)
    closing = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b"}", b'"')}
    while len(ids) < 400:
        fill_masks(grammars.executor, [constraint], masks)
        bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        assert allowed
        if constraint.matcher.is_accepting():
            return tokenizer.decode(ids, skip_special_tokens=False)
        ends = [token_id for token_id in allowed if token_id in closing]
        ids.append(rng.choice(ends if ends and rng.random() < 0.7 else allowed))
        constraint.advance(ids[-1])
        assert not constraint.has_failed
        if constraint.is_over:
            return tokenizer.decode(ids, skip_special_tokens=False)
    return None


def fits(plan: ChatPlan, written: str) -> bool:
    """Whether the grammar takes an answer, or the beginning of one."""
    tokenizer = plan.formats.tokenizer
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size, [EOS_ID])
    start = grammars.constraint(grammars.start(plan.check(grammars))).matcher
    ids = tokenizer.encode(written, add_special_tokens=False)
    return start.validate_tokens(ids) == len(ids)


@pytest.mark.parametrize("tool_format", TOOL_FORMATS, ids=lambda form: form.names[0])
@pytest.mark.parametrize("has_special", [False, True], ids=["as text", "as tokens"])
def test_demanded_calls_come_out_whole_and_fit_their_schemas(
    tool_format: ToolFormat, has_special: bool
):
    tokenizer = tokenizer_with(tool_format.marks if has_special else ())
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        plan = plan_for(tokenizer, tool_format, tool_choice=choice, parallel_tool_calls=False)
        answers = [random_answer(plan, tokenizer, seed) for seed in range(4)]
        assert any(answers)
        for answer in filter(None, answers):
            reply = parse_whole(plan.parser(), answer)
            assert not reply.text and len(reply.calls) == 1, answer
            (call,) = reply.calls
            if choice != "required":
                assert call.name == "get_weather"
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name] or {})


@pytest.mark.parametrize("tool_format", TOOL_FORMATS, ids=lambda form: form.names[0])
def test_several_calls_may_be_demanded_and_are_read_as_several(tool_format: ToolFormat):
    plan = plan_for(tokenizer_with(()), tool_format, tool_choice="required")
    pattern = tool_format.pattern
    values = {Json: "{}", Digits: "0"}
    parts = pattern.call(next(tool for tool in plan.use.tools if tool.name == "get_time"))
    call = "".join(part if isinstance(part, str) else values[type(part)] for part in parts)
    written = pattern.begin + pattern.between.join([call] * 3) + pattern.end
    assert fits(plan, written)
    reply = parse_whole(plan.parser(), written)
    assert [call.name for call in reply.calls] == ["get_time"] * 3 and not reply.text


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("glm45", "<tool_call>get_time\n</tool_call>\n<tool_call>get_time\n</tool_call>"),
        ("glm47", "<tool_call>get_time</tool_call><tool_call>get_time</tool_call>"),
        (
            "gemma4",
            '<|tool_call>call:get_weather{days:3,metric:true,tags:["a"],unit:<|"|>C<|"|>}<tool_call|>'
            "<|tool_call>call:get_time{}<tool_call|>",
        ),
        (
            "seed_oss",
            "<seed:tool_call>\n<function=get_weather>\n<parameter=days>3</parameter>\n"
            "<parameter=unit>C</parameter>\n</function>\n</seed:tool_call>",
        ),
    ],
)
def test_demanded_calls_are_written_as_the_chat_template_writes_them(name: str, written: str):
    tool_format = find_tool_format(name, "")
    tokenizer = tokenizer_with(tool_format.marks)
    plan = plan_for(tokenizer, tool_format, tool_choice="required")
    assert fits(plan, written)


def test_a_text_in_a_demanded_call_may_hold_the_beginning_of_the_tag_that_ends_it():
    tokenizer = tokenizer_with(("｜DSML｜",))
    formats = ChatFormats.of(tokenizer, "deepseek_v32", "none")
    say: dict[str, Any] = {
        "name": "say",
        "parameters": {"properties": {"text": {"type": "string"}}},
    }
    tools = parse_tool_use([{"type": "function", "function": say}], "required")
    plan = plan_chat(formats, [{"role": "user", "content": "Hello"}], use=tools)
    written = (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="say">\n'
        '<｜DSML｜parameter name="text" string="true"><b>x</b></｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    )
    assert fits(plan, written)
    (call,) = parse_whole(plan.parser(), written).calls
    assert json.loads(call.arguments) == {"text": "<b>x</b>"}


def test_reasoning_may_come_before_a_demanded_call_and_must_be_closed():
    tokenizer = tokenizer_with(("<think>", "</think>"))
    formats = ChatFormats.of(tokenizer, "hermes", "qwen3")
    messages = [{"role": "user", "content": "Hello"}]
    plan = plan_chat(formats, messages, use=parse_tool_use(TOOLS, "required"))

    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    assert fits(plan, call) and fits(plan, f"<think>Hm.</think>\n\n{call}")
    assert not fits(plan, f"Hm.{call}") and not fits(plan, "<think>Hm.<|end|>")


def test_an_answer_that_must_have_a_form_is_no_call_though_there_are_tools():
    formats = ChatFormats.of(tokenizer_with(()), "llama3_json", "none")
    messages, form = [{"role": "user", "content": "x"}], Body("%json {}")
    plan = plan_chat(formats, messages, use=parse_tool_use(TOOLS), body=form)
    written = '{"name": "get_time", "parameters": {}}'
    reply = parse_whole(plan.parser(), written)
    assert reply.text == written and not reply.calls


def test_strict_tools_let_the_model_choose_but_not_write_wrong_arguments():
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
    tokenizer = tokenizer_with(("<tool_call>", "</tool_call>"))
    formats = ChatFormats.of(tokenizer, "hermes", "none")
    plan = plan_chat(formats, [{"role": "user", "content": "x"}], use=parse_tool_use(strict))

    head = '<tool_call>\n{"name": "get_weather", "arguments": {"days": '
    assert fits(plan, "Just text.") and fits(plan, f"First.{head}3")
    assert not fits(plan, f"{head}true") and not fits(plan, '<tool_call>\n{"name": "unknown"')


def test_strict_tools_leave_text_alone_that_only_looks_like_the_beginning_of_a_call():
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
    messages = [{"role": "user", "content": "x"}]
    tokenizer = tokenizer_with(("｜DSML｜",))
    formats = ChatFormats.of(tokenizer, "phi4_mini_json", "none")
    plan = plan_chat(formats, messages, use=parse_tool_use(strict))
    assert fits(plan, "import functools") and not fits(plan, 'functools[{"name": "unknown"')
    formats = ChatFormats.of(tokenizer, "deepseek_v32", "none")
    plan = plan_chat(formats, messages, use=parse_tool_use(strict))
    head = (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="days" string="false">'
    )
    assert fits(plan, "a <b> c <") and fits(plan, f"So <b>:\n\n{head}3")
    assert not fits(plan, "a ｜DSML｜") and not fits(plan, f"{head}true")


def test_reasoning_between_special_tokens_may_come_before_strict_calls():
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
    tokenizer = tokenizer_with(("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"))
    formats = ChatFormats.of(tokenizer, "mistral", "mistral")
    plan = plan_chat(formats, [{"role": "user", "content": "x"}], use=parse_tool_use(strict))
    thought, head = "[THINK]Hm.[/THINK]", '[TOOL_CALLS]get_weather[ARGS]{"days": '
    assert fits(plan, thought + "Yes.") and fits(plan, f"{thought}Yes.{head}3")
    assert fits(plan, f"Yes.{head}3") and not fits(plan, f"{thought}{head}true")


K3_RESPONSE, K3_END = "<|open|>response<|sep|>", "<|close|>response<|sep|>"
K3_CALL = (
    '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
)


def test_answers_of_kimi_k3_stand_in_their_channel_whatever_is_demanded():
    tokenizer = tokenizer_with(("<|open|>", "<|close|>", "<|sep|>"))
    formats, messages = ChatFormats.of(tokenizer, "kimi_k3", "kimi_k3"), [{"role": "user"}]
    thought = "<|open|>think<|sep|>Hm.<|close|>think<|sep|>"

    must = plan_chat(formats, messages, use=parse_tool_use(TOOLS, "required"))
    assert fits(must, thought + K3_RESPONSE + K3_END + K3_CALL) and fits(must, K3_END + K3_CALL)
    assert not fits(must, K3_CALL)

    form = plan_chat(formats, messages, body=Body("%json {}"))
    written = thought + K3_RESPONSE + '{"a": 1}'
    assert fits(form, written) and parse_whole(form.parser(), written).text == '{"a": 1}'

    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
    may = plan_chat(formats, messages, use=parse_tool_use(strict))
    answer = f"{K3_RESPONSE}Yes.{K3_END}"
    assert fits(may, f"{thought}{answer}<|close|>message<|sep|>")
    assert fits(may, answer + K3_CALL) and not fits(may, answer + K3_CALL.replace("3<", "true<"))


def test_a_mark_before_answers_is_no_part_of_them_and_stands_before_a_form():
    formats = ChatFormats.of(tokenizer_with(()), "functionary_v3", "none")
    messages = [{"role": "user", "content": "x"}]
    assert parse_whole(plan_chat(formats, messages).parser(), "all\nHello").text == "Hello"
    plan = plan_chat(formats, messages, body=Body("%json {}"))
    assert fits(plan, 'all\n{"a": 1}') and not fits(plan, '{"a": 1}')
