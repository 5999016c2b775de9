"""Trains the byte-level BPE tokenizer of the embedded model; its special tokens, chat template.

Knows nothing of models. Digits are tokens of their own; every byte has a token, so that any text
survives a round trip.
"""

from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxserve.embedded import retrieval, stories, tasks, words

BEGIN, END, SYSTEM, USER, ASSISTANT = (
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL_TOKENS = [BEGIN, END, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_texts(num_texts: int, num_part_repeats: int, seed: int) -> Iterator[str]:
    """Text of every kind that the model will see, after the parts that names are made of.

    The parts come often and alone, so that they merge first: every name is then a row of whole
    syllables, the same wherever it stands. The text itself holds no made-up names.
    """
    parts = words.SYLLABLES + words.PLACE_ENDINGS
    for part in parts:
        for text in (part, " " + part, part.capitalize(), " " + part.capitalize()):
            yield from [text] * (num_part_repeats if part in words.SYLLABLES or text == part else 0)
    rng = Random(f"tokenizer/{seed}")
    for _ in range(num_texts):
        yield " " + " ".join(stories.sentence(rng, []) for _ in range(10))
        yield stories.story(rng, "the " + rng.choice(words.ANIMALS), "the owl")
        yield from (message["content"] for message in tasks.other_chat(rng))
        for kind in retrieval.KINDS:
            yield " ".join(
                text.format(key="-", value="-") for text in kind.statements + kind.questions
            )
            for text in kind.statements + kind.questions:
                text = text.format(key="", value="").strip()
                yield text[0].upper() + text[1:] + " " + text
        yield rng.choice(retrieval.OPENINGS) + " " + rng.choice(retrieval.CLOSINGS)
        yield " ".join(words.CODE_LETTERS)


def train_tokenizer(
    vocab_size: int, num_texts: int = 300, num_part_repeats: int = 8000, seed: int = 0
) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(num_texts, num_part_repeats, seed), trainer)
    return tokenizer
