"""The held-out retrieval set: deterministic, of the promised lengths, and apart from training."""

import re
from random import Random

import pytest

from jaxserve.embedded import retrieval, tasks, words
from jaxserve.embedded.retrieval import heldout_prompts, score


def count_words(text: str) -> int:
    """Stands in for a tokenizer: more tokens than words, and additive over sentences."""
    return len(text.split()) + text.count(".")


def heldout(num_prompts: int = 60, **options: int) -> list[retrieval.RetrievalPrompt]:
    return list(heldout_prompts(count_words, num_prompts, **options))


def test_same_seed_gives_same_prompts_and_another_seed_others():
    assert heldout() == heldout()
    assert heldout() != heldout(seed=1)


def test_prompt_lengths_span_the_range_and_stay_in_it():
    lengths = [prompt.num_tokens for prompt in heldout(200)]
    assert 128 <= min(lengths) < 200
    assert 950 < max(lengths) <= 1024


def test_answer_is_stated_in_the_prompt_and_not_in_the_question():
    for prompt in heldout():
        content = prompt.messages[-1]["content"]
        assert prompt.answer in content[:-18]
        assert prompt.answer not in content[-18:]
        assert score(prompt.answer, prompt.reply)


def test_all_kinds_are_asked_for():
    assert {prompt.kind for prompt in heldout(200)} == {kind.name for kind in retrieval.KINDS}


def test_every_entity_belongs_to_one_split_and_most_to_training():
    rng = Random(0)
    for kind in retrieval.KINDS:
        for make in (kind.make_key, kind.make_value):
            trained = {make(rng, "train") for _ in range(100)}
            held = {make(rng, "heldout") for _ in range(100)}
            assert not trained & held
            assert all(words.split_of(entity) == "heldout" for entity in held)


def test_training_conversations_hold_no_entity_of_a_held_out_prompt():
    rng = Random(1)
    trained = "\n".join(
        message["content"]
        for _ in range(60)
        for message in tasks.retrieval_chat(rng, 400, 8, 4, count_words)
    )
    prompts = heldout()
    assert not [p.answer for p in prompts if re.search(rf"\b{p.answer}\b", trained)]


def test_held_out_wording_pairs_are_never_trained():
    for kind in retrieval.KINDS:
        sizes = len(kind.statements), len(kind.questions)
        trained = retrieval.allowed_pairs(kind.name, *sizes, "train")
        held = retrieval.allowed_pairs(kind.name, *sizes, "heldout")
        assert sum(map(len, held)) >= 4
        for first, second in zip(trained, held, strict=True):
            assert sorted(first + second) == list(range(len(kind.questions)))


def test_training_asks_each_fact_in_a_training_wording():
    rng = Random(2)
    for _ in range(200):
        fact = retrieval.make_fact(rng, "train", rng.choice(retrieval.KINDS))
        question = retrieval.ask(rng, "train", fact)
        questions = [fact.question(i) for i in range(len(fact.kind.questions))]
        pair = fact.statement_index, questions.index(question)
        assert retrieval.pair_split(fact.kind.name, *pair) == "train"


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("48213", True),
        (" 48213.\n", True),
        ("The code of Tamiro is 48213.", True),
        ("The code of Tamiro is 48213. No.", False),
        ("The code of Tamiro is 148213.", False),
        ("48213..", False),
        ("4821", False),
        ("12345 48213", False),
        ("", False),
    ],
)
def test_score_wants_one_sentence_that_ends_with_the_answer(reply: str, right: bool):
    assert score("48213", reply) is right
