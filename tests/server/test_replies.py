"""What the official client makes of a stream is what a whole reply says, in every format."""

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from jaxserve.chat_format_choice import ChatFormats
from jaxserve.chat_formats import parse_whole
from jaxserve.conversation import ChatPlan, ToolUse
from jaxserve.outputs import OutputDelta
from jaxserve.server.replies import ReplyReader, reply_fields
from jaxserve.types import FinishReason
from tests.chat_formats.samples import SAMPLES, TOOLS, Sample
from tests.fake_engine import make_tokenizer

FORMATS = {
    name: ChatFormats.of(make_tokenizer(), name, "none") for name in {s.name for s in SAMPLES}
}


def plan_of(sample: Sample) -> ChatPlan:
    formats = FORMATS[sample.name]
    return ChatPlan("", formats, ToolUse(tools=TOOLS, choice="auto"), tool_format=formats.tools)


def streamed(plan: ChatPlan, pieces: list[str]) -> dict[str, Any]:
    """The message that the client's stream helper puts together."""
    reader, state = ReplyReader(plan), ChatCompletionStreamState()
    head = {"id": "x", "created": 0, "model": "m", "object": "chat.completion.chunk"}
    deltas = [OutputDelta(piece) for piece in pieces] + [
        OutputDelta(finish_reason=FinishReason.STOP)
    ]
    for given in deltas:
        for delta in reader.read(given):
            choice = {"index": 0, "delta": delta.fields, "finish_reason": delta.finish_reason}
            state.handle_chunk(ChatCompletionChunk.model_validate({**head, "choices": [choice]}))
    return state.get_final_completion().choices[0].message.model_dump()


def told(message: dict[str, Any]) -> tuple[Any, ...]:
    """Text and calls of a message; the ids that we make are never the same."""
    calls = [(c["type"], c["function"]) for c in message.get("tool_calls") or ()]
    names = [(kind, said["name"], said["arguments"]) for kind, said in calls]
    return message.get("content") or "", message.get("reasoning") or "", names


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s.name} {s.written[:30]!r}")
def test_a_stream_joins_to_the_whole_reply(sample: Sample):
    plan = plan_of(sample)
    reply = parse_whole(plan.parser(), sample.written)
    for pieces in (list(sample.written), [sample.written]):
        message = streamed(plan, pieces)
        assert told(message) == told(reply_fields(plan, reply))
        ids = [call["id"] for call in message["tool_calls"] or ()]
        assert all(ids) and len(set(ids)) == len(ids)
        for call, given in zip(message["tool_calls"] or (), sample.ids or (), strict=False):
            assert given is None or call["id"] == given
        for call in message["tool_calls"] or ():
            json.loads(call["function"]["arguments"])
