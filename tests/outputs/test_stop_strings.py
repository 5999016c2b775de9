from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.outputs import StopStrings

letters = st.text(alphabet="ab", max_size=30)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def truncate(text: str, stop: list[str], include: bool) -> str:
    """The plain definition: the first stop string to end, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end if include else end - max(map(len, found))]
    return text


@given(text=letters, stop=stops, include=st.booleans(), cuts=st.lists(st.integers(0, 30)))
@settings(max_examples=1000, deadline=None)
def test_streamed_text_equals_truncated_text(
    text: str, stop: list[str], include: bool, cuts: list[int]
):
    checker = StopStrings(stop, include)
    given_out = ""
    expected = truncate(text, stop, include)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in zip(borders, borders[1:], strict=False):
        given_out += checker.feed(text[start:end])
        assert expected.startswith(given_out)
    assert given_out + checker.flush() == expected
    assert (checker.matched is not None) == any(s in text for s in stop)


def test_only_what_may_become_a_stop_string_is_held_back():
    checker = StopStrings(["</end>"])
    assert checker.feed("some text </e") == "some text "
    assert checker.feed("lse") == "</else"
    assert checker.feed(" </end> more") == " "
    assert checker.matched == "</end>"
    assert checker.feed("again") == checker.flush() == ""


def test_without_stop_strings_nothing_is_held_back():
    assert StopStrings([]).feed("abc") == "abc"
