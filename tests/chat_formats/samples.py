"""Replies as models write them: what was written, and what it means."""

from dataclasses import dataclass, field
from typing import Any

from jaxserve.chat_formats import Tool

TOOLS = (
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "metric": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    ),
    Tool("get_time", {"type": "object", "properties": {"zone": {"type": "string"}}}),
)

PARIS = ("get_weather", {"city": "Paris"})
TWO = [("get_weather", {"city": "Paris", "days": 2}), ("get_time", {"zone": "Europe/Paris"})]


@dataclass(frozen=True)
class Sample:
    """`written` in the format `name` means text and calls."""

    name: str
    written: str
    text: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ids: list[str | None] | None = None


SAMPLES = [
    Sample(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        calls=[PARIS],
    ),
    Sample(
        "hermes",
        "Let me look.\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}\n</tool_call>',
        text="Let me look.",
        calls=TWO,
    ),
    Sample(
        "hermes",
        '<tool_call>{"arguments": {"city": "}{\\"]"}, "name": "get_weather"}</tool_call>',
        calls=[("get_weather", {"city": '}{"]'})],
    ),
    Sample(
        "hermes",
        '<tool_call>{ <tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}, what? '
        "</tool_call> Well.",
        text="<tool_call>{, what? </tool_call> Well.",
        calls=[PARIS],
    ),
    *(
        Sample("hermes", written, text=written)
        for written in (
            '<tool_call>{"name": "get\\_time", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "get\ntime", "arguments": {}}</tool_call>',
        )
    ),
    Sample("hermes", "a < b and <tool> is no call", text="a < b and <tool> is no call"),
    Sample(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, '
        '"id": "}1"}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}\n</tool_call>',
        calls=TWO,
    ),
    Sample(
        "longcat",
        'Well.<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}'
        "</longcat_tool_call>",
        text="Well.",
        calls=[PARIS],
    ),
    Sample(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "args"\n</tool_call>',
        text='<tool_call>\n{"name": "get_weather", "args"\n</tool_call>',
    ),
    Sample(
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        calls=[PARIS],
    ),
    Sample(
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; '
        '{"type": "function", "name": "get_time", "parameters": {"zone": "Europe/Paris"}}',
        calls=TWO,
    ),
    Sample("llama3_json", '{"answer": 42}', text='{"answer": 42}'),
    Sample("llama3_json", '{"name": "Ada"}', text='{"name": "Ada"}'),
    Sample(
        "llama3_json",
        '{"name": "Ada", "parameters": {"age": 36}}',
        text='{"name": "Ada", "parameters": {"age": 36}}',
    ),
    Sample("llama3_json", "It is {warm}.", text="It is {warm}."),
    Sample(
        "llama4_json",
        '<|python_start|>{"name": "get_weather", "parameters": {"city": "Paris"}}<|python_end|>',
        calls=[PARIS],
    ),
    Sample(
        "llama4_json",
        '<|python_start|>Let me look.<|python_end|>{"name": "get_weather", "parameters": '
        '{"city": "Paris", "days": 2}}{"name": "get_time", "parameters": {"zone": "Europe/Paris"}}',
        text="Let me look.",
        calls=TWO,
    ),
    Sample(
        "pythonic",
        "[get_weather(city='Paris', days=2), get_time(zone=\"Europe/Paris\")]",
        calls=TWO,
    ),
    Sample(
        "pythonic",
        "<|python_start|>[get_weather(city='Paris', metric=True, tags=['a', \"b]\"])]"
        "<|python_end|>",
        calls=[("get_weather", {"city": "Paris", "metric": True, "tags": ["a", "b]"]})],
    ),
    Sample(
        "olmo3",
        '<function_calls>\nget_weather(city="Paris", days=2)\nget_time(zone="Europe/Paris")\n'
        "</function_calls>",
        calls=TWO,
    ),
    Sample(
        "lfm2",
        'Sure.<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>',
        text="Sure.",
        calls=[PARIS],
    ),
    Sample(
        "lfm2",
        '<|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
        "<|tool_call_end|>",
        calls=[PARIS],
    ),
    Sample(
        "lfm2",
        "<|tool_call_start|>[get_weather(city='d'Arc's \"Reims\",\nMarne', days=2), "
        "get_time(zone='Europe/Paris')]<|tool_call_end|>",
        calls=[
            ("get_weather", {"city": "d'Arc's \"Reims\",\nMarne", "days": 2}),
            ("get_time", {"zone": "Europe/Paris"}),
        ],
    ),
    Sample(
        "pythonic",
        "<|python_start|>[get-weather(from='in=, class=', class=[\"x\", 'if=1'], days=-2)]"
        "<|python_end|>",
        calls=[("get-weather", {"from": "in=, class=", "class": ["x", "if=1"], "days": -2})],
    ),
    Sample(
        "olmo3",
        '<function_calls>\n  get_weather(\n    city="Paris",\n    days=2,\n  )\n'
        '  get_time(zone="Europe/Paris")\n</function_calls>',
        calls=TWO,
    ),
    Sample("pythonic", "[1, 2] is a list", text="[1, 2] is a list"),
    Sample("pythonic", "[f(x) for x in y]", text="[f(x) for x in y]"),
    Sample("pythonic", "[Point(x=1), Point(x=2)]", text="[Point(x=1), Point(x=2)]"),
    Sample("pythonic", "[__import__('os').system(1)]", text="[__import__('os').system(1)]"),
    Sample(
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}'
        '[TOOL_CALLS]get_time[ARGS]{"zone": "Europe/Paris"}',
        calls=TWO,
    ),
    Sample("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', calls=[PARIS]),
    Sample(
        "mistral_list",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, '
        '"id": "abc123def"}, {"name": "get_time", "arguments": {"zone": "Europe/Paris"}, '
        '"id": "GHI456jkl"}]',
        calls=TWO,
        ids=[None, None],
    ),
    Sample(
        "mistral_list",
        'Hm. [TOOL_CALLS] [{"id": "abc123def", "name": "get_weather", "arguments": {"city": '
        '"Zürich ☂ \\"]}"}}, {"name": "get_time", "id": "GHI456jkl", "arguments": {}}]',
        text="Hm.",
        calls=[("get_weather", {"city": 'Zürich ☂ "]}'}), ("get_time", {})],
        ids=["abc123def", "GHI456jkl"],
    ),
    Sample(
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, '
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}]',
        calls=TWO,
    ),
    Sample(
        "qwen3_coder",
        "I will look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n"
        "</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=get_time>\n<parameter=zone>\nEurope/Paris\n</parameter>\n"
        "</function>\n</tool_call>",
        text="I will look.",
        calls=TWO,
    ),
    Sample(
        "qwen3_xml",
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nA "b"\n<c>\n\nd</parameter>\n'
        '<parameter=tags>\n["x", "y"]\n</parameter>\n<parameter=metric>\nTrue\n</parameter>\n'
        "<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>",
        calls=[
            (
                "get_weather",
                {"city": 'A "b"\n<c>\n\nd', "tags": ["x", "y"], "metric": True, "unit": "C"},
            )
        ],
    ),
    Sample(
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        "</function>\n</seed:tool_call>",
        calls=[PARIS],
    ),
    Sample(
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>['x']</parameter>\n"
        "<parameter=tags>['x', 'it\\'s', None]</parameter>\n<parameter=days>{1}</parameter>\n"
        "</function>\n</seed:tool_call>",
        calls=[("get_weather", {"city": "['x']", "tags": ["x", "it's", None], "days": "{1}"})],
    ),
    Sample(
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        '<｜tool▁sep｜>get_time\n```json\n{"zone": "Europe/Paris"}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        calls=TWO,
    ),
    Sample(
        "deepseek_v31",
        'One moment.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": '
        '"Paris", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>'
        '{"zone": "Europe/Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        text="One moment.",
        calls=TWO,
    ),
    Sample(
        "glm45",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        "<tool_call>get_time\n<arg_key>zone</arg_key>\n<arg_value>Europe/Paris</arg_value>\n"
        "</tool_call>",
        calls=TWO,
    ),
    Sample(
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
        calls=[PARIS],
    ),
    Sample("glm47", "<tool_call>get_time</tool_call>", calls=[("get_time", {})]),
    Sample(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris", "days": 2}<|tool_call_end|>'
        "<|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>"
        '{"zone": "Europe/Paris"}<|tool_call_end|><|tool_calls_section_end|>',
        calls=TWO,
        ids=["functions.get_weather:0", "functions.get_time:1"],
    ),
    Sample(
        "kimi_k2",
        '<|tool_call_begin|>get_time:0<|tool_call_argument_begin|>{"zone": "CET"}<|tool_call_end|>',
        calls=[("get_time", {"zone": "CET"})],
        ids=["get_time:0"],
    ),
    Sample(
        "kimi_k2",
        '<|tool_call_begin|>0<|tool_call_argument_begin|>{"zone": "CET"}',
        text='<|tool_call_begin|>0<|tool_call_argument_begin|>{"zone": "CET"}',
    ),
    Sample(
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
        '<|tool_call>call:get_time{zone:<|"|>Europe/Paris<|"|>}<tool_call|>',
        calls=TWO,
    ),
    Sample(
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>a},b<|"|>,tags:[<|"|>x<|"|>,<|"|>y<|"|>],'
        "metric:false,more:{deep:{n:-1.5}}}<tool_call|>",
        calls=[
            (
                "get_weather",
                {
                    "city": "a},b",
                    "tags": ["x", "y"],
                    "metric": False,
                    "more": {"deep": {"n": -1.5}},
                },
            )
        ],
    ),
    Sample(
        "gemma4",
        '<|tool_call>call:get_weather{city:"Paris, {\\"x\\"}",tags:["a","b"],'
        'more:{"deep: er":null}}<tool_call|>',
        calls=[
            (
                "get_weather",
                {"city": 'Paris, {"x"}', "tags": ["a", "b"], "more": {"deep: er": None}},
            )
        ],
    ),
    Sample(
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
        calls=[PARIS],
    ),
    Sample(
        "gemma4",
        "A <|tool_call> begins <|tool_call>call:get_weather{city:Paris}<tool_call|>",
        text="A <|tool_call> begins",
        calls=[PARIS],
    ),
    Sample("gemma4", "<|tool_call>nothing<tool_call|>", text="<|tool_call>nothing<tool_call|>"),
    Sample(
        "gemma4",
        "<|tool_call>call:get_weather{city:New York,unit:C,tags:[trueish, two],metric:True,"
        'more:{<|"|>a: b<|"|>:None,n:1e2}}<tool_call|>',
        calls=[
            (
                "get_weather",
                {
                    "city": "New York",
                    "unit": "C",
                    "tags": ["trueish", "two"],
                    "metric": True,
                    "more": {"a: b": None, "n": 100.0},
                },
            )
        ],
    ),
    Sample(
        "openai",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris", "days": 2}<|call|><|start|>assistant to=functions.get_time'
        '<|channel|>commentary json<|message|>{"zone": "Europe/Paris"}',
        calls=TWO,
    ),
    Sample("openai", "<|channel|>final<|message|>It rains.<|return|>", text="It rains."),
    Sample(
        "openai",
        "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|><|call|>",
        calls=[("get_time", {})],
    ),
    Sample(
        "longcat",
        "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
        "<longcat_arg_value>Paris</longcat_arg_value>\n</longcat_tool_call>",
        calls=[PARIS],
    ),
    Sample(
        "hy_v3",
        "Yes.<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n</tool_call>\n<tool_call>get_time<tool_sep>\n</tool_call>\n"
        "</tool_calls>",
        text="Yes.",
        calls=[PARIS, ("get_time", {})],
    ),
    Sample(
        "minimax_m2",
        "Let me look.\n<minimax:tool_call>\n"
        '<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n'
        '<invoke name="get_time">\n<parameter name="zone">Europe/Paris</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        text="Let me look.",
        calls=TWO,
    ),
    Sample(
        "minimax_m2",
        '<minimax:tool_call><invoke name="get_weather"><parameter name="city">\n<a>"\n</parameter>'
        '<parameter name="tags">["x"]</parameter></invoke></minimax:tool_call> Done.',
        text="Done.",
        calls=[("get_weather", {"city": '\n<a>"\n', "tags": ["x"]})],
    ),
    Sample(
        "minimax_m2",
        'In XML, <invoke name="f"> and <minimax:tool_call>\n<call>',
        text='In XML, <invoke name="f"> and <minimax:tool_call>\n<call>',
    ),
    Sample(
        "deepseek_v32",
        "One moment.\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="get_time">\n'
        '<｜DSML｜parameter name="zone" string="true">Europe/Paris</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        text="One moment.",
        calls=TWO,
    ),
    Sample(
        "deepseek_v4",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">7</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="more" string="false">{"a": [null, "b"]}</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="other" string="true">7</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        calls=[("get_weather", {"city": "7", "more": {"a": [None, "b"]}, "other": "7"})],
    ),
    Sample(
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, '
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}]',
        calls=TWO,
    ),
    Sample(
        "phi4_mini_json",
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        calls=[PARIS],
    ),
    Sample(
        "phi4_mini_json",
        '<|tool_call|>{"name": "get_weather", "arguments": {"city": "Paris"}}<|/tool_call|>',
        calls=[PARIS],
    ),
    Sample("phi4_mini_json", "Use functools here.", text="Use functools here."),
    Sample("hermes", '<tool_call>{"name": "get_time"}</tool_call>', calls=[("get_time", {})]),
    Sample(
        "hermes",
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}},\n'
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}]</tool_call>',
        calls=TWO,
    ),
    Sample(
        "hunyuan_a13b",
        '<tool_calls>[\n    {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}},\n'
        '    {"name": "get_time", "arguments": {"zone": "Europe/Paris"}}\n]</tool_calls>',
        calls=TWO,
    ),
    Sample(
        "nemotron_json",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>',
        calls=[PARIS],
    ),
    Sample(
        "cohere",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        '{"city": "Paris", "days": 2}},\n    {"tool_call_id": "1", "tool_name": "get_time", '
        '"parameters": {"zone": "Europe/Paris"}}\n]<|END_ACTION|>',
        calls=TWO,
    ),
    Sample(
        "qwen3_xml",
        'Yes.<function=get_weather>{"city": "Paris", "days": 2}</function>'
        '<function=get_time>{"zone": "Europe/Paris"}</function>',
        text="Yes.",
        calls=TWO,
    ),
    Sample(
        "gigachat3",
        "Well.\n\nfunction call<|role_sep|>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        text="Well.",
        calls=[PARIS],
    ),
    Sample(
        "gigachat31",
        '<|function_call|>{"name": "get_weather", "arguments": {"city": "Paris"}}',
        calls=[PARIS],
    ),
    Sample(
        "kimi_k3",
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
        '<|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>'
        '<|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
        "<|close|>call<|sep|>"
        '<|open|>call tool="get_time" index="2"<|sep|>'
        '<|open|>argument key="zone" type="string"<|sep|>Europe/Paris<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        calls=TWO,
    ),
    Sample(
        "kimi_k3",
        'Zürich.<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
        '<|open|>argument key="a &quot;b&amp;" type="string"<|sep|>"7" <|close|>\n'
        "<|close|>argument<|sep|>"
        '<|open|>argument key="more" type="object"<|sep|>{"a": [null, "ü"]}<|close|>argument<|sep|>'
        '<|close|>call<|sep|><|open|>call tool="get_time" index="2"<|sep|>'
        '<|open|>json type="object"<|sep|>{"zone": "CET"}<|close|>json<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        text="Zürich.",
        calls=[
            ("get_weather", {'a "b&': '"7" <|close|>\n', "more": {"a": [None, "ü"]}}),
            ("get_time", {"zone": "CET"}),
        ],
    ),
    Sample(
        "kimi_k3",
        '<|open|>call index="1"<|sep|> and <|open|>call tool="get_time" index="1"<|sep|>'
        "<|close|>call<|sep|> Done.",
        text='<|open|>call index="1"<|sep|> andDone.',
        calls=[("get_time", {})],
    ),
    Sample(
        "minimax_m3",
        "Let me look.\n]<]minimax[>[<tool_call>\n"
        ']<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Paris]<]minimax[>[</city>'
        "]<]minimax[>[<days>2]<]minimax[>[</days>]<]minimax[>[</invoke>\n"
        ']<]minimax[>[<invoke name="get_time">]<]minimax[>[<zone>Europe/Paris]<]minimax[>[</zone>'
        "]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
        text="Let me look.",
        calls=TWO,
    ),
    Sample(
        "minimax_m3",
        ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="get_weather">'
        ']<]minimax[>[<city>\n<a>]<]mini</city> "]<]minimax[>[</city>'
        "]<]minimax[>[<tags>]<]minimax[>[<item>7]<]minimax[>[</item>"
        "]<]minimax[>[<item>ü]<]minimax[>[</item>]<]minimax[>[</tags>"
        "]<]minimax[>[<more>]<]minimax[>[<more>]<]minimax[>[<n>1]<]minimax[>[</n>"
        "]<]minimax[>[</more>]<]minimax[>[<no>null]<]minimax[>[</no>]<]minimax[>[</more>"
        "]<]minimax[>[<bad>]<]minimax[>[<n>1]<]minimax[>[</bad>"
        "]<]minimax[>[</invoke>]<]minimax[>[</tool_call> Done.",
        text="Done.",
        calls=[
            (
                "get_weather",
                {
                    "city": '\n<a>]<]mini</city> "',
                    "tags": ["7", "ü"],
                    "more": {"more": {"n": 1}, "no": None},
                    "bad": "]<]minimax[>[<n>1",
                },
            )
        ],
    ),
    Sample(
        "minimax_m3",
        "]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke of>",
        text="]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke of>",
    ),
    Sample(
        "hy_v4",
        "Yes.<tool_calls><tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
        "<tool_call>get_time<arg_key>zone</arg_key><arg_value>Europe/Paris</arg_value></tool_call>"
        "</tool_calls>",
        text="Yes.",
        calls=TWO,
    ),
    Sample(
        "step3",
        "I look.<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="get_weather"><steptml:parameter name="city">Paris'
        '</steptml:parameter><steptml:parameter name="days">2</steptml:parameter>'
        "</steptml:invoke><｜tool_call_end｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>\n"
        '<steptml:invoke name="get_time">\n<steptml:parameter name="zone">Europe/Paris'
        "</steptml:parameter>\n</steptml:invoke>\n<｜tool_call_end｜><｜tool_calls_end｜> Done.",
        text="I look.Done.",
        calls=TWO,
    ),
    Sample(
        "step3",
        "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>none",
        text="<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>none",
    ),
    Sample(
        "apertus",
        'Well.<|tools_prefix|>[{"get_weather": {"city": "Paris", "days": 2}}, '
        '{"get_time": {"zone": "Europe/Paris"}}]<|tools_suffix|> Done.',
        text="Well.Done.",
        calls=TWO,
    ),
    Sample(
        "apertus",
        '<|tools_prefix|>{ "get_weather" :\n{"city": "ü}]\\"", "more": [{"a": {}}]} }',
        calls=[("get_weather", {"city": 'ü}]"', "more": [{"a": {}}]})],
    ),
    Sample(
        "apertus",
        '<|tools_prefix|>[{"get_weather": 7}]<|tools_suffix|>',
        text='<|tools_prefix|>[{"get_weather": 7}]<|tools_suffix|>',
    ),
    Sample(
        "functionary_v3",
        'all\nLet me look.>>>get_weather\n{"city": "Paris", "days": 2}>>>get_time\n'
        '{"zone": "Europe/Paris"}',
        text="Let me look.",
        calls=TWO,
    ),
    Sample("functionary_v3", 'get_weather\n{"city": "Paris"}', calls=[PARIS]),
    Sample(
        "functionary_v3",
        "all\nIn Python:\n>>> x\n>>>f\nx",
        text="In Python:\n>>> x\n>>>f\nx",
    ),
    Sample("functionary_v3", 'Ada\n{"born": 1815}', text='Ada\n{"born": 1815}'),
    Sample(
        "command_r",
        'I look.\nAction:\n```json\n[\n    {\n        "tool_name": "get_weather",\n'
        '        "parameters": {\n            "city": "Paris",\n            "days": 2\n        }\n'
        '    },\n    {\n        "tool_name": "get_time",\n        "parameters": '
        '{"zone": "Europe/Paris"}\n    }\n]```\n',
        text="I look.",
        calls=TWO,
    ),
    Sample(
        "command_r",
        'Action: ```json\n[{"tool_name": "get_weather", "parameters": {"city": "Paris"}}]\n```',
        calls=[PARIS],
    ),
    Sample(
        "command_r",
        "Action:\n```json\n[1, 2]\n```",
        text="Action:\n```json\n[1, 2]\n```",
    ),
    Sample(
        "hunyuan_a13b",  # MiniMax M1
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n'
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}\n</tool_calls>',
        calls=TWO,
    ),
]
