"""Grammars: what is refused and how it is said, and which tokens may come next."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.structured import Constraint, GrammarCompiler, body_of, fill_masks
from jaxserve.structured import compiler as compiler_module
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import StructuredOutputsParams
from tests.fake_engine import EOS_ID, make_tokenizer
from tests.structured.harness import byte_fallback_tokenizer, compiler


def allowed(constraint: Constraint, vocab_size: int) -> set[int]:
    masks = np.zeros((1, -(-vocab_size // 32)), np.int32)
    fill_masks(compiler().executor, [constraint], masks)
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def begin(grammars: GrammarCompiler, **asked: Any) -> Constraint:
    grammar = grammars.check(body_of(StructuredOutputsParams(**asked)))
    return grammars.constraint(grammars.start(grammar))


def test_threads_compute_the_masks_that_one_thread_does():
    from llguidance import LLExecutor

    grammars = compiler()
    answers = [begin(grammars, choice=[letter * 3, "or " + letter]) for letter in "abcdefgh"]
    alone, together = (np.zeros((8, 1 + grammars._vocab_size // 32), np.int32) for _ in range(2))
    fill_masks(None, answers, alone)
    fill_masks(LLExecutor(2), answers, together)
    np.testing.assert_array_equal(alone, together)
    assert len(np.unique(alone, axis=0)) == 8


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({}, "structured_outputs", "nothing"),
        ({"regex": "a", "json_object": True}, "structured_outputs", "regex and json_object"),
        ({"regex": "a(b"}, "structured_outputs.regex", "unclosed group"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex", "look-around"),
        ({"regex": "a" * 20_000}, "structured_outputs.regex", "20000 characters"),
        ({"regex": "a\ud800"}, "structured_outputs.regex", "character 1;"),
        ({"choice": ["a", "\ud800"]}, "structured_outputs.choice.1", "UTF-8"),
        ({"grammar": 'start: "\ud800"'}, "structured_outputs.grammar", "UTF-8"),
        ({"choice": []}, "structured_outputs.choice", "0 entries"),
        ({"choice": ["a", 1]}, "structured_outputs.choice.1", "expected a text"),
        ({"grammar": "start: x"}, "structured_outputs.grammar", "unknown name"),
        ({"json": "{"}, "structured_outputs.json", "no JSON"),
        ({"json": [1]}, "structured_outputs.json", "expected a JSON schema"),
        ({"structural_tag": "{}"}, "structured_outputs.structural_tag", "not supported"),
        (
            {
                "json": {
                    "type": "object",
                    "properties": {
                        "good": {"type": "string"},
                        "list": {"type": "array", "items": {"type": "text"}},
                    },
                }
            },
            "structured_outputs.json.properties.list.items",
            "text",
        ),
        (
            {"json": {"$defs": {"d": {"uniqueItems": True}}, "$ref": "#/$defs/d"}},
            "structured_outputs.json.$defs.d",
            "uniqueItems",
        ),
        ({"json": {"required": 5}}, "structured_outputs.json", "required"),
        ({"json": {"properties": 5}}, "structured_outputs.json", "properties"),
        (
            {"json": {"items": {"properties": {"a": {}}, "required": [["a"]]}}},
            "structured_outputs.json.items",
            "required",
        ),
        (
            {"json": {"format": "date", "pattern": "x", "allOf": 5}},
            "structured_outputs.json",
            "allOf",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(asked: dict, param: str, words: str):
    with pytest.raises(RequestError, match=words) as caught:
        begin(compiler(), **asked)
    assert caught.value.param == param
    assert len(str(caught.value)) < 600


def test_a_deep_schema_is_refused_without_a_crash():
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested"):
        begin(compiler(), json=schema)


def test_a_grammar_that_takes_too_long_is_refused_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
):
    grammars = compiler()
    begin(grammars, regex="a")
    hang = threading.Event()
    compile_now = GrammarCompiler._compile

    def slow(self: GrammarCompiler, grammar: str) -> Any:
        if "slow" in grammar:
            hang.wait(20)
        return compile_now(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    monkeypatch.setattr(compiler_module, "COMPILE_S", 0.2)
    start_s = time.monotonic()
    with pytest.raises(RequestError, match="took longer"):
        begin(grammars, regex="slow")
    assert time.monotonic() - start_s < 15
    begin(grammars, regex="quick")
    hang.set()


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), byte_fallback_tokenizer()])
def test_exactly_the_tokens_that_begin_a_match_are_allowed(tokenizer: Tokenizer):
    grammars = compiler(tokenizer)
    constraint = begin(grammars, choice=["{a", "日x", " the"])
    texts = [text.encode() for text in ("{a", "日x", " the")]
    found = allowed(constraint, tokenizer.vocab_size + 7)
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token_id)
        fits = bool(piece) and any(text.startswith(piece) for text in texts)
        assert (token_id in found) == (fits and token_id not in tokenizer.markup), piece
    assert all(token_id < tokenizer.vocab_size for token_id in found)


def test_the_end_is_allowed_where_the_form_is_complete_and_alone_where_nothing_can_follow():
    tokenizer = make_tokenizer()
    grammars = compiler(tokenizer)
    constraint = begin(grammars, regex="ab?")
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert allowed(constraint, tokenizer.vocab_size + 7) == {a}
    constraint.advance(a)
    assert allowed(constraint, tokenizer.vocab_size + 7) == {b, EOS_ID}
    assert not constraint.is_over
    constraint.advance(b)
    assert constraint.is_over and not constraint.has_failed


def test_a_token_that_does_not_fit_fails_the_constraint():
    constraint = begin(compiler(), regex="[0-9]+")
    constraint.advance(make_tokenizer().encode("x")[0])
    assert constraint.has_failed


def test_a_model_without_a_tokenizer_says_so():
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        GrammarCompiler(Tokenizer(None), 100, [1]).check(
            body_of(StructuredOutputsParams(regex="a"))
        )
