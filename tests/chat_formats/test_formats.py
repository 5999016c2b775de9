"""Every format on replies as models write them, whole and cut in every place."""

import json

import pytest

from jaxserve.chat_formats import ReplyParser, assemble, parse_whole
from jaxserve.chat_formats.events import CallArguments, CallStart, Event, Text
from jaxserve.chat_formats.registry import find_tool_format
from jaxserve.chat_formats.tools import cast_value
from tests.chat_formats.samples import SAMPLES, TOOLS, Sample


def make_parser(sample: Sample) -> ReplyParser:
    return ReplyParser(find_tool_format(sample.name, ""), None, tools=TOOLS)


def read(parser: ReplyParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def read_events(parser: ReplyParser, written: str) -> list[Event]:
    return [event for char in written for event in parser.feed(char)]


def joined(events: list[Event]) -> list[object]:
    """Neighbouring texts and arguments as one."""
    found: list[object] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            found[-1] = CallArguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found


def name_of(sample: Sample) -> str:
    return f"{sample.name} {sample.written[:30]!r}"


@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_a_reply_is_read_as_the_model_meant_it(sample: Sample):
    reply = parse_whole(make_parser(sample), sample.written)
    assert reply.text == sample.text
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == sample.calls
    if sample.ids is not None:
        assert [call.call_id for call in reply.calls] == sample.ids


@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_where_the_text_is_cut_makes_no_difference(sample: Sample):
    whole = joined(read(make_parser(sample), [sample.written]))
    for cut in range(1, len(sample.written)):
        pieces = [sample.written[:cut], sample.written[cut:]]
        assert joined(read(make_parser(sample), pieces)) == whole, f"cut at {cut}"
    assert joined(read(make_parser(sample), list(sample.written))) == whole


@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_a_reply_that_breaks_off_never_raises_and_shows_no_markup_of_complete_calls(
    sample: Sample,
):
    for end in range(0, len(sample.written), 1 + len(sample.written) // 250):
        written = sample.written[:end]
        by_character = read(make_parser(sample), list(written))
        assert joined(by_character) == joined(read(make_parser(sample), [written]))
        names = [event.name for event in by_character if isinstance(event, CallStart)]
        assert names == [name for name, _ in sample.calls][: len(names)]
        for call in assemble(by_character).calls:
            assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'),
        ("mistral_list", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Par'),
        (
            "cohere",
            '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", '
            '"parameters": {"city": "Par',
        ),
    ],
)
def test_arguments_of_json_formats_are_given_out_while_they_come(name: str, before: str):
    parser = make_parser(Sample(name, ""))
    assert CallStart(0, "get_weather") in read_events(parser, before)
    (event,) = parser.feed("is and")
    assert event == CallArguments(0, "is and")


def test_a_text_argument_of_tagged_formats_is_given_out_while_it_comes():
    parser = make_parser(Sample("qwen3_xml", ""))
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\nPar")
    (event,) = parser.feed('is "x')
    assert event == CallArguments(0, 'is \\"x')


def test_a_call_whose_arguments_are_no_json_is_text_in_a_whole_reply():
    written = '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
    reply = parse_whole(make_parser(Sample("hermes", "")), written)
    assert not reply.calls and '{"city": Paris}' in reply.text


def test_a_call_of_kimi_that_has_only_a_number_is_one_of_the_only_tool():
    written = '<|tool_call_begin|>0<|tool_call_argument_begin|>{"zone": "CET"}<|tool_call_end|>'
    parser = ReplyParser(find_tool_format("kimi_k2", ""), None, tools=TOOLS[1:])
    (call,) = parse_whole(parser, written).calls
    assert (call.name, call.call_id, call.arguments) == ("get_time", "0", '{"zone": "CET"}')


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("pythonic", r'[get_time(zone="\ud83d\ude00 \ud83d")]'),
        (
            "hermes",
            r'<tool_call>{"arguments": {"zone": "\ud83d\ude00 \ud83d"}, "name": "get_time"}',
        ),
    ],
)
def test_halves_of_characters_reach_no_one_as_such(name: str, written: str):
    (call,) = parse_whole(make_parser(Sample(name, "")), written).calls
    assert call.arguments.encode() and json.loads(call.arguments) == {"zone": "😀 \ud83d"}
    reply = parse_whole(make_parser(Sample("hermes", "")), written.replace("get_time", r"\ud83d"))
    assert reply.text == written.replace("get_time", r"\ud83d") and not reply.calls


@pytest.mark.parametrize("num_words", [600, 20_000])
def test_a_call_of_many_characters_between_tags_is_a_call(num_words: int):
    city = "Llan\nfair" * num_words
    written = f"<|tool_call_start|>[get_weather(city={city!r})]<|tool_call_end|>"
    parser = make_parser(Sample("lfm2", ""))
    parser.feed(written[:4500])
    (call,) = parse_whole(parser, written[4500:]).calls
    assert json.loads(call.arguments) == {"city": city}


def test_what_python_would_be_slow_to_read_stays_text():
    written = f"<|tool_call_start|>[f(a=[{'1, ' * 30_000}])]<|tool_call_end|>"
    assert parse_whole(make_parser(Sample("lfm2", "")), written).text == written


def test_elements_of_one_name_within_each_other_end_where_they_end():
    mark, depth = "]<]minimax[>[", 30
    deep = f"{mark}<a>" * depth + "1" + f"{mark}</a>" * depth
    written = f'{mark}<tool_call>{mark}<invoke name="get_weather">{deep}{mark}</invoke>'
    (call,) = parse_whole(make_parser(Sample("minimax_m3", "")), written).calls
    value = json.loads(call.arguments)
    for _ in range(depth):
        value = value["a"]
    assert value == 1
    far = f'{mark}<tool_call>{mark}<invoke name="get_weather">' + f"{mark}<a>" * 2000
    (call,) = parse_whole(make_parser(Sample("minimax_m3", "")), far).calls
    assert json.loads(call.arguments) == {"a": f"{mark}<a>" * 1999}


@pytest.mark.parametrize(
    "written", ["[" * 5000, "{'a': {1}}", "{(1, 2): 3}", "[1e999]", "['a'", "[b'x']", "('x'" * 4000]
)
def test_what_neither_json_nor_python_can_read_as_a_value_stays_a_text(written: str):
    assert cast_value(written, {"type": "array"}) == written


@pytest.mark.parametrize(
    ("written", "kinds", "value"),
    [
        ("[1]", ["string", "null"], "[1]"),
        ("[1]", ["string", "array"], [1]),
        ('{"a": 1}', ["string", "null"], '{"a": 1}'),
        ("['a']", ["array", "null"], ["a"]),
        ("['a']", ["array", "string"], "['a']"),
        ("null", ["string", "null"], None),
        ("7", ["string", "null"], "7"),
        ("7", ["string", "integer"], 7),
    ],
)
def test_a_value_without_quotes_is_what_its_schema_allows(
    written: str, kinds: list[str], value: object
):
    assert cast_value(written, {"type": kinds}) == value


@pytest.mark.parametrize(
    ("name", "before", "after", "limit"),
    [
        ("gemma4", "<|tool_call>call:get_weather{city:", "}<tool_call|>", 262144),
        ("lfm2", "<|tool_call_start|>[get_weather(city='", "')]<|tool_call_end|>", 262144),
        ("glm45", "<tool_call>", "</tool_call>", 4096),
        ("hermes", '<tool_call>{"name": "', '", "arguments": {}, "id": 1}</tool_call>', 1024),
        ("pythonic", "[get_time", "()]", 4096),
        ("functionary_v3", ">>>", "\n{}", 66),
    ],
)
def test_where_a_text_that_is_too_long_is_cut_makes_no_difference(
    name: str, before: str, after: str, limit: int
):
    filler = " " if name == "pythonic" else "x"
    for length in range(max(0, limit - 60), limit + 3, 3 if limit < 100_000 else 15):
        written = before + filler * length + after
        whole = joined(read(make_parser(Sample(name, "")), [written]))
        first = max(0, limit - 80)
        pieces = [written[:first], *written[first:]]
        assert joined(read(make_parser(Sample(name, "")), pieces)) == whole


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hermes", "<tool_call>{"),
        ("hermes", '<tool_call>{"a": {"'),
        ("mistral", "[TOOL_CALLS]{"),
        ("phi4_mini_json", "functools[{"),
        ("gemma4", '<|tool_call>call:a{b:x",c:"'),
        ("minimax_m2", "<minimax:tool_call><invoke name=" + " " * 4000 + '"a"b>'),
        ("minimax_m3", "]<]minimax[>[<tool_call>]<]minimax[>[<invoke name=>"),
        ("kimi_k3", "<|open|>call tool=<|sep|>"),
        ("apertus", '<|tools_prefix|>[{"a'),
        ("step3", "<｜tool_calls_begin｜><steptml:invoke name=>"),
        ("functionary_v3", ">>>a\n"),
        ("command_r", 'Action:\n```json\n[{"tool_name": "a'),
    ],
)
def test_a_reply_of_nothing_but_beginnings_of_calls_is_text(name: str, unit: str):
    written = unit * (30_000 // len(unit))
    assert parse_whole(make_parser(Sample(name, "")), written).text == written
