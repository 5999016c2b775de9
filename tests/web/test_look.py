"""The page for everybody: dark and light, narrow windows, keyboards, screen readers, calm eyes."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import WebServer, watched

Open = Callable[..., Page]
Serve = Callable[..., WebServer]

TABLE = "| " + " | ".join(["column"] * 14) + " |\n" + "|---" * 14 + "|\n"
WIDE = "Wide:\n\n```\n" + "x" * 400 + "\n```\n\n" + TABLE + "\n" + "long" * 90

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour, under) => {
    canvas.globalAlpha = 1;
    canvas.fillStyle = under ? `rgb(${under.join(",")})` : "white"; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => c.map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (node) => {
    const layers = [];
    for (let one = node; one; one = one.parentElement)
      layers.push(getComputedStyle(one).backgroundColor);
    return layers.reverse().reduce((below, colour) => rgb(colour, below), null);
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility({opacityProperty: true})) continue;
    if (node.closest(":disabled, .unseen, svg, noscript")) continue;
    const back = under(node), front = rgb(getComputedStyle(node).color, back);
    const [a, b] = [light(back), light(front)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const needed = parseFloat(getComputedStyle(node).fontSize) >= 24 ? 3 : 4.5;  // WCAG AA
    if (ratio < needed) poor.push(`${text.data.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def paper(page: Page) -> list[int]:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", colour)]


def chat(page: Page, text: str = "Hello") -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".answer").last).to_have_attribute("data-status", "done")


def test_the_page_follows_the_system_and_can_be_told_otherwise(open_page: Open, serve: Serve):
    url = serve(watched("x")).url
    dark, light = open_page(url, color_scheme="dark"), open_page(url, color_scheme="light")
    assert max(paper(dark)) < 60 and min(paper(light)) > 220
    light.get_by_role("button", name="Colours: auto").click()
    light.get_by_role("button", name="Colours: light").click()
    assert max(paper(light)) < 60
    light.reload()
    assert max(paper(light)) < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(open_page: Open, serve: Serve, scheme: str):
    server = serve(
        watched("# A title\n\nText with `code` and [a link](https://a.example/).\n\n> q")
    )
    page = open_page(server.url, width=1400, color_scheme=scheme)
    expect(page.locator(".tank")).to_have_count(3)
    assert page.evaluate(CONTRASTS) == []
    chat(page)
    assert page.evaluate(CONTRASTS) == []
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(CONTRASTS) == []


def test_nothing_sticks_out_of_the_window(open_page: Open, serve: Serve):
    page = open_page(serve(watched(WIDE, step_s=0)).url, width=1600, height=700)
    chat(page, "w" * 300)
    for width in (1600, 1180, 760, 390, 320):
        page.set_viewport_size({"width": width, "height": 700})
        check_fits(page, width)
        if width < 1180:
            page.get_by_role("button", name="Engine").click()
            expect(page.locator("[data-tier=host]")).to_be_visible()
            check_fits(page, width, field=False)
            page.get_by_role("button", name="Engine").click()


def check_fits(page: Page, width: int, field: bool = True) -> None:
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), width
    if field:
        box = page.get_by_label("Message", exact=True).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width


def test_a_phone_reaches_everything(open_page: Open, serve: Serve):
    server = serve(watched("Hello from afar."))
    page = open_page(server.url, width=390, height=780, has_touch=True, is_mobile=True)
    chat(page, "From my phone")
    page.get_by_role("button", name="Engine").click()
    expect(page.get_by_role("heading", name="Engine")).to_be_visible()
    page.get_by_role("button", name="Engine").click()
    expect(page.locator(".said")).to_have_text("From my phone")
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator(".said")).to_have_count(0)


def test_everything_can_be_done_with_the_keyboard_and_the_focus_is_seen(
    open_page: Open, serve: Serve
):
    server = serve(watched("First.\n\n```\ncode\n```\n"))
    page = open_page(server.url)
    page.keyboard.type("Typed at once")  # the message field has the focus
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_attribute("data-status", "done")
    reached: list[str] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const node = document.activeElement, style = getComputedStyle(node);
              const field = node.closest(".field");
              const ring = [style, field && getComputedStyle(field)]
                .some((one) => one && one.outlineStyle !== "none");
              return [node.ariaLabel || node.innerText || node.id, ring];
            }"""
        )
        if page.evaluate("document.activeElement === document.body"):
            continue
        assert outline, f"no focus ring on {name}"
        reached.append(name.split("\n")[0])
    for wanted in ("New chat", "Typed at once", "Edit", "Copy", "Regenerate", "Engine"):
        assert any(wanted in name for name in reached), f"{wanted} is not in {reached}"
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".said")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_a_screen_reader_hears_names_and_outcomes(open_page: Open, serve: Serve):
    page = open_page(serve(watched("An answer.")).url, width=1400)
    chat(page)
    expect(page.get_by_role("status").filter(has_text="Answer finished")).to_have_count(1)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, [role=img]")]
          .filter((node) => !(node.ariaLabel || node.innerText?.trim() || node.labels?.length))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    snapshot = page.locator("body").aria_snapshot()
    for name in ("main", 'navigation "Conversations"', 'article "You"', 'article "Answer"'):
        assert name in snapshot, name
    assert page.evaluate("document.documentElement.lang") == "en"


def test_nothing_moves_for_those_who_want_calm(open_page: Open, serve: Serve):
    server = serve(watched("word " * 300, step_s=0.01))
    page = open_page(server.url, width=1400, reduced_motion="reduce")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".pulse")).to_have_text("1 running")
    assert page.evaluate("document.getAnimations().length") == 0
