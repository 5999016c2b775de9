"""The live view in a real browser: it follows the engine, and says what is wrong."""

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.web.conftest import WebServer, wait_for, watched

Open = Callable[..., Page]
Serve = Callable[..., WebServer]

ASK = """([num, tokens]) => {
  for (let i = 0; i < num; i++)
    void fetch("/v1/completions", {method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({prompt: "x ".repeat(30 + i), max_tokens: tokens})});
}"""


def test_the_view_follows_what_runs(open_page: Open, serve: Serve):
    server = serve(watched("word " * 600, step_s=0.005))
    page = open_page(server.url, width=1400)
    running = page.locator("[data-figure=running] strong")
    expect(running).to_have_text("0")
    before = page.locator("[data-tier=device] .size").first.inner_text()
    page.evaluate(ASK, [5, 1200])
    expect(running).to_have_text("5")
    expect(page.locator("[data-figure=speed] strong")).not_to_have_text("0")
    expect(page.locator("[data-tier=device] .size").first).not_to_have_text(before)
    expect(page.locator(".pulse")).to_have_text("5 running")
    expect(page.get_by_label("Load or compute")).to_contain_text(re.compile(r"Loaded\s*5"))
    sources = page.get_by_label("Where prompt tokens came from")
    expect(sources).to_contain_text(re.compile(r"disk\s*\d+"))
    spark = page.get_by_role("img", name=re.compile("^Tokens per second, last two minutes"))
    expect(spark.locator(".line-main .line")).to_have_attribute("d", re.compile("L"))
    page.reload()  # which ends the requests
    expect(running).to_have_text("0")


def test_every_tier_is_a_tank_with_its_level(open_page: Open, serve: Serve):
    page = open_page(serve(watched("x")).url, width=1400)
    expect(page.locator(".tank h3")).to_have_text(
        [re.compile(n) for n in ("device", "host", "disk")]
    )
    heights = page.locator("[data-tier=disk] .vessel span").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().height / one.parentNode.clientHeight)"
    )
    assert len(heights) == 1 and 0.5 < heights[0] < 0.65  # 61 of 100 GiB
    expect(page.locator("[data-tier=disk]")).to_contain_text("61.0 GiB of 100 GiB")
    expect(page.locator("[data-tier=device]")).to_contain_text("0 pages in use · 60 cached")


def test_a_store_in_trouble_says_so(open_page: Open, serve: Serve):
    page = open_page(serve(watched("x", broken_store=True)).url, width=1400)
    trouble = page.locator("[data-tier=disk] .trouble")
    expect(trouble).to_contain_text("reads paused (open)")
    expect(trouble).to_contain_text("7 failed calls")
    expect(page.get_by_role("region", name="Since the start")).to_contain_text(
        re.compile(r"check\s*1")
    )


def test_the_view_comes_back_with_its_server(open_page: Open, serve: Serve):
    server = serve(watched("x"))
    page = open_page(server.url, width=1400)
    status = page.locator(".engine .status")
    expect(status).to_have_text("Live")
    server.stop()
    expect(status).to_contain_text("No answer")
    serve(watched("x"), server.port)
    expect(status).to_have_text("Live")


def test_a_page_that_is_not_seen_does_not_watch(open_page: Open, serve: Serve):
    server = serve(watched("x"))
    page = open_page(server.url, width=1400)
    expect(page.locator(".engine .status")).to_have_text("Live")
    reads = server.engine.stats

    num_reads = 0

    def counted():
        nonlocal num_reads
        num_reads += 1
        return reads()

    server.engine.stats = counted
    wait_for(lambda: num_reads > 1)
    page.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", {get: () => true, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    page.wait_for_timeout(600)
    seen = num_reads
    page.wait_for_timeout(600)
    assert num_reads == seen
    page.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", {get: () => false, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    wait_for(lambda: num_reads > seen + 1)
