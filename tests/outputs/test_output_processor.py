import dataclasses
from typing import Any

import pytest

from jaxserve.outputs import OutputDelta, OutputProcessor, merge_deltas
from jaxserve.types import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from tests.fake_engine import EOS_ID, make_tokenizer

TOKENIZER = make_tokenizer()


def processor(**sampling: Any) -> OutputProcessor:
    params = SamplingParams(**{"max_tokens": 50, "seed": 0, **sampling})
    prompt_ids = tuple(TOKENIZER.encode("prompt"))
    return OutputProcessor(Request("r", prompt_ids, params, (EOS_ID,)), TOKENIZER)


def feed(
    target: OutputProcessor, text: str, finish: FinishReason | None = None
) -> list[OutputDelta]:
    """One event per token of `text`; the last one carries `finish`."""
    ids = TOKENIZER.encode(text)
    events = [TokenEvent("r", token_id) for token_id in ids]
    if finish:
        events[-1] = events[-1]._replace(finish_reason=finish)
    return [target.process(event) for event in events]


def test_text_is_the_join_of_the_deltas():
    target = processor()
    deltas = feed(target, "Hello 日本 😀!", FinishReason.LENGTH)
    assert "".join(map(str, deltas)) == target.text == "Hello 日本 😀!"
    assert target.finish_reason is FinishReason.LENGTH and not deltas[-1].must_abort
    assert merge_deltas(deltas).token_ids == tuple(target.token_ids)


def test_a_stop_string_across_tokens_ends_the_request_and_asks_for_an_abort():
    target = processor(stop=("STOP",))
    deltas = feed(target, "go on ST")
    assert "".join(map(str, deltas)) == "go on "
    (last,) = [delta for delta in feed(target, "OP and more") if delta.finish_reason]
    assert last.must_abort and last.stop_reason == "STOP"
    assert target.text == "go on " and target.finish_reason is FinishReason.STOP


def test_the_stop_string_can_stay_in_the_text():
    target = processor(stop=("STOP",), include_stop_str_in_output=True)
    feed(target, "go STOP more")
    assert target.text == "go STOP"


def test_what_was_held_back_comes_out_at_the_end():
    target = processor(stop=("STOP",))
    feed(target, "go ST", FinishReason.LENGTH)
    assert target.text == "go ST" and target.finish_reason is FinishReason.LENGTH


def test_a_stop_string_completed_by_the_last_token_needs_no_abort():
    target = processor(stop=("!",))
    deltas = feed(target, "go!", FinishReason.LENGTH)
    assert deltas[-1].finish_reason is FinishReason.STOP and not deltas[-1].must_abort
    assert target.text == "go"


def test_stop_strings_wait_for_min_tokens():
    target = processor(stop=("b",), min_tokens=3)
    for char in "abcdb":
        target.process(TokenEvent("r", TOKENIZER.encode(char)[0]))
    assert target.text == "abcd" and target.stop_reason == "b"


@pytest.mark.parametrize(("include", "text"), [(False, "Hi"), (True, "Hi!")])
def test_a_stop_token_is_in_the_ids_but_in_the_text_only_if_asked(include: bool, text: str):
    (stop_id,) = TOKENIZER.encode("!")
    target = processor(stop_token_ids=(stop_id,), include_stop_str_in_output=include)
    feed(target, "Hi")
    target.process(TokenEvent("r", stop_id, FinishReason.STOP, stop_token_id=stop_id))
    assert target.text == text and target.stop_reason == stop_id
    assert target.token_ids[-1] == stop_id


def test_end_of_sequence_is_no_stop_reason_and_never_text():
    target = processor(skip_special_tokens=False)
    feed(target, "Hi")
    target.process(TokenEvent("r", EOS_ID, FinishReason.STOP, stop_token_id=EOS_ID))
    assert target.text == "Hi" and target.stop_reason is None


def test_an_end_without_a_token_flushes_what_is_left():
    target = processor()
    first_bytes = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == b"\xf0"]
    target.process(TokenEvent("r", first_bytes[0]))
    assert target.text == ""
    target.process(TokenEvent("r", None, FinishReason.ABORT))
    assert target.text == "\ufffd" and target.finish_reason is FinishReason.ABORT


def test_events_after_the_end_change_nothing():
    target = processor(stop=("a",))
    feed(target, "xa")
    before = (target.text, list(target.token_ids))
    assert feed(target, "more")[0] == OutputDelta()
    assert (target.text, target.token_ids) == before


def test_logprobs_carry_text_and_bytes_and_add_up():
    target = processor(logprobs=1)
    (a,), (b,) = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    for token_id in (a, b):
        entry = TokenLogprobs(token_id, -0.5, ((a, -0.25),))
        target.process(TokenEvent("r", token_id, logprobs=entry))
    assert target.cumulative_logprob == -1.0
    assert [entry.token.text for entry in target.logprobs] == ["a", "b"]
    assert target.logprobs[1].top[0].token_bytes == b"a"


def test_prompt_logprobs_and_cached_tokens_are_kept_from_the_first_event():
    target = processor(prompt_logprobs=0)
    (a,) = TOKENIZER.encode("a")
    event = TokenEvent(
        "r", a, num_cached_tokens=3, prompt_logprobs=(None, TokenLogprobs(a, -1, ()))
    )
    target.process(event)
    target.process(event._replace(num_cached_tokens=0, prompt_logprobs=None))
    assert target.num_cached_tokens == 3
    assert target.prompt_logprobs is not None
    assert target.prompt_logprobs[0] is None and target.prompt_logprobs[1] is not None


def test_deltas_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OutputDelta().text = "x"  # pyright: ignore[reportAttributeAccessIssue]
