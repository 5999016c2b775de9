"""Reasoning is told apart from the answer, whatever the model's marks and wherever text is cut."""

import pytest

from jaxserve.chat_formats import Reasoning, ReplyParser, Text, parse_whole
from jaxserve.chat_formats.registry import find_think_format, find_tool_format
from tests.chat_formats.samples import TOOLS

CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "CET"}}\n</tool_call>'

LLAMA4 = (
    '<|header_start|>assistant<|python_start|><|python_end|>{{ \'{"name": f, "parameters": a}\' }}'
)

CASES = [
    # name, begins inside, written, reasoning, text
    ("qwen3", False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", True, "Hm.\n\nWell.\n</think>\n\nYes.", "Hm.\n\nWell.", "Yes."),
    ("qwen3", True, "<think>\nHm.</think>Yes.", "Hm.", "Yes."),
    ("qwen3", False, "Yes, a < b.", "", "Yes, a < b."),
    ("qwen3", False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("qwen3", False, "<think>cut off", "cut off", ""),
    ("deepseek_r1", None, "Hm.</think>\nYes.", "Hm.", "Yes."),
    ("mistral", False, "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
    ("gemma4", False, "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
    ("seed_oss", False, "<seed:think>Hm.</seed:think>Yes.", "Hm.", "Yes."),
    ("kimi_k2", True, "Hm.</think>Yes.", "Hm.", "Yes."),
    (
        "ernie45",
        True,
        "Hm.\n</think>\n\n<response>\nYes.\n\nNo.\n</response>\n",
        "Hm.",
        "Yes.\n\nNo.",
    ),
    ("ernie45", True, "Hm.\n</think>\n\nYes: <response>", "Hm.", "Yes: <response>"),
    ("hunyuan_a13b", False, "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>", "Hm.", "Yes."),
    ("cohere", False, "<|START_RESPONSE|>Yes.<|END_RESPONSE|>", "", "Yes."),
    ("cohere", False, "Yes.<|END_RESPONSE|>", "", "Yes."),
    ("cohere", True, "Hm.<|END_THINKING|><|START_TEXT|>Yes.<|END_TEXT|>", "Hm.", "Yes."),
    ("apriel", True, "\nHm.\n[BEGIN FINAL RESPONSE]\nYes.\n[END FINAL RESPONSE]", "Hm.", "Yes."),
    ("minimax_m3", False, "<mm:think>\nHm.\n</mm:think>\n\nYes.", "Hm.", "Yes."),
    ("apertus", False, "<|inner_prefix|>Hm.<|inner_suffix|>Yes.", "Hm.", "Yes."),
    (
        "kimi_k3",
        True,
        "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes. <|close|>response<|sep|>"
        "<|close|>message<|sep|>",
        "Hm.",
        "Yes.",
    ),
    ("kimi_k3", False, "Yes.<|close|>response<|sep|><|close|>message<|sep|>", "", "Yes."),
    ("longcat", False, "<longcat_think>\nHm.\n</longcat_think>\nYes.", "Hm.", "Yes."),
]


def make(name: str, begins_inside: bool | None) -> ReplyParser:
    think = find_think_format(name, "")
    assert think is not None
    inside = think.begins_inside("") if begins_inside is None else begins_inside
    return ReplyParser(None, think, begins_inside=inside)


@pytest.mark.parametrize(("name", "inside", "written", "reasoning", "text"), CASES)
def test_reasoning_and_answer_are_told_apart_for_every_cut(
    name: str, inside: bool | None, written: str, reasoning: str, text: str
):
    for cut in range(len(written)):
        parser = make(name, inside)
        events = parser.feed(written[:cut]) + parser.feed(written[cut:]) + parser.finish()
        assert "".join(e.text for e in events if isinstance(e, Reasoning)) == reasoning
        assert "".join(e.text for e in events if isinstance(e, Text)) == text
    parser = make(name, inside)
    events = [event for char in written for event in parser.feed(char)] + parser.finish()
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == reasoning


def test_calls_after_reasoning_are_calls_and_calls_within_it_are_reasoning():
    hermes, think = find_tool_format("hermes", ""), find_think_format("qwen3", "")
    parser = ReplyParser(hermes, think, begins_inside=True, tools=TOOLS)
    reply = parse_whole(parser, f"I could {CALL} so.</think>\n\nLooking.\n{CALL}")
    assert CALL in reply.reasoning and reply.text == "Looking."
    assert [call.name for call in reply.calls] == ["get_time"]


def test_calls_of_kimi_end_reasoning_that_was_not_closed():
    kimi, think = find_tool_format("kimi_k2", ""), find_think_format("kimi_k2", "")
    written = (
        "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    )
    reply = parse_whole(ReplyParser(kimi, think, begins_inside=True, tools=TOOLS), written)
    assert reply.reasoning == "Hm." and [call.name for call in reply.calls] == ["get_time"]


def test_channels_of_gpt_oss_are_reasoning_preamble_call_and_answer():
    written = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look it up.<|end|><|start|>assistant<|channel|>commentary to=functions."
        'get_time <|constrain|>json<|message|>{"zone": "CET"}'
    )
    harmony = find_tool_format("openai", "")
    for cut in range(len(written)):
        parser = ReplyParser(harmony, None, tools=TOOLS)
        parser.feed(written[:cut])
        parser.feed(written[cut:])
        parser.finish()
        reply = parser.reply()
        assert (reply.reasoning, reply.text) == ("Think.", "I look it up.")
        assert [(call.name, call.arguments) for call in reply.calls] == [
            ("get_time", '{"zone": "CET"}')
        ]


def test_special_tokens_that_are_no_marks_do_not_show():
    think = find_think_format("mistral", "")
    parser = ReplyParser(None, think, special=("[THINK]", "[/THINK]", "<|eot|>", "<s>"))
    reply = parse_whole(parser, "[THINK]a<s>b[/THINK]c<|eot|>d")
    assert (reply.reasoning, reply.text) == ("ab", "cd")


@pytest.mark.parametrize(
    ("template", "tools", "think"),
    [
        ("{{ '<tool_call>' }}{{ '<think>' }}{{ '</think>' }}", "hermes", "think"),
        ("<tool_call>\n<function=x><parameter=y> <think></think>", "qwen3_xml", "think"),
        ("[TOOL_CALLS] [ARGS] [THINK] [/THINK]", "mistral", "mistral"),
        ("[TOOL_CALLS]", "mistral_list", None),
        ("<arg_key>k</arg_key>\n<arg_value>v</arg_value>", "glm45", None),
        ("<arg_key>{{ k }}</arg_key><arg_value>", "glm47", None),
        ("<｜tool▁calls▁begin｜>```json", "deepseek_v3", None),
        ("<｜tool▁calls▁begin｜> <think></think>", "deepseek_v31", "think"),
        ("<|tool_calls_section_begin|> <think></think>", "kimi_k2", "kimi_k2"),
        ("<|channel|>analysis<|message|>", "openai", None),
        ("<|tool_call>call: <|channel>thought\n<channel|>", "gemma4", "gemma4"),
        (r"'<|tool_call>call:' '<|channel>thought\n<channel|>'", "gemma4", "gemma4"),
        (r"<function_calls> {{ '<|im_start|>assistant\n<think>' }}", "olmo3", "think"),
        ("<|tool_list_start|>", "lfm2", None),
        ("List of tools: [ </think>", "lfm2", "think"),
        ("<|role_sep|> `function call` <|function_call|>", "gigachat31", None),
        ("<|role_sep|> `function call`", "gigachat3", None),
        ("<tool_calls>[ Here are my reasoning steps:", "hunyuan_a13b", "apriel"),
        ("<|tool_call_start|> <think></think>", "lfm2", "think"),
        (LLAMA4, "llama3_json", None),
        ("<|python_start|> [func_name1(params_name1=params_value1)]", "pythonic", None),
        ("<longcat_tool_call> <longcat_think></longcat_think>", "longcat", "longcat"),
        ("<tool_call> <think></think> <response></response>", "hermes", "ernie45"),
        ("<tool_calls> <think></think> <answer>", "hunyuan_a13b", "hunyuan_a13b"),
        ("<tool_calls> <tool_call>f<tool_sep> <arg_key>", "hy_v3", None),
        ("<longcat_tool_call>f <longcat_arg_key>", "longcat_xml", None),
        ("<minimax:tool_call> <invoke> <response> <think></think>", "minimax_m2", "think"),
        (
            "{% set d = '｜DSML｜' %} <{{ d }}function_calls> <think></think>",
            "deepseek_v32",
            "think",
        ),
        ("{% set d = '｜DSML｜' %} <{{ d }}tool_calls> <think></think>", "deepseek_v4", "think"),
        ("<|system|> <|tool|> <|/tool|> <|end|>", "phi4_mini_json", None),
        ("<|start_of_role|>assistant <|tool_call|>", "granite", None),
        ("<TOOLCALL>[{{ tool_call }}]</TOOLCALL> <think></think>", "nemotron_json", "think"),
        ("<|START_THINKING|> <|START_ACTION|>[", "cohere", "cohere"),
        ('<|start_header_id|> {"name": f, "parameters": d}', "llama3_json", None),
        ("'<tool_sep{}>' '<arg_key{}>' {% set HYTK = ':x' %} '<think{}>'", "hy_v3", "hy_v3"),
        ("'<tool_calls{}>' '<arg_key{}>' {% set HYTK = ':6c' %} '<think{}>'", "hy_v4", "hy_v3"),
        ("'<|open|>' + tag + '<|sep|>'", "kimi_k3", "kimi_k3"),
        ("']<]minimax[>[' '<tool_call>' '<mm:think>' '</mm:think>'", "minimax_m3", "minimax_m3"),
        ("<｜tool_calls_begin｜> <think>", "step3", "think"),
        ("'<|inner_prefix|>' '<|inner_suffix|>' '<|tools_prefix|>'", "apertus", "apertus"),
        (r"<|start_header_id|> '>>>all\n' + content", "functionary_v3", None),
        (r'Action:\n```json\n[ "tool_name": name', "command_r", None),
        ("nothing about tools", "hermes", None),
    ],
)
def test_formats_are_found_by_the_chat_template(template: str, tools: str, think: str | None):
    assert find_tool_format("auto", template).names[0] == tools
    found = find_think_format("auto", template)
    assert (found.names[0] if found else None) == think


def test_tags_of_hunyuan_end_with_the_suffix_that_the_template_names():
    template = "{%- set HYTK = ':ab-1' %} '<think{}>' '<tool_calls{}>' '<tool_sep{}>' '<arg_key{}>'"
    tools, think = find_tool_format("auto", template), find_think_format("auto", template)
    assert think is not None and tools.names == ("hy_v3",)
    assert think.begins_inside("<｜hy_Assistant:ab-1｜><think:ab-1>")
    assert not think.begins_inside("<｜hy_Assistant:ab-1｜><think:ab-1></think:ab-1>")
    special = [*tools.marks, "<think:ab-1>", "</think:ab-1>", "<｜hy_eos:ab-1｜>"]
    parser = ReplyParser(tools, think, begins_inside=True, tools=TOOLS, special=special)
    reply = parse_whole(
        parser,
        "Hm.</think:ab-1>Yes.<tool_calls:ab-1>\n<tool_call:ab-1>get_time<tool_sep:ab-1>\n"
        "<arg_key:ab-1>zone</arg_key:ab-1>\n<arg_value:ab-1><tool_call></arg_value:ab-1>\n"
        "</tool_call:ab-1>\n</tool_calls:ab-1><｜hy_eos:ab-1｜>",
    )
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")
    assert [(c.name, c.arguments) for c in reply.calls] == [("get_time", '{"zone": "<tool_call>"}')]


def test_marks_made_of_special_tokens_keep_these_tokens():
    think = find_think_format("kimi_k3", "")
    special = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
    parser = ReplyParser(None, think, begins_inside=True, special=special)
    written = (
        "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes.<|close|>response<|sep|>"
        "<|close|>message<|sep|><|end_of_msg|>"
    )
    reply = parse_whole(parser, written)
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")


@pytest.mark.parametrize("name", ["deepseek_r1", "minimax_m2", "nemotron"])
@pytest.mark.parametrize("closed", ["<think></think>", "<think>\n\n</think>\n\n"])
def test_where_the_prompt_closes_the_reasoning_all_of_the_reply_is_the_answer(
    name: str, closed: str
):
    think = find_think_format(name, "")
    assert think is not None and think.begins_inside("<|assistant|>")
    assert not think.begins_inside(f"<|assistant|>{closed}")


def test_a_prompt_that_leaves_seed_oss_no_budget_begins_inside_its_reflection():
    think = find_think_format("seed_oss", "")
    assert think is not None
    prompt = "<seed:bos>assistant\n<seed:think><seed:cot_budget_reflect>"
    assert think.begins_inside(prompt) and not think.begins_inside("<seed:bos>assistant\n")
    parser = ReplyParser(None, think, begins_inside=True, special=("</seed:cot_budget_reflect>",))
    reply = parse_whole(parser, "No budget.</seed:cot_budget_reflect>\n</seed:think>Yes.")
    assert (reply.reasoning, reply.text) == ("No budget.", "Yes.")
