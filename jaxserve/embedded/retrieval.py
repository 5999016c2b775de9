"""Retrieval prompts: facts hidden in filler, asked for at the end, and how a reply is scored.

Pure Python and deterministic by seed: no arrays, no model. A prompt of the held-out split uses
people, places, passwords, codes and things that no training text holds, and pairs of wordings (how
a fact is stated with how it is asked for, how a prompt opens with how it closes) that no training
prompt puts together.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from jaxserve.embedded import stories, words
from jaxserve.embedded.words import Split

CountTokens = Callable[[str], int]
Message = dict[str, str]

SAME_KIND_SHARE = 0.4  # of the facts of a prompt, beside those that are so by chance
HELDOUT_PAIR_PARTS = 5  # one pair of wordings in five is held out


@dataclass(frozen=True)
class FactKind:
    """One relation: what is asked about (key), what is answered (value), and its wordings.

    A statement may begin and end in many ways, but "key is value" stands in the middle: what the
    model has to find is the right key.
    """

    name: str
    make_key: Callable[[Random, Split], str]
    make_value: Callable[[Random, Split], str]
    reply: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A relation between two entities, and the sentence that states it."""

    kind: FactKind
    key: str
    value: str
    statement_index: int

    @property
    def text(self) -> str:
        text = self.kind.statements[self.statement_index].format(key=self.key, value=self.value)
        return text[0].upper() + text[1:]

    @property
    def reply(self) -> str:
        return self.kind.reply.format(key=self.key, value=self.value)

    def question(self, question_index: int) -> str:
        text = self.kind.questions[question_index].format(key=self.key)
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class RetrievalPrompt:
    """A chat that ends with a question, the one right answer, and how the model should say it."""

    messages: list[Message]
    answer: str
    reply: str
    num_tokens: int
    kind: str


KINDS = (
    FactKind(
        "code of a person",
        words.person,
        words.number_code,
        "The code of {key} is {value}.",
        (
            "the code of {key} is {value}.",
            "the secret code of {key} is {value}.",
            "remember that the code of {key} is {value}.",
            "today the code for {key} is {value}.",
            "they say the code given to {key} is {value}.",
            "for the door the code of {key} is {value}, as we know.",
            "as of now the code of {key} is {value}, not another one.",
        ),
        (
            "what is the code of {key}?",
            "which code does {key} have?",
            "tell me the code of {key}.",
            "{key} needs the code. What is it?",
            "what code was given to {key}?",
            "please give the code of {key}.",
            "I forgot the code of {key}. What was it?",
        ),
    ),
    FactKind(
        "code of a thing",
        words.thing,
        words.letter_code,
        "The label of the {key} is {value}.",
        (
            "the label of the {key} is {value}.",
            "the label on the {key} is {value}.",
            "note that the label of the {key} is {value}.",
            "somebody wrote that the label on the {key} is {value}.",
            "we read that the label of the {key} is {value}.",
            "on paper the label of the {key} is {value}, as we know.",
        ),
        (
            "what is the label of the {key}?",
            "which label does the {key} have?",
            "tell me the label on the {key}.",
            "what label is on the {key}?",
            "please give the label of the {key}.",
            "I look at the {key}. What is its label?",
        ),
    ),
    FactKind(
        "home of a person",
        words.person,
        words.place,
        "The town of {key} is {value}.",
        (
            "the town of {key} is {value}.",
            "the home town of {key} is {value}.",
            "note that the town of {key} is {value}.",
            "they say the town chosen by {key} is {value}.",
            "since last year the town of {key} is {value}.",
            "on the map the town of {key} is {value}, as we know.",
        ),
        (
            "where does {key} live?",
            "in which town does {key} live?",
            "what is the town of {key}?",
            "tell me where {key} lives.",
            "which town is the home of {key}?",
            "I want to visit {key}. Which town is it?",
        ),
    ),
    FactKind(
        "owner of a thing",
        words.thing,
        words.person,
        "The owner of the {key} is {value}.",
        (
            "the owner of the {key} is {value}.",
            "the new owner of the {key} is {value}.",
            "note that the owner of the {key} is {value}.",
            "everyone knows that the owner of the {key} is {value}.",
            "since last year the owner of the {key} is {value}.",
            "in the book the owner of the {key} is {value}, as we know.",
        ),
        (
            "who owns the {key}?",
            "who is the owner of the {key}?",
            "to whom does the {key} belong?",
            "tell me who owns the {key}.",
            "I found the {key}. Who is the owner?",
            "name the owner of the {key}.",
        ),
    ),
    FactKind(
        "password of a place",
        words.place,
        words.password,
        "The password of {key} is {value}.",
        (
            "the password of {key} is {value}.",
            "the secret password for {key} is {value}.",
            "note that the password of {key} is {value}.",
            "the guards say that the password of {key} is {value}.",
            "today the password for {key} is {value}.",
            "at the gate the password of {key} is {value}, as we know.",
        ),
        (
            "what is the password of {key}?",
            "which password does {key} have?",
            "tell me the password for {key}.",
            "I want to enter {key}. What is the password?",
            "what password do the guards of {key} know?",
            "please give the password of {key}.",
        ),
    ),
    FactKind(
        "friend of a person",
        words.person,
        words.person,
        "The best friend of {key} is {value}.",
        (
            "the best friend of {key} is {value}.",
            "the oldest and best friend of {key} is {value}.",
            "note that the best friend of {key} is {value}.",
            "everyone knows that the best friend of {key} is {value}.",
            "we heard that the best friend of {key} is {value}.",
            "in the village the best friend of {key} is {value}, as we know.",
        ),
        (
            "who is the best friend of {key}?",
            "what is the name of the best friend of {key}?",
            "tell me the best friend of {key}.",
            "name the best friend of {key}.",
            "whom did {key} choose as a best friend?",
            "{key} has a best friend. Who is it?",
        ),
    ),
)

OPENINGS = (
    "",
    "Read this text.",
    "Here is a text.",
    "Read carefully and answer at the end.",
    "I will ask you something about this.",
    "Notes of the day:",
)
CLOSINGS = (
    "",
    "Now answer.",
    "Question:",
    "Answer from the text.",
    "Here is my question.",
    "Use only the text above.",
)


def pair_split(family: str, first: int, second: int) -> Split:
    """The split that a pair of wordings belongs to, by a hash of its indices."""
    digest = hashlib.blake2b(f"{family}/{first}/{second}".encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "little") % HELDOUT_PAIR_PARTS == 0 else "train"


def allowed_pairs(family: str, num_first: int, num_second: int, split: Split) -> list[list[int]]:
    """For each first wording the second wordings that this split may put beside it."""
    return [
        [j for j in range(num_second) if pair_split(family, i, j) == split]
        for i in range(num_first)
    ]


def make_fact(rng: Random, split: Split, kind: FactKind) -> Fact:
    """A fact whose statement has at least one question of this split."""
    allowed = allowed_pairs(kind.name, len(kind.statements), len(kind.questions), split)
    statement_index = rng.choice([i for i, questions in enumerate(allowed) if questions])
    return Fact(kind, kind.make_key(rng, split), kind.make_value(rng, split), statement_index)


def make_facts(
    rng: Random,
    split: Split,
    num_facts: int,
    same_kind_share: float = SAME_KIND_SHARE,
) -> list[Fact]:
    """Facts with one answer each: no two ask the same kind about the same key.

    Many share their kind with the first or reuse the key of another, so that neither the kind nor
    the key alone finds the answer.
    """
    facts: list[Fact] = []
    while len(facts) < num_facts:
        kind = facts[0].kind if facts and rng.random() < same_kind_share else rng.choice(KINDS)
        fact = make_fact(rng, split, kind)
        reusable = [other for other in facts if other.kind.make_key is kind.make_key]
        if reusable and rng.random() < 0.35:
            fact = Fact(kind, rng.choice(reusable).key, fact.value, fact.statement_index)
        if any(o.kind is fact.kind and o.key == fact.key for o in facts):
            continue
        entities = {name for o in facts for name in (o.key, o.value)}
        if fact.value in entities or fact.value == fact.key:
            continue
        facts.append(fact)
    return facts


def ask(rng: Random, split: Split, fact: Fact) -> str:
    """A question about a fact, in a wording that this split puts beside the fact's statement."""
    kind = fact.kind
    allowed = allowed_pairs(kind.name, len(kind.statements), len(kind.questions), split)
    return fact.question(rng.choice(allowed[fact.statement_index]))


def frame(rng: Random, split: Split) -> tuple[str, str]:
    """How a prompt opens and how its question is introduced."""
    allowed = allowed_pairs("frame", len(OPENINGS), len(CLOSINGS), split)
    opening_index = rng.choice([i for i, closings in enumerate(allowed) if closings])
    return OPENINGS[opening_index], CLOSINGS[rng.choice(allowed[opening_index])]


def passage(
    rng: Random, split: Split, facts: list[Fact], num_tokens: int, count_tokens: CountTokens
) -> str:
    """The facts, in random order and places, among filler that is about people of theirs too.

    Holds `num_tokens` tokens at most, if the facts alone do not hold more.
    """
    names = [words.person(rng, split) for _ in range(3)]
    people = [fact.key for fact in facts if fact.kind.make_key is words.person]
    people += [fact.value for fact in facts if fact.kind.make_value is words.person]
    names += rng.sample(people, min(4, len(people)))
    sentences = [fact.text for fact in facts]
    left = num_tokens - sum(count_tokens(" " + text) for text in sentences)
    while left > 0:
        text = stories.sentence(rng, names)
        left -= count_tokens(" " + text)
        if left >= 0:
            sentences.append(text)
    rng.shuffle(sentences)
    return " ".join(sentences)


def make_prompt(
    rng: Random, split: Split, num_tokens: int, count_tokens: CountTokens
) -> RetrievalPrompt:
    """One prompt of at most `num_tokens` tokens (and seldom 24 fewer), template included.

    Args:
        num_tokens: the wished length of the rendered chat, 96 or more.
        count_tokens: number of tokens of a text; the prompt is as long as this says.
    """
    most_facts = max(2, min(12, num_tokens // 48))
    facts = make_facts(rng, split, rng.randint(2, most_facts))
    asked = rng.choice(facts)
    opening, closing = frame(rng, split)
    question = " ".join(part for part in (closing, ask(rng, split, asked)) if part)
    overhead = count_tokens(opening) + count_tokens(" " + question) + 5
    while True:
        body = passage(rng, split, facts, num_tokens - overhead, count_tokens)
        content = " ".join(part for part in (opening, body, question) if part)
        total = count_tokens(content) + 4  # begin, user, end, assistant
        if total <= num_tokens:
            break
        if len(facts) > 2:
            facts.remove(rng.choice([fact for fact in facts if fact is not asked]))
    return RetrievalPrompt(
        [{"role": "user", "content": content}], asked.value, asked.reply, total, asked.kind.name
    )


def heldout_prompts(
    count_tokens: CountTokens,
    num_prompts: int = 1000,
    min_tokens: int = 128,
    max_tokens: int = 1024,
    seed: int = 0,
) -> Iterator[RetrievalPrompt]:
    """The held-out set: lengths spread evenly, and the same prompts for the same seed.

    Args:
        count_tokens: number of tokens of a text, special tokens of a template not included.
    """
    rng = Random(f"heldout/{seed}")
    for i in range(num_prompts):
        spread = (i + rng.random()) / num_prompts
        wished = min_tokens + 24 + round(spread * (max_tokens - min_tokens - 24))
        yield make_prompt(rng, "heldout", wished, count_tokens)


def score(answer: str, reply: str) -> bool:
    """Whether the reply is one sentence, or no sentence at all, that ends with the answer."""
    sentence = reply.strip().removesuffix(".")
    return sentence == answer or (sentence.endswith(f" is {answer}") and "." not in sentence)
