"""Official clients against a live server over the real engine: forms, tools, reasoning's absence.

The examples of docs/structured-output.md run here as they stand there.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.live import Live
from tests.structured.harness import small_llm

PAGE = Path(__file__).parents[2] / "docs" / "structured-output.md"
ASK: Any = [{"role": "user", "content": "Who wrote to whom?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
            },
        },
    }
]


class Step(BaseModel):
    kind: Literal["add", "drop"]
    amount: float = Field(ge=0, le=10)


class Recipe(BaseModel):
    title: str = Field(max_length=12)
    steps: list[Step] = Field(min_length=1, max_length=2)
    note: str | None = Field(max_length=8)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    llm = small_llm()
    engine: Any = llm.engine
    closed = engine.close

    def close() -> None:
        closed()
        engine.closed = True

    engine.close = close
    server = Live(engine)
    yield server.url
    server.stop()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_pydantic_models_come_back_parsed(client: openai.OpenAI, model: str):
    answer = client.chat.completions.parse(
        model=model, messages=ASK, response_format=Recipe, seed=1, max_tokens=300
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None and 1 <= len(parsed.steps) <= 2
    with client.chat.completions.stream(
        model=model, messages=ASK, response_format=Recipe, seed=1, max_tokens=300
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed


def test_demanded_calls_fit_their_schema_whole_and_streamed(client: openai.OpenAI, model: str):
    given: Any = {"model": model, "messages": ASK, "tools": TOOLS, "max_tokens": 300, "seed": 3}
    (choice,) = client.chat.completions.create(
        tool_choice="required", parallel_tool_calls=False, **given
    ).choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert 1 <= json.loads(call.function.arguments)["days"] <= 9
    chunks = client.chat.completions.create(
        tool_choice="required", parallel_tool_calls=False, stream=True, **given
    )
    pieces = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    text = "".join(p[0].function.arguments or "" for p in pieces if p[0].function)
    assert text == call.function.arguments


def test_other_front_ends_take_the_same_tools_and_forms(
    url: str, client: openai.OpenAI, model: str
):
    function = TOOLS[0]["function"]
    response = client.responses.create(
        model=model,
        input="Rain?",
        tools=[{"type": "function", **function, "strict": False}],  # pyright: ignore
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=300,
    )
    (item,) = [item for item in response.output if item.type == "function_call"]
    assert item.name == "get_weather" and "days" in json.loads(item.arguments)
    parsed = client.responses.parse(
        model=model, input="Cook.", text_format=Recipe, max_output_tokens=300
    )
    assert isinstance(parsed.output_parsed, Recipe)
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude:
        message = claude.messages.create(
            model=model,
            max_tokens=300,
            messages=[{"role": "user", "content": "Rain?"}],
            tools=[{"name": function["name"], "input_schema": function["parameters"]}],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        )
    (block,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and "days" in dict(block.input)  # pyright: ignore


def test_the_examples_of_the_page_run(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = "\n".join(block for block in blocks if "LLM()" not in block)
    path = tmp_path / "example.py"
    path.write_text(code.replace("http://127.0.0.1:8000", url))
    import runpy

    runpy.run_path(str(path))
    printed = capsys.readouterr().out
    assert re.search(r"year=1[78]\d\d|year=1900", printed)
    assert re.search(r"^[A-Z]{2}-[0-9]{4}$", printed, re.MULTILINE)
    assert "a,a,a" in printed and "get_weather" in printed
