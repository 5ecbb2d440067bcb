# SPDX-License-Identifier: Apache-2.0
"""The demo in a real browser, on a wide and on a narrow screen. Needs Debian's chromium, or CHROMIUM with its path."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from conftest import load_script

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--disable-quic"]  # fmt: skip
OWN = ("answer", "run", "note", "bars", "bar", "percent", "layers")  # classes of what the page makes itself

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: set CHROMIUM to its path"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide, light", "phone, dark"])
def page(request, browser, space_address):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    context.on("console", lambda message: message.type == "error" and problems.append(message.text))
    context.on("weberror", lambda found: problems.append(str(found.error)))
    foreign: list[str] = []
    page.on("request", lambda asked: asked.url.startswith(("http", "ws")) and space_address.split("//")[1]
            not in asked.url and foreign.append(asked.url))  # fmt: skip
    page.goto(f"{space_address}/?__theme={scheme}")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    yield page
    assert not problems
    assert not foreign
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


def ask(page, question):
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def test_ask_the_team_then_one_analyst(page):
    ask(page, "What moves bond yields?")
    expect(page.get_by_text("Written by an AI. Not financial advice.")).to_be_visible(timeout=30_000)
    assert page.locator(".answer .run").count() >= 1
    expect(page.locator(".bars .percent")).to_have_count(3)
    shares = [int(text.rstrip("%")) for text in page.locator(".bars .percent").all_inner_texts()]
    assert 98 <= sum(shares) <= 102
    page.get_by_role("button", name="Layer by layer").click()
    expect(page.locator(".layers tbody tr")).to_have_count(3)
    expect(page.get_by_text("One analyst alone")).to_be_hidden()  # until one is asked
    page.get_by_label("Micro analyst").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text("One analyst alone")).to_be_visible(timeout=30_000)
    expect(page.get_by_text("Written by an AI. Not financial advice.")).to_have_count(2, timeout=30_000)
    assert page.locator(".answer").first.inner_text()  # the team's answer still stands beside it
    violations = Axe().run(page).response["violations"]
    ours = [
        (violation["id"], node["html"][:120])
        for violation in violations
        for node in violation["nodes"]
        if any(f'class="{name}' in node["html"] for name in OWN)
    ]
    assert not ours


def test_an_example_fills_the_question(page):
    questions = load_script("space/examples.py").QUESTIONS
    page.get_by_text("S&P 500 opened").first.click()
    expect(page.get_by_label("Your question")).to_have_value(questions["quant"][1])


def test_tasks(page):
    page.get_by_role("tab", name="Tasks").click()
    page.get_by_label("Passage", exact=True).fill("Order intake of Harju Machines rose by 31 %.")
    page.get_by_role("button", name="Weigh the labels").click()
    expect(page.locator(".bars .percent")).to_have_count(3, timeout=30_000)


def test_errors_are_shown_in_words(page):
    ask(page, "   ")
    expect(page.get_by_text("Please type a question.")).to_be_visible(timeout=15_000)


def test_html_in_a_question_stays_text(page):
    ask(page, "<img src=x onerror=\"document.title='broken'\">")
    expect(page.get_by_text("Written by an AI. Not financial advice.")).to_be_visible(timeout=30_000)
    assert page.title() == "FinTeamExperts"


def test_a_link_fills_the_question_in(page, space_address):
    linked = page.context.new_page()  # a page that is left while it loads reports that
    linked.goto(f"{space_address}/?q=Is%20beta%20%3C%201%3F")
    expect(linked.get_by_label("Your question")).to_have_value("Is beta < 1?")
    linked.get_by_label("Your question").fill("And now?")
    linked.get_by_role("button", name="Copy a link to this question").click()
    expect(linked).to_have_url(re.compile(r"q=And\+now%3F"))


def test_a_conversation_goes_on(page):
    ask(page, "What moves bond yields?")
    expect(page.get_by_text("Written by an AI. Not financial advice.")).to_be_visible(timeout=30_000)
    page.get_by_label("Your question").fill("Why?")
    page.get_by_role("button", name="Ask as a follow-up").click()
    expect(page.locator(".earlier")).to_contain_text("What moves bond yields?", timeout=30_000)


def test_what_is_typed_while_the_page_loads_stays(page):
    """The page asks for the question of its link when it is up; without one it leaves the box alone."""
    slow = page.context.new_page()
    slow.route("**/queue/join*", lambda route: (time.sleep(1), route.continue_()))
    slow.goto(page.url, wait_until="commit")
    slow.get_by_label("Your question").fill("What moves bond yields?")
    slow.wait_for_timeout(4000)
    expect(slow.get_by_label("Your question")).to_have_value("What moves bond yields?")


def test_every_analyst_answers_on_one_click(page):
    page.get_by_label("Your question").fill("What moves bond yields?")
    page.get_by_role("button", name="Ask every analyst").click()
    expect(page.locator(".columns h4")).to_have_count(4, timeout=60_000)


def test_the_record_is_a_file(page):
    ask(page, "What moves bond yields?")
    expect(page.get_by_text("Written by an AI. Not financial advice.")).to_be_visible(timeout=30_000)
    page.get_by_role("button", name="Record of the last answer").click()
    with page.expect_download() as found:
        page.get_by_role("button", name="Download as JSON").click()
    record = json.loads(Path(found.value.path()).read_text())
    assert record["question"] == "What moves bond yields?"
