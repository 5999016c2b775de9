"""Training text and tokenizer: right replies, deterministic batches, every byte survives."""

from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxserve.embedded import tasks, words
from jaxserve.embedded.corpus import Encoder, Phase, phase_of
from jaxserve.embedded.tokenizer_training import END, SPECIAL_TOKENS, train_tokenizer

PHASE = Phase(3, 2, 256, 0.3, (1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 6, 6, 0.05, 0.4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(1024, num_texts=10, num_part_repeats=3000)


def test_sums_are_right():
    rng = Random(0)
    for _ in range(50):
        messages = tasks.sum_chat(rng)
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            left, sign, right = question["content"].strip("=?. ").split()[-3:]
            result = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert answer["content"] == str(result)


def test_copies_are_exact():
    rng = Random(0)
    for _ in range(50):
        question, answer = tasks.copy_chat(rng)
        assert question["content"].endswith(answer["content"])


def test_list_answers_come_from_the_list():
    rng = Random(0)
    for _ in range(50):
        question, answer = tasks.list_chat(rng)
        if "Here is a list" in question["content"]:
            assert answer["content"] in question["content"]


def test_story_is_about_its_hero():
    rng = Random(0)
    for _ in range(50):
        question, answer = tasks.story_chat(rng)
        if "about the " in question["content"]:
            hero = question["content"].split("about ")[1].split()[1].strip(".,")
            assert hero in answer["content"]
        assert answer["content"].endswith(".")


def test_tokenizer_keeps_any_text(tokenizer: Tokenizer):
    rng = Random(0)
    texts = ["", " ", "\n\n\t x  ", "naïve 東京 🦊\u200d", "<|end|", "a\x00b\x7f"]
    texts += ["".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(40)) for _ in range(20)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_names_are_rows_of_whole_syllables(tokenizer: Tokenizer):
    rng = Random(0)
    names = [words.person(rng, "train") for _ in range(100)]
    for lead in ("", " "):
        for texts in (names, [name.lower() for name in names]):
            lengths = [len(tokenizer.encode(lead + text).ids) for text in texts]
            whole = [n == len(text) // 2 for n, text in zip(lengths, texts, strict=True)]
            assert sum(whole) >= 95  # a few are common words, such as Note


def test_special_tokens_are_single_tokens(tokenizer: Tokenizer):
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token).ids == [tokenizer.token_to_id(token)]


def test_batch_depends_on_seed_and_step_alone(tokenizer: Tokenizer):
    first = Encoder(tokenizer).batch(0, 5, PHASE)
    again = Encoder(tokenizer).batch(0, 5, PHASE)
    other = Encoder(tokenizer).batch(0, 6, PHASE)
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.weights.shape == (2, 257)


def test_weights_mark_the_reply_and_its_end(tokenizer: Tokenizer):
    tokens, weights = Encoder(tokenizer).chat(tasks.turn("What is 2 + 2?", "4"))
    assert [tokens[i] for i, w in enumerate(weights) if w == 1.0] == [
        tokenizer.token_to_id("4"),
        tokenizer.token_to_id(END),
    ]


def test_phases_follow_each_other_and_the_last_stays():
    later = Phase(2, 1, 64, 0.3, (1.0,), 6, 6, 0.05, 0.4)
    assert [phase_of((PHASE, later), step) for step in (0, 2, 3, 4, 99)] == [
        PHASE,
        PHASE,
        later,
        later,
        later,
    ]
