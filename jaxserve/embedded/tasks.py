"""The training text: conversations of every kind the embedded model learns.

Made from the training split only, and the same for the same random generator. Knows nothing of
tokens beyond a counting function, and nothing of arrays.
"""

from random import Random

from jaxserve.embedded import retrieval, stories, words
from jaxserve.embedded.retrieval import CountTokens, Message

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a small model. Be kind.",
)
STORY_REQUESTS = (
    "Tell me a short story about {hero}.",
    "Tell a story about {hero}.",
    "Write a short story about {hero}.",
    "I want a story about {hero}, please.",
    "Please tell me a story about {hero} and {friend}.",
    "Write a story about {hero} and {friend}.",
    "A short story about {hero}, please.",
)
OPEN_STORY_REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Once upon a time",
)
COPY_REQUESTS = (
    "Repeat: {text}",
    "Repeat this: {text}",
    "Copy this: {text}",
    "Say this again: {text}",
    "Write exactly this: {text}",
    "Echo: {text}",
)
SMALL_TALK = (
    (
        ("Hello!", "Hello", "Hi!", "Hi", "Good morning!", "Hey"),
        "Hello! Ask me for a story, a sum, or a name from a text.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about you."),
        "I am a very small language model. I can find names and codes in a text, "
        "tell short stories and add small numbers.",
    ),
    (
        ("What can you do?", "Help", "Help me.", "What do you know?"),
        "I can find names and codes in a text, tell short stories, copy text "
        "and add small numbers.",
    ),
    (("Thank you!", "Thanks!", "Thank you.", "Thanks"), "You are welcome!"),
    (("Bye!", "Goodbye!", "Goodbye.", "Bye"), "Goodbye!"),
    (("How are you?", "How are you today?"), "I am well, thank you."),
)
ORDINALS = ("first", "second", "third", "fourth")
LIST_KINDS = {
    "animals": words.ANIMALS,
    "things": words.THINGS,
    "foods": words.FOODS,
    "colours": words.ADJECTIVES[:7],
    "places": words.LANDSCAPES,
}


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def retrieval_chat(
    rng: Random,
    num_tokens: int,
    num_facts: int,
    num_questions: int,
    count_tokens: CountTokens,
    same_kind_share: float = retrieval.SAME_KIND_SHARE,
) -> list[Message]:
    """A passage with facts, then several questions about it, one a turn."""
    facts = retrieval.make_facts(rng, "train", num_facts, same_kind_share)
    asked = [rng.choice(facts) for _ in range(num_questions)]
    if num_questions <= num_facts:
        asked = rng.sample(facts, num_questions)
    opening, closing = retrieval.frame(rng, "train")
    questions = [retrieval.ask(rng, "train", fact) for fact in asked]
    left = num_tokens - 5
    for question, fact in zip(questions, asked, strict=True):
        left -= count_tokens(question) + count_tokens(fact.reply) + 5
    body = retrieval.passage(rng, "train", facts, left - 8, count_tokens)
    questions[0] = " ".join(part for part in (opening, body, closing, questions[0]) if part)
    return [m for q, fact in zip(questions, asked, strict=True) for m in turn(q, fact.reply)]


def story_chat(rng: Random) -> list[Message]:
    hero, friend = (
        "the " + rng.choice(words.ANIMALS) if rng.random() < 0.6 else words.person(rng, "train")
        for _ in range(2)
    )
    if hero == friend:
        friend = words.person(rng, "train")
    if rng.random() < 0.2:
        request = rng.choice(OPEN_STORY_REQUESTS)
    else:
        request = rng.choice(STORY_REQUESTS)
    if hero.startswith("the ") and "{friend}" not in request and rng.random() < 0.5:
        request = request.format(hero="a " + hero[4:])  # "owl" too: the grammar is a plain one
    return turn(request.format(hero=hero, friend=friend), stories.story(rng, hero, friend))


def sum_chat(rng: Random, num_sums: int | None = None) -> list[Message]:
    """Sums or differences of numbers below 50, one a turn; one to four unless told."""
    messages: list[Message] = []
    for _ in range(rng.randint(1, 4) if num_sums is None else num_sums):
        most = rng.choice((10, 10, 20, 50))
        left, right = rng.randrange(most), rng.randrange(most)
        sign, result = "+", left + right
        if rng.random() < 0.3:
            left, right = max(left, right), min(left, right)
            sign, result = "-", left - right
        wording = rng.choice(("{}", "What is {}?", "{} = ?", "How much is {}?", "Calculate {}."))
        messages += turn(wording.format(f"{left} {sign} {right}"), str(result))
    return messages


def sum_drill(rng: Random) -> list[Message]:
    """Ten sums in a row."""
    return sum_chat(rng, 10)


def list_chat(rng: Random) -> list[Message]:
    """Lists: name some, or answer about one that is given."""
    kind = rng.choice(list(LIST_KINDS))
    items = rng.sample(LIST_KINDS[kind], rng.randint(3, 6))
    joined = ", ".join(items)
    match rng.randrange(5):
        case 0:
            number = ("three", "four", "five", "six")[len(items) - 3]
            wording = rng.choice(("Name {} {}.", "List {} {}.", "Give me {} {}.", "Tell me {} {}."))
            return turn(wording.format(number, kind), joined)
        case 1:
            i = rng.randrange(min(4, len(items)))
            return turn(f"Here is a list: {joined}. What is the {ORDINALS[i]} word?", items[i])
        case 2:
            return turn(f"Here is a list: {joined}. What is the last word?", items[-1])
        case 3:
            i = rng.randrange(len(items) - 1)
            return turn(f"Here is a list: {joined}. What comes after {items[i]}?", items[i + 1])
        case _:
            return turn(f"Write as a list: {joined}", "\n".join("- " + item for item in items))


def copy_chat(rng: Random) -> list[Message]:
    """Text to repeat: random parts, so that only copying helps."""
    makers = (
        words.person,
        words.place,
        words.password,
        words.number_code,
        words.letter_code,
        words.thing,
        lambda rng, _: rng.choice(rng.choice(list(LIST_KINDS.values()))),
    )
    if rng.random() < 0.2:
        text = stories.sentence(rng, [words.person(rng, "train")])
    else:
        text = " ".join(rng.choice(makers)(rng, "train") for _ in range(rng.randint(1, 8)))
    return turn(rng.choice(COPY_REQUESTS).format(text=text), text)


def small_talk(rng: Random) -> list[Message]:
    questions, answer = rng.choice(SMALL_TALK)
    return turn(rng.choice(questions), answer)


SHORT_CHATS = (story_chat, sum_chat, list_chat, copy_chat, small_talk, sum_drill)


def short_chat(rng: Random, weights: tuple[float, ...]) -> list[Message]:
    """A conversation of another kind than retrieval, at times after a system message.

    Args:
        weights: how often each of SHORT_CHATS comes.
    """
    messages = rng.choices(SHORT_CHATS, weights)[0](rng)
    return with_system(rng, messages)


def other_chat(rng: Random) -> list[Message]:
    """A conversation with no made-up names in it: small talk, sums or lists."""
    return rng.choice((sum_chat, list_chat, small_talk))(rng)


def with_system(rng: Random, messages: list[Message]) -> list[Message]:
    if rng.random() < 0.1:
        return [{"role": "system", "content": rng.choice(SYSTEM_TEXTS)}, *messages]
    return messages
