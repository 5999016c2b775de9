"""One request's token events, turned into text: stop strings, log-probabilities, usage.

Knows nothing of the engine or of HTTP. An OutputProcessor belongs to one request and sees its
events in order. Once a delta says `must_abort`, the engine still works on the request: abort it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.tokenizer import IncrementalDecoder, Tokenizer
from jaxserve.types import (
    FinishReason,
    PromptReuse,
    Request,
    States,
    TokenEvent,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token's log-probability, with its text and the bytes it stands for."""

    token_id: int
    logprob: float
    text: str
    token_bytes: bytes


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at one position and the likeliest alternatives, most likely first."""

    token: TokenText
    top: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one or several tokens added to an answer; printing it prints the text.

    `text` may lag behind `token_ids`: characters that are not whole yet, and what may turn out to
    be a stop string, come with a later delta. `finish_reason` is set on the last one.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    must_abort: bool = field(default=False, repr=False)

    def __str__(self) -> str:
        return self.text


class StopStrings:
    """Finds the first stop string to be completed in text that comes in pieces.

    How the text is cut into pieces makes no difference. If two end at the same character, the
    longer one counts. `feed` returns no character that may still become part of a stop string.
    """

    def __init__(self, stop: Sequence[str], include_in_output: bool = False):
        self._stop = tuple(stop)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Append text; return what is certain. After a match nothing more comes out."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, self.matched = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[: end if self._include else end - len(self.matched)]
        certain = len(text) - max(_longest_start(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _longest_start(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


class OutputProcessor:
    """Assembles the answer to one request; `process` is called once per event, in order."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        sampling = request.sampling
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.cumulative_logprob = 0.0
        self.num_cached_tokens = 0
        self.reuse: PromptReuse | None = None
        self.states: list[States] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._pieces: list[str] = []
        self._tokenizer = tokenizer
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._decoder = IncrementalDecoder(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            prompt_ids=request.prompt_ids,
        )

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def prompt_token(self, index: int) -> TokenText:
        """A token of the prompt, whose log-probability nobody knows."""
        return self._token_text(self.request.prompt_ids[index], 0.0)

    def process(self, event: TokenEvent) -> OutputDelta:
        """Take one event; return what it adds. Events after the end add nothing."""
        if self.finished:
            return OutputDelta()
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.reuse = self.reuse or event.reuse
        if event.states is not None:
            self.states.append(event.states)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = [
                entry and self._describe(entry) for entry in event.prompt_logprobs
            ]
        logprobs: tuple[PositionLogprobs, ...] = ()
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
            if event.logprobs is not None:
                logprobs = (self._describe(event.logprobs),)
                self.logprobs.extend(logprobs)
                self.cumulative_logprob += event.logprobs.logprob
        text = self._text_of(event)
        return OutputDelta(
            text=text,
            token_ids=() if event.token_id is None else (event.token_id,),
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            must_abort=self.finished and event.finish_reason is None,
        )

    def _text_of(self, event: TokenEvent) -> str:
        """The event's text; sets the finish reason when the request ends with it."""
        sampling = self.request.sampling
        text = ""
        ended_by_token = event.stop_token_id is not None
        hidden = ended_by_token and not sampling.include_stop_str_in_output
        if event.token_id is not None and not hidden:
            text = self._decoder.feed((event.token_id,))
        if event.finish_reason is not None:
            text += self._decoder.flush()
        if len(self.token_ids) > sampling.min_tokens:
            text = self._stops.feed(text)
        if self._stops.matched is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._stops.matched
        elif event.finish_reason is not None:
            text += self._stops.flush()
            self.finish_reason = event.finish_reason
            if ended_by_token and event.stop_token_id in sampling.stop_token_ids:
                self.stop_reason = event.stop_token_id
        self._pieces.append(text)
        return text

    def _describe(self, logprobs: TokenLogprobs) -> PositionLogprobs:
        return PositionLogprobs(
            self._token_text(logprobs.token_id, logprobs.logprob),
            tuple(self._token_text(token_id, logprob) for token_id, logprob in logprobs.top),
        )

    def _token_text(self, token_id: int, logprob: float) -> TokenText:
        token_bytes = self._tokenizer.token_bytes(token_id)
        return TokenText(token_id, logprob, token_bytes.decode("utf-8", "replace"), token_bytes)


def merge_deltas(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Several deltas of one answer, in order, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return OutputDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        finish_reason=next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None),
        stop_reason=next(
            (d.stop_reason for d in reversed(deltas) if d.stop_reason is not None), None
        ),
        must_abort=any(delta.must_abort for delta in deltas),
    )
