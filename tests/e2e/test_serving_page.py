"""The page in a real browser: Chromium without a window, as a person with a mouse, a keyboard or a phone uses it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

import qformers

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("QFORMERS_SCREENSHOTS", "runs/screenshots"))
SIZES = {"desk": (1200, 800), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: `apt-get install chromium`, or name one in CHROMIUM, and the page is driven"
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """Whatever the page's console or its network complains of: nothing, at the end of a test."""
    return []


@pytest.fixture(params=SIZES)
def page(request, browser, service, complaints):
    """The page, at a desk and on a phone."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=request.param == "phone")
    page = context.new_page()
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda failed: complaints.append(f"{failed.url} {failed.failure}"))
    page.on(
        "request", lambda asked: complaints.append(f"asked elsewhere: {asked.url}") if not local(asked.url) else None
    )
    page.goto(service.url)
    page.wait_for_selector("#qf-caption-button", timeout=30_000)
    yield page
    page.screenshot(path=shot(request), full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off on a phone
    context.close()
    assert complaints == []


def local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def shot(request) -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS / f"{request.node.originalname.removeprefix('test_')}_{request.param}.png"


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def red(page: Page, selector: str) -> list[int]:
    """How many clearly red points each overlay has: what is drawn, not what the page says it drew."""
    count = """images => images.map(image => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const brush = canvas.getContext("2d");
        brush.drawImage(image, 0, 0);
        const { data } = brush.getImageData(0, 0, canvas.width, canvas.height);
        let found = 0;
        for (let at = 0; at < data.length; at += 4)
            found += data[at] > data[at + 1] + 60 && data[at] > data[at + 2] + 60;
        return found;
    })"""
    return page.locator(selector).evaluate_all(count)


def test_uploaded_picture_is_captioned(page, toy_models):
    expected = qformers.load(toy_models.speaker).caption(toy_models.picture(2))[0]
    page.set_input_files("#qf-file", toy_models.picture(2))
    expect(page.locator("#qf-preview")).to_be_visible()
    page.get_by_role("button", name="Caption").click()
    expect(page.locator("#qf-caption-answer .qf-said")).to_have_text(expected)
    expect(page.locator("#qf-caption-answer .qf-looked img")).to_be_visible()
    counts = red(page, "#qf-caption-answer .qf-overlay")
    assert len(counts) == 1 + 4 and min(counts) > 100  # all queries together, and each of the four


def test_question_is_answered_by_enter(page, toy_models):
    page.set_input_files("#qf-file", toy_models.picture(1))
    open_tab(page, "Ask")
    box = page.get_by_label("Question")
    box.fill("the cat sits on")
    box.press("Enter")
    expected = qformers.load(toy_models.speaker).ask(toy_models.picture(1), "the cat sits on")[0]
    expect(page.locator("#qf-ask-answer .qf-said")).to_have_text(expected)
    assert min(red(page, "#qf-ask-answer .qf-overlay")) > 100


def test_texts_are_matched_with_bars(page, toy_models):
    texts = ["a red square", "<b>circle</b> & line", "the dark picture of a line"]
    page.set_input_files("#qf-file", toy_models.picture(0))
    open_tab(page, "Match")
    page.get_by_label("Texts, one a line").fill("\n".join(texts))
    page.get_by_role("button", name="Match").click()
    expect(page.locator(".qf-match")).to_have_count(3)
    matches = dict(
        zip(texts, qformers.load(toy_models.matcher).match(toy_models.picture(0), texts).tolist(), strict=True)
    )
    ranked = sorted(matches, key=lambda text: -matches[text])
    assert page.locator(".qf-match span").all_text_contents() == ranked
    bars = page.locator(".qf-match meter").evaluate_all("bars => bars.map(bar => bar.value)")
    assert bars == pytest.approx([100 * matches[text] for text in ranked], abs=0.06)
    counts = red(page, ".qf-match .qf-overlay")
    assert len(counts) == 3 and min(counts) > 100


def test_index_is_searched_by_text_and_picture(page, toy_models):
    open_tab(page, "Search")
    page.get_by_label("Text").fill("a red square")
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".qf-hits li")).to_have_count(6)
    index = qformers.Index.open(toy_models.index)
    found = [hit.path for hit in index.search("a red square", k=6)]
    assert [name.split(" ")[0] for name in page.locator(".qf-hits small").all_text_contents()] == found
    assert page.locator(".qf-hits .qf-thumbnail").count() == 6
    counts = red(page, ".qf-hits .qf-overlay")
    assert len(counts) == 6 and min(counts) > 100
    page.set_input_files("#qf-file", toy_models.picture(4))
    page.get_by_label("Text").fill("")
    page.get_by_label("Like my picture").check()
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".qf-hits small").first).to_contain_text("4.png · 1.000")


def test_examples_and_everything_else_by_keyboard(page):
    # Listened for from the start: the browser is told to catch the chooser then; told just before, it may be too late.
    page.on("filechooser", lambda chooser: None)
    page.locator(".qf-example").nth(2).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#qf-preview")).to_be_visible()
    focused = []
    for _ in range(20):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        if focused[-1] == "qf-caption-button":
            break
    assert "Search" in focused  # the tabs
    page.keyboard.press("Enter")
    expect(page.locator("#qf-caption-answer .qf-said")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    page.locator("#qf-file").focus()
    outlined = "getComputedStyle(document.querySelector('.qf-drop')).outlineStyle"
    assert page.evaluate(outlined) == "solid"  # the hidden field's label shows the focus
    with page.expect_file_chooser():
        page.keyboard.press("Enter")


def test_what_cannot_be_done_is_said_on_the_page(page, complaints, toy_models):
    page.get_by_role("button", name="Caption").click()
    expect(page.locator("#qf-caption-answer .qf-refused")).to_have_text("Choose a picture first.")
    open_tab(page, "Match")
    page.set_input_files("#qf-file", toy_models.picture(0))
    page.get_by_role("button", name="Match").click()
    expect(page.locator("#qf-match-answer .qf-refused")).to_have_text("Type something first.")
    page.set_input_files("#qf-file", {"name": "cat.png", "mimeType": "image/png", "buffer": b"%PDF-1.7 <b>"})
    open_tab(page, "Caption")
    page.get_by_role("button", name="Caption").click()
    expect(page.locator("#qf-caption-answer .qf-refused")).to_contain_text("neither PNG, JPEG")
    expect(page.locator("#qf-hint")).to_contain_text("cannot show this picture")
    assert {complaint.split(":")[0] for complaint in complaints} == {"Failed to load resource"}  # the two 415
    complaints.clear()


def test_with_a_token_the_page_opens_by_it_once(browser, toy_models):
    from toy_service import Running

    with Running(["--model", str(toy_models.matcher)], {"QFORMERS_TOKEN": "open sesame"}) as running:
        context = browser.new_context()
        page = context.new_page()
        assert page.goto(running.url).status == 401
        page.goto(f"{running.url}/?token=open%20sesame")
        assert page.url == f"{running.url}/"  # and nothing of it stays in the address
        page.set_input_files("#qf-file", toy_models.picture(0))
        page.get_by_label("Texts, one a line").fill("circle")
        page.get_by_role("button", name="Match").click()
        expect(page.locator(".qf-match")).to_have_count(1)
        assert page.get_by_role("tab", name="Caption").count() == 0  # no model here does that
        assert page.evaluate("document.cookie") == ""  # no script reads it
        context.close()
