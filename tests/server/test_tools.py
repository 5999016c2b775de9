"""Tool calls, reasoning and forms through the chat API, with the official client over a socket."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jaxserve.chat_template import Message
from jaxserve.config import Config, ModelConfig
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request
from tests.fake_engine import FakeEngine, byte_level_backend
from tests.server.test_live import Live

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "{{ m.reasoning_content }}{{ m.content }}<|end|>{% endfor %}"
    "<|assistant|>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
THOUGHT = "<think>\nWhat is asked?\n</think>\n\n"
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
)
ASK: list[Message] = [{"role": "user", "content": "Rain?"}]


class Model:
    """A server whose model writes what it is told to."""

    def __init__(self) -> None:
        self.writes = ""
        tokenizer = Tokenizer(
            byte_level_backend(),
            special_tokens={"bos_token": "<|begin|>", "eos_token": "<|end|>"},
            chat_templates={"default": TEMPLATE},
        )
        self.engine = FakeEngine(
            tokenizer=tokenizer,
            config=Config(model=ModelConfig(tool_call_parser="auto", reasoning_parser="auto")),
            max_model_len=4000,
            step_s=0.002,
            reply=lambda request: tokenizer.encode(self.writes),
        )
        self.live = Live(self.engine)
        self.client = openai.OpenAI(base_url=f"{self.live.url}/v1", api_key="x", max_retries=0)

    def ask(self, writes: str, **given: Any) -> Any:
        self.writes = writes
        given = {"messages": ASK, "max_tokens": 500, **given}
        return self.client.chat.completions.create(model="fake", **given)

    def seen(self) -> Request:
        return self.engine.added[-1]

    def prompt(self) -> str:
        return self.engine.tokenizer.decode(self.seen().prompt_ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    served = Model()
    yield served
    served.client.close()
    served.live.stop()


def test_calls_and_reasoning_come_back_in_their_fields(model: Model):
    (choice,) = model.ask(THOUGHT + "I look.\n" + CALL, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.reasoning == choice.message.reasoning_content == "What is asked?"
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
    assert '"get_weather"' in model.prompt()


def test_a_stream_joins_to_the_same(model: Model):
    chunks = list(
        model.ask(
            THOUGHT + "I look.\n" + CALL + "\n" + CALL, tools=TOOLS, stream=True, logprobs=True
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    joined = "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas)
    assert joined == "What is asked?"
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for call in delta.tool_calls or []:
            slot = calls.setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
            slot["name"] += call.function.name or ""
            slot["arguments"] += call.function.arguments or ""
    assert [call["name"] for call in calls.values()] == ["get_weather"] * 2
    assert len({call["id"] for call in calls.values()}) == 2
    assert all(json.loads(call["arguments"])["city"] == "Paris" for call in calls.values())
    assert sum(1 for delta in deltas if delta.tool_calls) > 4  # arguments come in pieces
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        "tool_calls"
    ]
    num_logprobs = sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs)
    assert num_logprobs == len(model.engine.tokenizer.encode(model.writes)) + 1


def test_tool_choice_none_keeps_tools_from_the_model_and_calls_as_text(model: Model):
    (choice,) = model.ask(CALL, tools=TOOLS, tool_choice="none").choices
    assert choice.message.tool_calls is None and choice.message.content == CALL
    assert "get_weather" not in model.prompt() and not model.seen().grammar


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ],
)
def test_a_demanded_call_is_enforced_by_a_grammar(model: Model, choice: Any, reason: str):
    (answer,) = model.ask(CALL, tools=TOOLS, tool_choice=choice).choices
    assert answer.finish_reason == reason and len(answer.message.tool_calls) == 1
    assert "get_weather" in model.seen().grammar


def test_results_of_calls_go_back_to_the_template(model: Model):
    first = model.ask(CALL, tools=TOOLS).choices[0].message
    history: list[Any] = [
        *ASK,
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12 degrees"},
    ]
    (choice,) = model.ask("Cold.", messages=history, tools=TOOLS).choices
    assert choice.message.content == "Cold." and choice.finish_reason == "stop"
    prompt = model.prompt()
    assert "<tool_call>get_weatherParis</tool_call>" in prompt and "12 degrees" in prompt


def test_thinking_can_be_switched_off_by_the_template(model: Model):
    given = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    (choice,) = model.ask("Yes.", **given).choices
    assert choice.message.content == "Yes." and model.prompt().endswith("</think>\n\n")


def test_a_form_is_enforced_after_the_reasoning(model: Model):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (choice,) = model.ask(THOUGHT + '{"a": 1}', response_format=form).choices
    assert choice.message.content == '{"a": 1}' and choice.message.reasoning == "What is asked?"
    assert "</think>" in model.seen().grammar and '"integer"' in model.seen().grammar


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"regex": "[0-9]+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"grammar": 'start: "a"+'}},
        {"structured_outputs": {"json": {"type": "object"}}},
        {"structured_outputs": {"json_object": True}},
        {"guided_regex": "[0-9]+"},
        {"guided_choice": ["a", "b"]},
        {"guided_json": {"type": "object"}},
        {"guided_grammar": 'root ::= "a"'},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "completions"])
def test_every_name_of_a_form_reaches_the_engine(model: Model, form: Any, is_chat: bool):
    if is_chat:
        model.ask("1", extra_body=form)
    else:
        model.writes = "1"
        model.client.completions.create(model="fake", prompt="x", extra_body=form)
    assert model.seen().grammar


def test_several_answers_are_read_each_on_its_own(model: Model):
    chunks = list(model.ask(CALL, tools=TOOLS, n=3, stream=True))
    names: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                names[choice.index] = names.get(choice.index, "") + (call.function.name or "")
    assert names == dict.fromkeys(range(3), "get_weather")


def test_reasoning_can_be_left_out(model: Model):
    (choice,) = model.ask(THOUGHT + "Yes.", extra_body={"include_reasoning": False}).choices
    assert choice.message.content == "Yes." and not hasattr(choice.message, "reasoning")
