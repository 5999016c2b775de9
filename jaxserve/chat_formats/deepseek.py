"""DeepSeek V3, R1 (with a code fence) and V3.1 (without).

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Paris"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}
<｜tool▁call▁end｜><｜tool▁calls▁end｜>                              (all on one line)
"""

from collections.abc import Generator, Sequence

from jaxserve.chat_formats.events import CallEnd, CallStart, Event, Text
from jaxserve.chat_formats.format import CallPattern, Part, ToolFormat, parameters_of
from jaxserve.chat_formats.source import (
    Parsing,
    Source,
    blanks,
    follows,
    head_until,
    json_arguments,
    text_until,
)
from jaxserve.chat_formats.tools import NAME, Tool

SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"


def parse(source: Source, tools: Sequence[Tool]) -> Parsing:
    while True:
        mark = yield from text_until(source, (SECTION, SECTION_END, BEGIN))
        if mark is None:
            return
        if mark == BEGIN:
            yield from _one(source)


def _one(source: Source) -> Generator[Event | None, None, None]:
    found = yield from head_until(source, (SEPARATOR,))
    if found is None:
        yield Text(BEGIN)
        return
    kind, _ = found
    raw, name = BEGIN + kind + SEPARATOR, kind.strip()
    if name == "function" or not name:
        found = yield from head_until(source, ("{",))
        if found is None:
            yield Text(raw)
            return
        head = found[0]
        source.text = "{" + source.text
        name = head.replace(FENCE + "json", "").replace(FENCE, "").strip()
        raw += head
    else:
        raw += yield from blanks(source)
    if not NAME.fullmatch(name) or not source.text.startswith("{"):
        yield Text(raw)
        return
    index = source.next_call()
    yield CallStart(index, name)
    arguments, _ = yield from json_arguments(source, index)
    yield CallEnd(index, raw + arguments)
    yield from blanks(source)
    yield from follows(source, FENCE)
    yield from blanks(source)
    yield from follows(source, END)


def _fenced(tool: Tool) -> list[Part]:
    head = f"{BEGIN}function{SEPARATOR}{tool.name}\n{FENCE}json\n"
    return [head, parameters_of(tool), f"\n{FENCE}{END}"]


def _plain(tool: Tool) -> list[Part]:
    return [BEGIN + tool.name + SEPARATOR, parameters_of(tool), END]


V3 = ToolFormat(
    names=("deepseek_v3",),
    parse=parse,
    pattern=CallPattern(_fenced, begin=SECTION, between="\n", end=SECTION_END),
    detect=lambda template: SECTION in template and FENCE + "json" in template,
    marks=(SECTION, SECTION_END, BEGIN, SEPARATOR, END),
)

V31 = ToolFormat(
    names=("deepseek_v31",),
    parse=parse,
    pattern=CallPattern(_plain, begin=SECTION, end=SECTION_END),
    detect=lambda template: SECTION in template,
    marks=(SECTION, SECTION_END, BEGIN, SEPARATOR, END),
)
