"""Calls of earlier turns reach chat templates in the form that each of them reads."""

import pytest

from jaxserve.chat_history import prepare_messages
from jaxserve.chat_template import ChatTemplate

CALL = {"name": "get_weather", "arguments": '{"city": "Zürich", "tags": ["a"]}'}
HISTORY = [{"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}]


@pytest.mark.parametrize(
    ("written", "rendered"),
    [
        ("{{ '```json\n' + a + '\n```' }}", '```json\n{"city": "Zürich", "tags": ["a"]}\n```'),
        ("{{ a }} {{ a | string }} {{ 'x' ~ a }}", " ".join(["J", "J", "xJ"])),
        ("{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}", "J"),
        ("{% for k, v in a | items %}{{ k }}={{ v }};{% endfor %}", "city=Zürich;tags=['a'];"),
        ("{{ a is mapping }} {{ a.city }}", "True Zürich"),
    ],
)
def test_arguments_are_an_object_and_are_json_where_a_template_wants_a_text(
    written: str, rendered: str
):
    source = "{% set a = messages[0].tool_calls[0].function.arguments %}" + written
    text = ChatTemplate({"default": source}, {}).render(prepare_messages(HISTORY))
    assert text == rendered.replace("J", '{"city": "Zürich", "tags": ["a"]}')


def test_calls_without_text_have_no_content_where_a_template_asks_for_none():
    source = "{% for message in messages %}{{ message['content'] is none }}{% endfor %}"
    render = ChatTemplate({"default": source}, {}).render
    assert render(prepare_messages(HISTORY)) == "True"
    said = [{**HISTORY[0], "content": "Hm."}, {"role": "assistant", "content": None}]
    assert render(prepare_messages(said)) == "FalseFalse"


def test_calls_without_text_keep_an_empty_one_where_a_template_measures_it():
    source = (
        "{% for message in messages %}{% if message['content'] is none or message['content'] == ''"
        " %}{% endif %}{{ message['content'] | length }}{% endfor %}"
    )
    assert ChatTemplate({"default": source}, {}).render(prepare_messages(HISTORY)) == "0"
