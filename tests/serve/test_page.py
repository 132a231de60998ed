"""The page in a real browser: upload, ask, stream, stop, jump to the evidence, reload, a second tab. Draws docs' pictures."""

import os
import re
import shutil
from pathlib import Path

import pytest

from sala.serve.server import EngineLimits
from serve.conftest import LONG, QUESTION

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
PICTURES = Path(__file__).parents[2] / "docs"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
    # playwright's own loop runs in this thread
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    contexts = []

    def start(live, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda line: page.wrong.append(line.text) if line.type == "error" else None)
        page.goto(live.url)
        page.get_by_text("embedded-hybrid, up to").wait_for()
        return page

    yield start
    for context in contexts:
        for page in context.pages:
            assert getattr(page, "wrong", []) == []
        context.close()


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(LONG * 3)
    return path


def upload(page, path, read=True):
    page.set_input_files("#files", path)
    if read:
        page.get_by_text("tokens read").first.wait_for()


def ask(page, question, answer=None):
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    if answer is not None:
        page.locator(".turn").last.get_by_text(answer).first.wait_for()
        page.locator(".turn").last.get_by_text("before the answer").wait_for()


def test_a_book_is_dropped_read_and_asked_and_the_evidence_is_one_click_away(serving, open_page, book):
    with serving(template=None, limits=EngineLimits(chunk=256)) as live:
        page = open_page(live)
        page.get_by_label("Longest answer").fill("2")
        upload(page, book)
        ask(page, QUESTION, "@cedar @delta")
        first = page.locator(".evidence button").first
        assert "@amber @birch" in first.inner_text()
        first.click()
        page.locator("mark").first.wait_for()
        assert "@amber @birch" in page.evaluate("document.activeElement.textContent")
        assert page.evaluate(
            "(() => { const box = document.activeElement.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight })()"
        )
        # asked again, nothing is read again
        ask(page, "[get] @amber @oak", "of them remembered")
        note = page.locator(".turn").last.get_by_text("remembered").inner_text()
        before, remembered = (int(word.replace(",", "")) for word in (note.split()[0], note.split()[5]))
        assert remembered > before - 130


def test_an_answer_is_stopped_and_the_next_one_comes(serving, open_page, book):
    with serving(template=None) as live:
        page = open_page(live)
        page.get_by_label("Longest answer").fill("15000")
        ask(page, "def area(radius):")
        page.locator(".turn .said").last.filter(has_text=re.compile(r"[\s\S]{20}")).wait_for()
        page.keyboard.press("Escape")
        page.get_by_text("stopped").wait_for()
        live.settled()
        page.get_by_label("Longest answer").fill("2")
        ask(page, QUESTION, "before the answer")


def test_reading_is_watched_and_stopped(serving, open_page, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(LONG * 20)
    with serving(template=None, max_length=200_000, limits=EngineLimits(chunk=128)) as live:
        page = open_page(live)
        upload(page, path, read=False)
        page.get_by_text("tokens/s").wait_for()
        page.get_by_role("button", name="Stop reading").click()
        page.get_by_text("not read").wait_for()
        live.settled()


def test_a_reload_and_a_second_tab_see_the_same_documents(serving, open_page, book, tmp_path):
    with serving(template=None, documents=tmp_path / "kept") as live:
        page = open_page(live)
        page.get_by_label("Longest answer").fill("2")
        upload(page, book)
        ask(page, QUESTION, "@cedar @delta")
        page.reload()
        page.get_by_text("@cedar @delta").first.wait_for()
        second = open_page(live)
        second.get_by_text("tokens read, kept").wait_for()
        second.get_by_role("button", name="Remove book.txt").click()
        second.get_by_text("tokens read").wait_for(state="detached")
        page.bring_to_front()
        page.reload()
        page.get_by_text("kept on this machine").wait_for()
        assert page.locator("#list li").count() == 0


def test_five_megabytes_are_taken_and_shown(serving, open_page, tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("".join(f"line {n} of a long text\n" for n in range(210_000)))
    assert path.stat().st_size > 5_000_000
    with serving(template=None, max_length=1000) as live:
        page = open_page(live)
        upload(page, path, read=False)
        page.get_by_text("expected fewer than 1,000").wait_for()
        page.get_by_role("button", name="Show large.txt").click()
        page.locator("#pages pre").nth(1000).wait_for(state="attached")


def test_a_folder_is_taken_file_by_file(serving, open_page, tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "one.txt").write_text("one\n" * 100)
    (tmp_path / "notes" / "deep" / "two.txt").write_text("two\n" * 100)
    (tmp_path / "notes" / ".hidden").write_text("hidden")
    with serving(template=None) as live:
        page = open_page(live)
        page.set_input_files("#folder", tmp_path / "notes")
        page.get_by_label("notes - deep - two.txt", exact=True).wait_for()
        page.get_by_label("notes - one.txt", exact=True).wait_for()
        assert len(live.http.get("/documents").json()["documents"]) == 2


def test_a_key_is_asked_for(serving, browser):
    with serving(api_keys=("secret",)) as live:
        page = browser.new_page()
        page.goto(live.url)
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use").click()
        page.get_by_text("embedded-hybrid, up to").wait_for()
        page.close()


def test_every_control_has_a_name_and_keys_reach_it(serving, open_page, book):
    with serving(template=None) as live:
        page = open_page(live)
        upload(page, book)
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, input, textarea')].filter("
            "e => !e.textContent.trim() && !e.getAttribute('aria-label') && !(e.labels && e.labels.length)).length"
        )
        assert nameless == 0
        seen = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert {"files", "folder", "question", "send", "length", "Show", "Remove"} <= seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"color_scheme": "light", "viewport": {"width": 1280, "height": 800}}),
        ("dark", {"color_scheme": "dark", "viewport": {"width": 1280, "height": 800}}),
        ("narrow", {"color_scheme": "light", "viewport": {"width": 390, "height": 844}}),
    ],
)
def test_the_page_fits_and_is_drawn(serving, open_page, book, tmp_path, name, options):
    with serving(template=None) as live:
        page = open_page(live, **options)
        page.get_by_label("Longest answer").fill("2")
        upload(page, book)
        ask(page, QUESTION, "@cedar @delta")
        if name != "narrow":
            page.locator(".evidence button").first.click()
            page.locator("mark").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate("scrollTo(0, 0)")
        folder = PICTURES if os.environ.get("SALA_DRAW") else tmp_path
        page.screenshot(path=folder / f"page-{name}.png")
        assert (folder / f"page-{name}.png").stat().st_size > 10_000
