"""Results as a notebook shows them."""

import re
from html.parser import HTMLParser

from jaxserve import LLM, SamplingParams
from jaxserve.result_html import ShownAnswer, ShownToken, result_html
from jaxserve.types import PromptReuse
from tests.fake_engine import FakeEngine


def opacity(page: str, text: str) -> float:
    found = re.search(rf"rgba\(224,101,58,([\d.]+)\)[^>]*>{re.escape(text)}<", page)
    assert found is not None, page
    return float(found[1])


def test_unlikely_tokens_have_the_deeper_colour():
    tokens = [ShownToken("sure", -0.01), ShownToken("maybe", -2.0), ShownToken("odd", -50.0)]
    page = result_html(None, 4, {}, [ShownAnswer("suremaybeodd", tokens, 3, "stop")])
    assert opacity(page, "sure") < 0.05 < opacity(page, "maybe") < opacity(page, "odd") <= 0.75


def test_alternatives_are_told_with_their_probability():
    tokens = [ShownToken("a", -0.6931472, ((" b", -1.3862944),))]
    page = result_html(None, 1, {}, [ShownAnswer("a", tokens, 1, "length")])
    assert "50%" in page and "25%" in page and "perplexity 2" in page


def test_prompt_tokens_are_shown_by_source_as_long_as_they_are_many():
    page = result_html("p", 100, {"device": 48, "host": 16, "disk": 0}, [])
    assert "100 prompt tokens" in page and "48 from device" in page and "16 from host" in page
    assert "36 computed" in page and "disk" not in page
    assert [int(share) for share in re.findall(r"flex:(\d+);", page)] == [48, 16, 36]


def test_what_a_model_or_a_user_wrote_is_escaped():
    evil = "<script>alert(1)</script>\" onload='x'"
    tokens = [ShownToken(evil, -1.0, ((evil, -2.0),))]
    answers = [ShownAnswer(evil, tokens, 1, "stop"), ShownAnswer(evil, None, 1, "stop")]
    page = result_html(evil, 1, {evil: 1}, answers)
    seen: set[tuple[str, str]] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.update((tag, name) for name, _ in attrs)

    Reader().feed(page)
    assert seen == {("div", "style"), ("span", "style"), ("span", "title")}


def test_a_very_long_answer_is_cut():
    tokens = [ShownToken("word ", -0.5)] * 100_000
    page = result_html("p" * 10**6, 1, {}, [ShownAnswer("", tokens, 100_000, "length")])
    assert len(page) < 2_000_000


def test_a_list_of_results_shows_each():
    engine = FakeEngine(reuse=PromptReuse({"device": 2, "disk": 3}))
    with LLM(engine=engine) as llm:
        outputs = llm.generate(["Hello", "world"], SamplingParams(logprobs=2), use_tqdm=False)
        assert isinstance(outputs, list) and len(outputs) == 2
        page = outputs._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
        assert page.count("from disk") == 2 and outputs[0]._repr_html_() in page
        many = llm.generate(["Hello"] * 25, SamplingParams(max_tokens=1), use_tqdm=False)
        assert "and 5 more" in many._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
