"""Tools and reasoning through OpenAI's responses and Anthropic's messages, with their clients."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.test_tools import CALL, THOUGHT, TOOLS, Model

FUNCTION: Any = [{"type": "function", **TOOLS[0]["function"]}]
TOOL: Any = [
    {
        "name": "get_weather",
        "description": "The weather in a city",
        "input_schema": TOOLS[0]["function"]["parameters"],
    }
]
WRITTEN = THOUGHT + "I look.\n" + CALL
ARGUMENTS = {"city": "Paris", "days": 2}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    served = Model()
    yield served
    served.client.close()
    served.live.stop()


@pytest.fixture
def responses(model: Model) -> Any:
    model.writes = WRITTEN
    return model.client.responses


@pytest.fixture
def messages(model: Model) -> Iterator[Any]:
    model.writes = WRITTEN
    with anthropic.Anthropic(base_url=model.live.url, api_key="x", max_retries=0) as client:
        yield client.messages


def test_a_response_has_items_for_reasoning_text_and_calls(model: Model, responses: Any):
    response = responses.create(model="fake", input="Rain?", tools=FUNCTION)
    reasoning, message, call = response.output
    assert reasoning.type == "reasoning" and reasoning.content[0].text == "What is asked?"
    assert message.content[0].text == response.output_text == "I look."
    assert call.type == "function_call" and call.name == "get_weather"
    assert call.call_id.startswith("call_") and json.loads(call.arguments) == ARGUMENTS
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert '"get_weather"' in model.prompt() and response.tools[0].name == "get_weather"


def test_the_events_of_calls_and_reasoning_join_to_the_items(model: Model, responses: Any):
    events = list(responses.create(model="fake", input="Rain?", tools=FUNCTION, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response.output
    added = [e.item for e in events if e.type == "response.output_item.added"]
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done] == [i.id for i in final]
    assert added[2].arguments == "" and added[2].call_id == final[2].call_id
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 2 and {e.item_id for e in deltas} == {final[2].id}
    assert "".join(e.delta for e in deltas) == final[2].arguments
    (whole,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert json.loads(whole.arguments) == ARGUMENTS
    thoughts = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "What is asked?"


def test_the_result_of_a_call_goes_back_by_the_id_of_the_response(model: Model, responses: Any):
    first = responses.create(model="fake", input="Rain?", tools=FUNCTION)
    output = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "dry"}
    model.writes = "No."
    second = responses.create(
        model="fake", input=[output], previous_response_id=first.id, tools=FUNCTION
    )
    assert second.output_text == "No."
    prompt = model.prompt()
    assert "<tool_call>get_weatherParis</tool_call>" in prompt and "<|tool|>dry<|end|>" in prompt
    assert "What is asked?" in prompt and "I look." in prompt


def test_a_response_may_have_to_call_or_to_fit_a_schema(model: Model, responses: Any):
    responses.create(model="fake", input="Rain?", tools=FUNCTION, tool_choice="required")
    assert "get_weather" in model.seen().grammar
    choice = {"type": "function", "name": "get_weather"}
    responses.create(model="fake", input="Rain?", tools=FUNCTION, tool_choice=choice)
    assert "get_weather" in model.seen().grammar
    responses.create(model="fake", input="Rain?", tools=FUNCTION, tool_choice="none")
    assert not model.seen().grammar and "get_weather" not in model.prompt()
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    responses.create(model="fake", input="Rain?", text=form)
    assert "rain" in model.seen().grammar


def test_a_message_has_blocks_for_thoughts_text_and_tools(model: Model, messages: Any):
    message = messages.create(
        model="fake", max_tokens=500, tools=TOOL, messages=[{"role": "user", "content": "Rain?"}]
    )
    thought, text, call = message.content
    assert thought.type == "thinking" and thought.thinking == "What is asked?"
    assert text.text == "I look." and message.stop_reason == "tool_use"
    assert call.type == "tool_use" and call.name == "get_weather" and call.input == ARGUMENTS
    assert '"get_weather"' in model.prompt()


def test_a_stream_of_blocks_joins_to_the_same_message(model: Model, messages: Any):
    ask: Any = [{"role": "user", "content": "Rain?"}]
    with messages.stream(model="fake", max_tokens=500, tools=TOOL, messages=ask) as stream:
        events = list(stream)
        message = stream.get_final_message()
    thought, text, call = message.content
    assert thought.thinking == "What is asked?" and text.text == "I look."
    assert call.input == ARGUMENTS and message.stop_reason == "tool_use"
    pieces = [e for e in events if e.type == "content_block_delta"]
    assert sum(e.delta.type == "input_json_delta" for e in pieces) > 2
    starts = [e.index for e in events if e.type == "content_block_start"]
    assert starts == [0, 1, 2] == [e.index for e in events if e.type == "content_block_stop"]


def test_tool_results_and_thoughts_go_back_as_blocks(model: Model, messages: Any):
    first = messages.create(
        model="fake", max_tokens=500, tools=TOOL, messages=[{"role": "user", "content": "Rain?"}]
    )
    call = first.content[2]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "dry"}
    conversation: Any = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    model.writes = "No."
    second = messages.create(model="fake", max_tokens=500, tools=TOOL, messages=conversation)
    assert second.content[0].text == "No." and second.stop_reason == "end_turn"
    prompt = model.prompt()
    assert "<tool_call>get_weatherParis</tool_call>What is asked?I look.<|end|>" in prompt
    assert "<|tool|>dry<|end|><|user|>So?<|end|>" in prompt


def test_a_message_may_have_to_use_a_tool_or_must_not_think(model: Model, messages: Any):
    ask: Any = {"messages": [{"role": "user", "content": "Rain?"}], "max_tokens": 50}
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        messages.create(model="fake", tools=TOOL, tool_choice=choice, **ask)
        assert "get_weather" in model.seen().grammar
    messages.create(model="fake", thinking={"type": "disabled"}, **ask)
    assert model.prompt().endswith("<think>\n\n</think>\n\n")


def test_bad_tools_are_refused_by_the_names_of_each_api(model: Model, messages: Any):
    with pytest.raises(openai.BadRequestError) as error:
        bad: Any = [{"type": "function", "name": "a b"}]
        model.client.responses.create(model="fake", input="a", tools=bad)
    assert error.value.param is not None and error.value.param.startswith("tools.0")
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        messages.create(
            model="fake",
            max_tokens=5,
            tools=[{"name": "a b", "input_schema": {"type": "object"}}],
            messages=[{"role": "user", "content": "a"}],
        )
