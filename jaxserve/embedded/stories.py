"""Sentences and short stories from a small grammar: filler for prompts, and replies.

Knows nothing of questions, chat or tokens. A sentence begins with a capital and ends with a stop.
"""

from random import Random

from jaxserve.embedded import words


def sentence(rng: Random, names: list[str]) -> str:
    """One sentence of filler; `names` are the people it may mention (none if empty)."""
    pick = rng.choice
    if names and rng.random() < 0.3:
        return _sentence_about(rng, pick(names))
    adjective, animal, landscape = (
        pick(words.ADJECTIVES),
        pick(words.ANIMALS),
        pick(words.LANDSCAPES),
    )
    match rng.randrange(10):
        case 0:
            return f"The {animal} {pick(words.VERBS)} near the {landscape} {pick(words.TIMES)}."
        case 1:
            weather = f"the {pick(words.WEATHERS)} was {pick(words.ADJECTIVES)}"
            return f"The {landscape} was {adjective} and {weather}."
        case 2:
            return (
                f"A {animal} and a {pick(words.ANIMALS)} {pick(words.VERBS)} {pick(words.ADVERBS)}."
            )
        case 3:
            return f"There was {pick(words.WEATHERS)} over the {landscape} {pick(words.TIMES)}."
        case 4:
            return f"They ate {pick(words.FOODS)} and {pick(words.FOODS)} by the {landscape}."
        case 5:
            return f"Nobody {pick(words.DEEDS)} the {pick(words.THINGS)} near the {landscape}."
        case 6:
            deed = f"{pick(words.DEEDS)} some {pick(words.FOODS)}"
            return f"The {animal} {deed} and {pick(words.VERBS)} {pick(words.ADVERBS)}."
        case 7:
            how = f"{pick(words.VERBS)} {pick(words.ADVERBS)}"
            return f"People at the {landscape} {how} {pick(words.TIMES)}."
        case 8:
            return f"The road to the {landscape} was {adjective} {pick(words.TIMES)}."
        case _:
            return (
                f"It was {adjective}, and the {animal} {pick(words.DEEDS)} a {pick(words.THINGS)}."
            )


def _sentence_about(rng: Random, name: str) -> str:
    pick = rng.choice
    match rng.randrange(4):
        case 0:
            return (
                f"{name} {pick(words.VERBS)} by the {pick(words.LANDSCAPES)} {pick(words.TIMES)}."
            )
        case 1:
            return (
                f"Then {name} {pick(words.DEEDS)} the {pick(words.THINGS)} and {pick(words.VERBS)}."
            )
        case 2:
            return f"{name} ate {pick(words.FOODS)} {pick(words.TIMES)}."
        case _:
            how = f"{pick(words.VERBS)} {pick(words.ADVERBS)}"
            return f"The {pick(words.ANIMALS)} {pick(words.VERBS)} and {name} {how}."


def story(rng: Random, hero: str, friend: str) -> str:
    """A short story: a hero, a loss or a wish, a friend who helps, an end.

    Args:
        hero: the subject as it stands in a sentence, "Tamiro" or "the fox".
        friend: another such subject.
    """
    pick = rng.choice
    adjective, thing, land = pick(words.ADJECTIVES), pick(words.THINGS), pick(words.LANDSCAPES)
    upper_hero, upper_friend = _capital(hero), _capital(friend)
    opening = pick(
        [
            f"Once upon a time {hero} lived near a {land}.",
            f"Long ago {hero} had a {adjective} {thing}.",
            f"One day {hero} {pick(words.VERBS)} to the {land}.",
        ]
    )
    trouble = pick(
        [
            f"{upper_hero} lost the {adjective} {thing} {pick(words.TIMES)}.",
            f"{upper_hero} wanted a {adjective} {thing} but had none.",
            f"The {adjective} {thing} was broken and {hero} was sad.",
        ]
    )
    middle = pick(
        [
            f"{upper_hero} looked by the {land} and met {friend}.",
            f"Then {friend} came and listened.",
            f"{upper_friend} saw {hero} and stopped.",
        ]
    )
    help_ = pick(
        [
            f"{upper_friend} {pick(words.DEEDS)} the {thing} and gave it to {hero}.",
            f"Together they {pick(['found', 'mended', 'painted'])} the {thing}.",
            f'"I can help you," said {friend}.',
        ]
    )
    end = pick(
        [
            f"They ate {pick(words.FOODS)} and were happy.",
            f"{upper_hero} thanked {friend} and they {pick(['walked', 'ran'])} home.",
            f"From that day on {hero} and {friend} were friends.",
        ]
    )
    return " ".join([opening, trouble, middle, help_, end])


def _capital(subject: str) -> str:
    return subject[0].upper() + subject[1:]
