"""Replies with reasoning and tool calls, in the words of the chat API: whole, and as deltas."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxserve.chat_formats import CallArguments, CallStart, Reasoning, Reply, Text
from jaxserve.conversation import ChatPlan
from jaxserve.outputs import OutputDelta, PositionLogprobs
from jaxserve.types import FinishReason


def reply_fields(plan: ChatPlan, reply: Reply, shows_reasoning: bool = True) -> dict[str, Any]:
    """Fields of the message of a whole reply."""
    message: dict[str, Any] = {"content": reply.text}
    if reply.reasoning and shows_reasoning:
        message |= _reasoning(reply.reasoning)
    if reply.calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [
            {
                "id": plan.call_id(i, call.name, call.call_id),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(reply.calls)
        ]
    return message


def finish_of(plan: ChatPlan, reason: FinishReason | None, num_calls: int) -> str | None:
    """Why a reply ended: `tool_calls` if it ended by itself with calls that were not demanded by
    name, as OpenAI has it."""
    if reason is FinishReason.STOP and num_calls and plan.use.named is None:
        return "tool_calls"
    return reason


class ReplyDelta(NamedTuple):
    """Fields of a chunk's `delta`, and what belongs beside them."""

    fields: dict[str, Any]
    logprobs: tuple[PositionLogprobs, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None


class ReplyReader:
    """One reply of a stream: text that comes in, deltas that go out."""

    def __init__(self, plan: ChatPlan, shows_reasoning: bool = True):
        self._plan = plan
        self._shows_reasoning = shows_reasoning
        self._parser = plan.parser()
        self._num_calls = 0
        self._logprobs: list[PositionLogprobs] = []
        self._token_ids: list[int] = []

    def read(self, delta: OutputDelta) -> Iterator[ReplyDelta]:
        """What came, as deltas; log-probabilities go with the first one that there is."""
        self._logprobs += delta.logprobs
        self._token_ids += delta.token_ids
        events = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        fields = [found for event in events if (found := self._fields(event))]
        for found in _merge(fields):
            yield ReplyDelta(found, *self._take_tokens())
        if delta.finish_reason is not None:
            reason = finish_of(self._plan, delta.finish_reason, self._num_calls)
            yield ReplyDelta({}, *self._take_tokens(), reason)

    def _take_tokens(self) -> tuple[tuple[PositionLogprobs, ...], tuple[int, ...]]:
        taken = tuple(self._logprobs), tuple(self._token_ids)
        self._logprobs, self._token_ids = [], []
        return taken

    def _fields(self, event: Any) -> dict[str, Any]:
        match event:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return _reasoning(text) if self._shows_reasoning else {}
            case CallStart(index, name, call_id):
                self._num_calls += 1
                call = {
                    "index": index,
                    "id": self._plan.call_id(index, name, call_id),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return {}


def _reasoning(text: str) -> dict[str, Any]:
    """Under both names that clients look for."""
    return {"reasoning": text, "reasoning_content": text}


def _merge(fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring pieces of the same kind as one: fewer chunks."""
    merged: list[dict[str, Any]] = []
    for found in fields:
        last = merged[-1] if merged else {}
        if found.keys() == last.keys() and "tool_calls" not in found:
            merged[-1] = {key: last[key] + found[key] for key in found}
        elif "tool_calls" in found and "tool_calls" in last:
            call, before = found["tool_calls"][0], last["tool_calls"][0]
            if call["index"] == before["index"] and "id" not in call:
                before["function"]["arguments"] += call["function"]["arguments"]
            else:
                merged.append(found)
        else:
            merged.append(found)
    return merged
