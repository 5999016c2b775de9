"""Answers of the embedded model that must have a form, through the whole engine."""

import json
import random
import re
import threading
from collections.abc import Iterator

import jax
import jsonschema
import pytest

from jaxserve import LLM, RequestError, SamplingParams, StructuredOutputsParams
from jaxserve.structured import compiler
from tests.structured.generate import random_regex, random_schema
from tests.structured.harness import small_llm
from tests.structured.proof import prove

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["old", "wise"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHAT = "<|begin|><|user|>Tell me a story.<|end|><|assistant|>"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with small_llm() as llm:
        yield llm


def ask(llm: LLM, count: int = 1, **given) -> list:
    params = {"max_tokens": 200, "temperature": 1.0, **given}
    sampling = [SamplingParams(**{"seed": i, **params}) for i in range(count)]
    outputs = llm.generate([CHAT] * count, sampling, use_tqdm=False)
    return [answer for output in outputs for answer in output.outputs]


def test_every_form_is_kept(llm: LLM):
    forms = [
        StructuredOutputsParams(json=PERSON),
        StructuredOutputsParams(regex="[a-c]{3}-[0-9]{4}"),
        StructuredOutputsParams(choice=["yes", "no, thanks"]),
        StructuredOutputsParams(grammar='root ::= "x"+ "y"'),
        StructuredOutputsParams(json=PERSON, disable_any_whitespace=True),
    ]
    person, code, choice, xy, dense = (ask(llm, structured_outputs=form)[0] for form in forms)
    jsonschema.validate(json.loads(person.text), PERSON)
    assert re.fullmatch("[a-c]{3}-[0-9]{4}", code.text)
    assert choice.text in ("yes", "no, thanks")
    assert re.fullmatch("x+y", xy.text)
    assert "\n" not in dense.text and json.loads(dense.text)
    assert {answer.finish_reason for answer in (person, code, choice, xy, dense)} == {"stop"}


def test_random_schemas_and_regexes_are_kept(llm: LLM):
    """The full count is `make prove-structured`."""
    rng = random.Random(7)
    outcome = prove(
        llm, [random_schema(rng) for _ in range(24)], [random_regex(rng) for _ in range(16)], seed=7
    )
    assert outcome.invalid == () and outcome.valid >= 36


def test_other_options_hold_within_the_form(llm: LLM):
    """min_tokens cannot lengthen it, bias and allowed tokens choose within it, and logprobs are
    those of the model."""
    digits = StructuredOutputsParams(regex="[0-9]{6}")
    nine = llm.tokenizer.encode("9")[0]
    (biased,) = ask(llm, structured_outputs=digits, logit_bias={nine: 100.0}, logprobs=2)
    assert biased.text == "999999" and len(biased.logprobs) == len(biased.token_ids)
    letters = llm.tokenizer.encode("a")
    (impossible,) = ask(llm, structured_outputs=digits, allowed_token_ids=tuple(letters))
    assert re.fullmatch("[0-9]{6}", impossible.text)
    (short,) = ask(llm, structured_outputs=digits, min_tokens=50)
    assert re.fullmatch("[0-9]{6}", short.text) and short.finish_reason == "stop"
    (endless,) = ask(llm, structured_outputs=digits, ignore_eos=True)
    assert re.fullmatch("[0-9]{6}", endless.text) and endless.finish_reason == "stop"
    answers = ask(llm, structured_outputs=digits, n=3)
    assert len({answer.text for answer in answers}) > 1
    assert all(re.fullmatch("[0-9]{6}", answer.text) for answer in answers)


def test_a_limit_cuts_the_form_and_says_so(llm: LLM):
    (cut,) = ask(llm, structured_outputs=StructuredOutputsParams(json=PERSON), max_tokens=4)
    assert cut.finish_reason == "length"


def test_a_form_that_becomes_too_expensive_to_follow_is_no_normal_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiler, "LIMITS", {**compiler.LIMITS, "max_lexer_states": 40})
    (cut,) = ask(llm, structured_outputs=StructuredOutputsParams(regex="[a-z]{30,40}x[a-z]{10}"))
    assert len(cut.text) < 30 and cut.finish_reason == "abort"


def test_free_answers_beside_constrained_ones_are_what_they_are_alone(llm: LLM):
    """Greedy and seeded, with and without constrained rows in the same steps."""
    free = [SamplingParams(max_tokens=24, temperature=t, seed=5) for t in (0.0, 0.8, 0.0)]
    prompts = [CHAT, CHAT + " Once", CHAT + " The fox"]
    alone = [
        llm.generate(prompt, sampling, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, sampling in zip(prompts, free, strict=True)
    ]
    form = StructuredOutputsParams(regex="[0-9 ]{40}")
    constrained = SamplingParams(max_tokens=60, structured_outputs=form, seed=1)
    outputs = llm.generate([*prompts, *[CHAT] * 4], [*free, *[constrained] * 4], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs[:3]] == alone
    for output in outputs[3:]:
        assert re.fullmatch("[0-9 ]{40}", output.outputs[0].text)


def test_a_constrained_answer_is_the_same_alone_in_a_batch_and_after_preemption():
    form = StructuredOutputsParams(regex="([a-z]{2,9} ){60}")
    sampling = SamplingParams(max_tokens=130, structured_outputs=form, seed=3)
    with small_llm(num_pages=12, max_model_len=160, dtype="float32") as tight:
        alone = tight.generate(CHAT, sampling, use_tqdm=False)[0].outputs[0]
        outputs = tight.generate([CHAT] * 8, sampling, use_tqdm=False)
        stats = tight.engine.stats()  # pyright: ignore[reportAttributeAccessIssue]
        tight.engine.check_integrity()  # pyright: ignore[reportAttributeAccessIssue]
    assert stats.num_preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == [alone.token_ids] * 8
    assert re.fullmatch("([a-z]{2,9} ){60}", alone.text)


def test_a_tensor_parallel_engine_keeps_the_form():
    with small_llm(tensor_parallel_size=2, max_num_seqs=1) as parallel:
        (answer,) = ask(parallel, structured_outputs=StructuredOutputsParams(json=PERSON))
    jsonschema.validate(json.loads(answer.text), PERSON)


def test_serving_constrained_answers_compiles_nothing(llm: LLM):
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        ask(llm, 12, structured_outputs=StructuredOutputsParams(json=PERSON), logprobs=1)
        ask(llm, 3, structured_outputs=StructuredOutputsParams(choice=["a", "b"]))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


def test_a_form_that_cannot_be_enforced_is_refused_before_anything_is_computed(llm: LLM):
    with pytest.raises(RequestError, match="uniqueItems"):
        ask(llm, structured_outputs=StructuredOutputsParams(json={"uniqueItems": True}))
    stats = llm.engine.stats()  # pyright: ignore[reportAttributeAccessIssue]
    assert stats.num_running == stats.num_waiting == 0


def test_the_token_table_is_built_before_anybody_asks(monkeypatch: pytest.MonkeyPatch):
    is_built, build = threading.Event(), compiler.build_vocabulary

    def build_noted(*given):
        vocabulary = build(*given)
        is_built.set()
        return vocabulary

    monkeypatch.setattr(compiler, "build_vocabulary", build_noted)
    with small_llm(max_num_seqs=1) as fresh:
        assert is_built.wait(30)
        (answer,) = ask(fresh, structured_outputs=StructuredOutputsParams(choice=["yes"]))
    assert answer.text == "yes"
