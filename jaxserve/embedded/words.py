"""The vocabulary of the embedded model's text: common words, and names and codes made from parts.

Names, places, passwords, codes and two-word things are *entities*. Each belongs to exactly one
split, by a hash of its text, so that what held-out prompts ask for is never seen in training.
Knows nothing of prompts, tokens or arrays. Invariant: `split_of` depends on the text alone.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_PARTS = 8  # one entity in eight is held out

ONSETS = "b d f g k l m n r s t v".split()
VOWELS = "a e i o u".split()
SYLLABLES = [onset + vowel for onset in ONSETS for vowel in VOWELS]
PLACE_ENDINGS = ["dale", "ton", "berg", "ford"]
CODE_LETTERS = "ABCDEFGHKLMNPRSTVXZ"

ADJECTIVES = (
    "red blue green yellow black white silver golden small large old new round heavy quiet bright "
    "cold warm wooden broken"
).split()
THINGS = (
    "lamp box door key boat clock chair book bag cup ring coat hat drum kite bell basket mirror "
    "ladder bottle table wagon blanket candle"
).split()
ANIMALS = "fox bear cat dog owl hare horse goat crow mouse duck frog sheep wolf deer".split()
LANDSCAPES = (
    "river forest hill garden village market bridge lake field road mill harbour tower meadow "
    "valley barn"
).split()
FOODS = "bread soup apples cheese honey nuts cake tea rice plums beans eggs".split()
VERBS = (
    "walked looked ran waited slept danced listened returned stopped laughed worked sang".split()
)
DEEDS = "found carried painted cleaned wanted hid lost bought sold mended lifted saw".split()
ADVERBS = "slowly quickly happily often again together early late alone softly".split()
TIMES = [
    "in the morning",
    "in the evening",
    "at night",
    "after the rain",
    "before the winter",
    "last summer",
    "every day",
    "for a while",
]
WEATHERS = "rain snow wind sun fog frost".split()


def split_of(entity: str) -> Split:
    """The split an entity belongs to, by a hash of its text."""
    digest = hashlib.blake2b(entity.lower().encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "little") % HELDOUT_PARTS == 0 else "train"


def draw(split: Split, make: Callable[[], str]) -> str:
    """Call `make` until it gives an entity of this split."""
    while True:
        entity = make()
        if split_of(entity) == split:
            return entity


def syllables(rng: Random, num_syllables: int) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(num_syllables))


def person(rng: Random, split: Split) -> str:
    """A given name such as Tamiro: two or three syllables."""
    return draw(split, lambda: syllables(rng, rng.choice((2, 3, 3))).capitalize())


def place(rng: Random, split: Split) -> str:
    """A town such as Velodale: two syllables and an ending."""
    return draw(split, lambda: syllables(rng, 2).capitalize() + rng.choice(PLACE_ENDINGS))


def password(rng: Random, split: Split) -> str:
    """A made-up word in lower case: three syllables."""
    return draw(split, lambda: syllables(rng, 3))


def number_code(rng: Random, split: Split) -> str:
    """Four to six digits."""
    return draw(split, lambda: "".join(rng.choices("0123456789", k=rng.choice((4, 5, 6)))))


def letter_code(rng: Random, split: Split) -> str:
    """Two letters, a hyphen and three digits."""
    return draw(
        split,
        lambda: (
            "".join(rng.choices(CODE_LETTERS, k=2)) + "-" + "".join(rng.choices("0123456789", k=3))
        ),
    )


def thing(rng: Random, split: Split) -> str:
    """A two-word thing such as "silver drum"; the pair is the entity, its words are not."""
    return draw(split, lambda: rng.choice(ADJECTIVES) + " " + rng.choice(THINGS))
