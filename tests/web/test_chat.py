"""A chat in a real browser: from typing to the streamed answer, and whatever comes in between."""

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from jaxserve.config import Config, SchedulerConfig, ServerConfig
from tests.web.conftest import WebServer, wait_for, watched

Open = Callable[..., Page]
Serve = Callable[..., WebServer]

STORY = "Once upon a time there was an owl. " * 12
HOSTILE = """Hello <script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> <svg onload="window.hacked = 3"></svg>

![pixel](https://evil.example/pixel.png) [click](javascript:window.hacked=4)
[also](data:text/html,<script>window.hacked=5</script>) [fine](https://fine.example/)

<iframe src="https://evil.example"></iframe> <a href="javascript:window.hacked=6">a</a>
<style>body { display: none }</style> <form action="https://evil.example"><input></form>

```html"><script>window.hacked = 7</script>
<script>window.hacked = 8</script>
```

| a | <b onmouseover="window.hacked = 9">b</b> |
|---|---|
| `<i onclick="window.hacked = 10">` | <math><style><img src=x onerror=window.hacked=11> |
"""


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page: Page, status: str = "done") -> None:
    """Wait until the newest answer is as it should be."""
    expect(page.locator(".answer").last).to_have_attribute("data-status", status)


def test_an_answer_is_seen_while_it_comes_and_says_how_it_came(open_page: Open, serve: Serve):
    server = serve(watched(STORY, step_s=0.01))
    page = open_page(server.url)
    say(page, "Tell me of the owl")
    expect(page.locator(".user .said")).to_have_text("Tell me of the owl")
    answer(page, "streaming")
    expect(page.locator(".answer .markdown")).to_contain_text("Once upon")
    early = page.locator(".answer .markdown").inner_text()
    answer(page)
    whole = page.locator(".answer .markdown").inner_text()
    assert len(early) < len(whole) and whole.strip() == STORY.strip()
    facts = page.locator(".answer .facts").inner_text()
    assert re.search(r"first token\s+[\d.]+ m?s", facts) and "tokens/s" in facts
    assert re.search(r"\d+ prompt tokens: \d+ from device, \d+ from host, .* computed", facts)
    colours = page.locator(".answer .bar span").evaluate_all("all => all.map(one => one.className)")
    assert colours == ["src-device", "src-host", "src-store0", "src-computed"]


def test_stopping_keeps_what_came_and_frees_the_engine(open_page: Open, serve: Serve):
    server = serve(watched(STORY * 20, step_s=0.01))
    page = open_page(server.url)
    say(page, "Go on for ever")
    expect(page.locator(".answer .markdown")).to_contain_text("Once")
    page.get_by_role("button", name="Stop").click()
    answer(page, "stopped")
    wait_for(lambda: not server.engine.has_work)
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.locator(".answer .markdown")).to_contain_text("Once")
    say(page, "And now?")  # the conversation goes on
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_have_count(2)
    answer(page, "stopped")


def test_regenerating_and_editing_replace_what_followed(open_page: Open, serve: Serve):
    server = serve(watched("Short."))
    page = open_page(server.url)
    say(page, "first question")
    answer(page)
    server.engine.reply = lambda request: server.engine.tokenizer.encode("Another.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer .markdown")).to_have_text("Another.")
    say(page, "second question")
    expect(page.locator(".answer")).to_have_count(2)
    answer(page)
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("a better question")
    page.keyboard.press("Enter")
    expect(page.locator(".user .said")).to_have_text(["a better question"])
    expect(page.locator(".answer")).to_have_count(1)
    answer(page)


def test_conversations_outlive_a_reload_and_can_be_deleted(open_page: Open, serve: Serve):
    server = serve(watched("An answer."))
    page = open_page(server.url)
    say(page, "the first conversation")
    answer(page)
    page.get_by_role("button", name="New chat").click()
    say(page, "the second conversation")
    answer(page)
    page.reload()
    expect(page.locator(".said")).to_have_text("the second conversation")
    expect(page.locator(".answer .markdown")).to_have_text("An answer.")
    expect(page.locator(".answer .facts")).to_contain_text("first token")
    page.get_by_role("button", name="the first conversation", exact=True).click()
    expect(page.locator(".said")).to_have_text("the first conversation")
    page.get_by_role("button", name="Delete “the first conversation”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator(".sidebar .open")).to_have_text(["the second conversation"])
    page.reload()
    expect(page.locator(".sidebar .open")).to_have_text(["the second conversation"])


def test_leaving_in_the_middle_keeps_what_came(open_page: Open, serve: Serve):
    server = serve(watched(STORY * 20, step_s=0.01))
    page = open_page(server.url)
    say(page, "Go on for ever")
    expect(page.locator(".answer .markdown")).to_contain_text("an owl")
    page.reload()
    answer(page, "stopped")
    expect(page.locator(".answer .markdown")).to_contain_text("an owl")
    wait_for(lambda: not server.engine.has_work)


def test_hostile_output_does_nothing(open_page: Open, serve: Serve):
    server = serve(watched(HOSTILE))
    page = open_page(server.url)
    say(page, "Attack me")
    answer(page)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    shown = page.locator(".answer .markdown")
    expect(shown).to_contain_text("<script>window.hacked = 1</script>")  # as text
    expect(shown).to_be_visible()
    made = shown.locator(".block *").evaluate_all("all => all.map(node => node.tagName)")
    assert set(made) <= {"P", "BR", "A", "CODE", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"}
    links = shown.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")
    good = ["https://fine.example/", "noopener noreferrer nofollow", "_blank"]
    assert good in links and all(not href or href.startswith("https:") for href, *_ in links)
    # `open_page` checks that nobody else was asked for anything.


def test_scripts_in_the_page_are_forbidden_even_if_markup_came_through(
    open_page: Open, serve: Serve
):
    page = open_page(serve(watched("x")).url, allowed="TrustedHTML")
    refused = page.evaluate(
        """() => {
          try { document.body.innerHTML += "<img src=x onerror='window.hacked = 1'>"; }
          catch (error) { return error.name; }
        }"""
    )
    assert refused == "TypeError"  # trusted types: only DOMPurify may make markup


def test_code_is_copied_as_it_is(open_page: Open, serve: Serve):
    code = 'if a < b && c:\n    print("<&>")'
    server = serve(watched(f"Look:\n\n```python\n{code}\n```\n"))
    page = open_page(server.url, permissions=["clipboard-read", "clipboard-write"])
    say(page, "Code, please")
    answer(page)
    expect(page.locator("figure.code figcaption")).to_contain_text("python")
    page.locator("figure.code").get_by_role("button", name="Copy").click()
    expect(page.locator("figure.code")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_thoughts_are_folded(open_page: Open, serve: Serve):
    server = serve(watched("<think>Let me see. An owl?</think>An owl."))
    page = open_page(server.url)
    say(page, "Who?")
    answer(page)
    expect(page.locator(".answer .markdown")).to_have_text("An owl.")
    expect(page.locator(".thought")).to_be_hidden()
    page.get_by_text("Reasoning").click()
    expect(page.locator(".thought")).to_have_text("Let me see. An owl?")


def test_settings_are_sent_kept_and_told(open_page: Open, serve: Serve):
    server = serve(watched("Fine."))
    page = open_page(server.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Longest answer").fill("7")
    page.get_by_label("Top-p").fill("3")  # out of its bounds: not taken
    page.get_by_role("button", name="Done").click()
    page.reload()
    expect(page.get_by_role("button", name="Settings")).to_contain_text("system prompt, temp")
    say(page, "Hello")
    answer(page)
    request = server.engine.added[-1]
    assert request.sampling.temperature == 0.5 and request.sampling.max_tokens == 7
    assert request.sampling.top_p == 1.0
    assert "Be brief." in server.engine.tokenizer.decode(list(request.prompt_ids))


def test_a_server_with_a_key_asks_for_it_once(open_page: Open, serve: Serve):
    config = Config(server=ServerConfig(api_key="open sesame"))
    server = serve(watched("Come in.", config=config))
    page = open_page(server.url)
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not know the key")
    page.get_by_label("Key", exact=True).fill("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("p.model")).to_have_text("Model: fake")
    say(page, "May I?")
    answer(page)
    page.reload()
    expect(page.locator("p.model")).to_have_text("Model: fake")


def test_a_full_server_says_so_and_can_be_asked_again(open_page: Open, serve: Serve):
    config = Config(scheduler=SchedulerConfig(max_num_seqs=1, max_num_waiting=0))
    server = serve(watched("Here I am.", config=config))
    page = open_page(server.url)
    busy = server.engine.reply
    server.engine.reply = lambda request: [40] * 100_000
    page.evaluate(
        """() => void fetch("/v1/completions", {method: "POST",
          headers: {"Content-Type": "application/json"},
          body: JSON.stringify({prompt: "x", max_tokens: 4000})})"""
    )
    wait_for(lambda: server.engine.has_work)
    say(page, "Is there room?")
    answer(page, "failed")
    expect(page.locator(".failure")).to_contain_text("all the requests it can take")
    server.engine.reply = busy
    page.reload()  # ends the other request
    wait_for(lambda: not server.engine.has_work)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .markdown")).to_have_text("Here I am.")
    expect(page.locator(".said")).to_have_text(["Is there room?"])


def test_a_server_that_goes_away_is_noticed_and_found_again(open_page: Open, serve: Serve):
    server = serve(watched(STORY))
    page = open_page(server.url)
    expect(page.locator(".pulse")).to_have_text("idle")
    server.stop()
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    say(page, "Anybody there?")
    answer(page, "failed")
    expect(page.locator(".failure")).to_contain_text("Is it still running?")
    serve(watched(STORY), server.port)
    page.get_by_role("button", name="Try now").click()
    expect(page.locator(".banner")).to_have_count(0)
    page.get_by_role("button", name="Try again").click()
    answer(page)


def test_a_broken_stream_keeps_what_came(open_page: Open, serve: Serve):
    server = serve(watched(STORY, step_s=0.01, fail_at_step=30))
    page = open_page(server.url)
    say(page, "Go")
    answer(page, "failed")
    expect(page.locator(".answer .markdown")).to_contain_text("Once upon")
    expect(page.locator(".failure")).to_contain_text("the engine stopped")


@pytest.mark.parametrize("stored", ["nonsense", "[1]", "null"])
def test_what_the_browser_kept_may_be_anything(open_page: Open, serve: Serve, stored: str):
    page = open_page(serve(watched("Fine.")).url)
    page.evaluate(
        """text => {
          for (const name of ["jaxserve.chats", "jaxserve.settings", "jaxserve.theme"])
            localStorage.setItem(name, text);
        }""",
        stored,
    )
    page.reload()
    say(page, "Hello")
    answer(page)


def test_a_long_conversation_is_sent_as_it_was(open_page: Open, serve: Serve):
    server = serve(watched("Yes."))
    page = open_page(server.url)
    bodies: list[dict[str, object]] = []

    def note(request: object) -> None:
        if request.url.endswith("/chat/completions"):  # pyright: ignore
            bodies.append(json.loads(request.post_data))  # pyright: ignore

    page.on("request", note)
    for number, text in enumerate(("one", "two", "three"), 1):
        say(page, text)
        expect(page.locator(".answer")).to_have_count(number)
        answer(page)
    sent = [(message["role"], message["content"]) for message in bodies[-1]["messages"]]  # pyright: ignore
    user, reply = "user", ("assistant", "Yes.")
    assert sent == [(user, "one"), reply, (user, "two"), reply, (user, "three")]
