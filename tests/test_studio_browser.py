"""The studio's page in a real browser (Chromium through Playwright), on the bundled models: what a visitor does.

Skipped where there is no Chromium; nothing is downloaded.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vgen.app.core import Studio
from vgen.app.studio import build, launch
from vgen.media import read_request

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Studio, str]]:
    studio = Studio(tmp_path_factory.mktemp("studio"), device="cpu")
    studio.thumbnails("fashion-var")
    page = build(studio)
    _, url, _ = launch(studio, page, prevent_thread_lock=True)
    yield studio, url
    page.close(verbose=False)
    studio.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


class Visitor:
    """A browser of its own: its page, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.context.set_default_timeout(WAIT)
        self.page, self.url = self.context.new_page(), url
        self.errors: list[str] = []
        self.forgiven: tuple[str, ...] = ()  # what a test expects on the console
        self.strangers: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note)
        self.open()

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.strangers.append(request.url)

    def open(self, address: str = "") -> None:
        self.page.goto(self.url + address)
        self.button("Generate").wait_for()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def status(self) -> Any:
        return self.page.locator("#run-status [role=status]")

    def picture(self) -> Any:
        return self.page.locator("img#run-picture")

    def expect(self, locator: Any) -> Any:
        return sync_api.expect(locator)

    def finish(self) -> None:
        """Wait for the run to end well."""
        self.expect(self.status()).to_contain_text("Done:", timeout=WAIT)

    def seed(self) -> str:
        return self.page.get_by_label("Seed", exact=True).input_value()

    def fixed_seed(self, seed: int) -> None:
        self.page.get_by_label("New random seed for every run").uncheck()
        self.page.get_by_label("Seed", exact=True).fill(str(seed))
        self.page.get_by_label("Seed", exact=True).blur()


@pytest.fixture
def visitor(browser: Any, served: tuple[Studio, str]) -> Iterator[Visitor]:
    made = Visitor(browser, served[1])
    yield made
    unexpected = [text for text in made.errors if not any(words in text for words in made.forgiven)]
    assert unexpected == [] and made.strangers == []
    made.context.close()


def newest(studio: Studio, number: int) -> list[Path]:
    return sorted(studio.library.files.rglob("0*.png"), key=lambda path: path.stat().st_mtime_ns)[-number:]


def test_three_clicks_to_images_that_can_be_scrubbed(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.button("Generate").click()
    visitor.finish()
    files = newest(served[0], 4)
    assert [read_request(path).seeds[0] for path in files] == [int(visitor.seed()) + i for i in range(4)]
    visitor.expect(visitor.page.locator("#cost")).to_contain_text("for 4 images of 5 evaluations")
    last = visitor.picture().get_attribute("src")
    assert "t-shirt, seed" in visitor.picture().get_attribute("alt")
    step = visitor.page.locator("#run-scrub input[type=range]")
    assert (step.get_attribute("max"), step.input_value()) == ("5", "5")
    visitor.page.keyboard.press("ArrowLeft")
    visitor.expect(visitor.page.locator("#run-step")).to_contain_text("scale 4 of 5")
    assert visitor.picture().get_attribute("src") != last
    visitor.page.keyboard.press("ArrowRight")
    visitor.expect(visitor.page.locator("#run-step")).to_contain_text("scale 5 of 5")
    visitor.expect(visitor.picture()).to_have_attribute("src", last)
    visitor.button("Play").click()
    visitor.expect(visitor.page.locator("#run-step")).to_contain_text("scale 1 of 5")
    visitor.expect(visitor.page.locator("#run-step")).to_contain_text("scale 5 of 5")


def test_keys_generate_reroll_and_list_themselves(visitor: Visitor) -> None:
    visitor.page.keyboard.press("Control+Enter")
    visitor.finish()
    first = visitor.seed()
    visitor.page.locator("#header").click()
    visitor.page.keyboard.press("r")
    visitor.expect(visitor.page.get_by_label("Seed", exact=True)).not_to_have_value(first)
    visitor.finish()
    visitor.page.keyboard.press("?")
    visitor.expect(visitor.page.get_by_text("stop and re-roll", exact=True)).to_be_visible()
    visitor.page.keyboard.press("Escape")
    visitor.page.get_by_label("Seed", exact=True).focus()
    before = visitor.seed()
    visitor.page.keyboard.press("r")  # typed into a field, it is a letter
    visitor.expect(visitor.page.get_by_label("Seed", exact=True)).to_have_value(re.compile(f"^{before}r?$"))


def hold(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make fashion-var wait after its second scale until it is let go; returns the event."""
    import threading

    go, pipeline = threading.Event(), studio.models.get("fashion-var")
    original = pipeline.stream

    def slow(*args: Any, **named: Any) -> Iterator[Any]:
        steps = original(*args, **named)
        try:
            for step in steps:
                yield step
                if step.index == 1:
                    go.wait(60)
        finally:
            steps.close()

    monkeypatch.setattr(pipeline, "stream", slow)
    return go


def test_stop_keeps_what_is_done(visitor: Visitor, served: tuple[Studio, str], monkeypatch: pytest.MonkeyPatch) -> None:
    go = hold(served[0], monkeypatch)
    visitor.button("Generate").click()
    visitor.expect(visitor.status()).to_contain_text("Scale 2 of 5")
    shown = visitor.picture().get_attribute("src")
    visitor.button("Stop").click()
    go.set()
    visitor.expect(visitor.status()).to_contain_text("Stopped at scale")
    visitor.expect(visitor.picture()).to_have_attribute("src", re.compile("^data:image/png"))
    assert shown.startswith("data:image/png")
    visitor.expect(visitor.button("Stop")).to_be_disabled()


def test_a_run_survives_a_reload_and_others_do_not_see_it(
    visitor: Visitor, browser: Any, served: tuple[Studio, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold(served[0], monkeypatch)
    visitor.button("Generate").click()
    visitor.expect(visitor.status()).to_contain_text("Scale 2 of 5")
    visitor.forgiven = ("AbortError", "Connection errored out")  # Gradio's, of streams that the reload cut off
    visitor.open()
    visitor.expect(visitor.status()).to_contain_text("Scale 2 of 5")
    other = Visitor(browser, visitor.url)
    other.expect(other.status()).to_contain_text("Ready")
    other.button("Generate").click()
    other.expect(other.status()).to_contain_text("Waiting: 1 run before this one")
    other.button("Stop").click()
    other.expect(other.status()).to_contain_text("Stopped")
    assert other.picture().count() == 0
    go.set()
    visitor.finish()
    visitor.expect(visitor.page.locator("#run-results img").first).to_be_visible()
    other.context.close()


def test_a_picture_fills_the_form_and_comes_out_again(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.fixed_seed(77)
    visitor.page.locator("button[data-class='9']").click()
    visitor.page.locator("button[data-class='0']").click()  # was chosen: taken away
    visitor.button("Generate").click()
    visitor.finish()
    path = newest(served[0], 4)[2]
    assert read_request(path).class_labels == [9] and read_request(path).seeds == [79]
    again = Visitor(visitor.context.browser, visitor.url)
    again.page.get_by_text("Repeat a picture").click()
    again.page.locator("#restore input[type=file]").set_input_files(str(path))
    again.expect(again.page.locator("#restored")).to_contain_text("the same pixels")
    again.expect(again.page.get_by_label("Seed", exact=True)).to_have_value("79")
    again.button("Generate").click()
    again.finish()
    made = newest(served[0], 1)[0]
    assert made != path and np.array_equal(np.array(Image.open(made)), np.array(Image.open(path)))
    again.context.close()


def test_what_is_not_ours_is_one_line(visitor: Visitor, tmp_path: Path) -> None:
    visitor.forgiven = ("500 (Internal Server Error)",)  # how Gradio brings our line to the page
    Image.new("RGB", (28, 28)).save(tmp_path / "stranger.png")
    visitor.page.get_by_text("Repeat a picture").click()
    visitor.page.locator("#restore input[type=file]").set_input_files(str(tmp_path / "stranger.png"))
    visitor.expect(visitor.page.get_by_text("carries no vgen request")).to_be_visible()
    visitor.button("Generate").click()
    visitor.finish()


def test_another_model_and_sampler(visitor: Visitor) -> None:
    visitor.page.get_by_label("Model", exact=True).click()
    visitor.page.get_by_role("option", name="fashion-maskgit").click()
    visitor.page.get_by_text("Sampler and guidance").click()
    visitor.expect(visitor.page.get_by_label("Sampler", exact=True)).to_have_value("maskgit")
    visitor.page.get_by_label("Sampler", exact=True).click()
    visitor.page.get_by_role("option", name="halton").click()
    visitor.page.get_by_label("Steps", exact=False).first.fill("6")
    visitor.button("Generate").click()
    visitor.finish()
    assert visitor.page.locator("#run-scrub input[type=range]").get_attribute("max") == "6"


def tab(visitor: Visitor, name: str) -> None:
    visitor.page.get_by_role("tab", name=name, exact=True).click()


def test_a_race_of_two_samplers(visitor: Visitor) -> None:
    tab(visitor, "Compare")
    visitor.page.get_by_label("Entrants").fill("maskgit steps=4\nhalton steps=3")
    visitor.page.get_by_label("Entrants").blur()
    visitor.button("Start the race").click()
    visitor.expect(visitor.page.get_by_text("Done: 2 runs")).to_be_visible(timeout=WAIT)
    row = visitor.page.get_by_role("row", name="2. halton steps=3")
    visitor.expect(row).to_contain_text("3")
    visitor.expect(visitor.page.get_by_text("tokens differ").first).to_be_visible()
    visitor.expect(visitor.page.get_by_role("cell", name="race.csv", exact=True)).to_be_visible()


def test_painting_over_tokens_of_the_last_run(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.fixed_seed(5)
    visitor.button("Generate").click()
    visitor.finish()
    before = newest(served[0], 4)[1]
    tab(visitor, "Edit")
    visitor.page.get_by_label("Picture", exact=True).click()
    visitor.page.get_by_role("option").nth(1).click()
    tokens = visitor.page.locator("#edit-tokens [data-token]")
    for place in (0, 1, 2):
        tokens.nth(place).click()  # faster than the page answers
    visitor.expect(visitor.page.locator("#edit-tokens")).to_contain_text("3 of 49 tokens")
    visitor.button("Repaint").click()
    visitor.expect(visitor.page.locator("#edit-status")).to_contain_text("Done", timeout=WAIT)
    after = np.array(Image.open(newest(served[0], 1)[0]).convert("L"))
    untouched = np.array(Image.open(before).convert("L"))
    assert np.array_equal(after[4:], untouched[4:]) and np.array_equal(after[:, 12:], untouched[:, 12:])
    assert not np.array_equal(after[:4, :12], untouched[:4, :12])


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page_and_all_controls_have_names(
    browser: Any, served: tuple[Studio, str], width: int
) -> None:
    visitor = Visitor(browser, served[1], width=width, color_scheme="dark")
    visitor.button("Generate").click()
    visitor.finish()
    page = visitor.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, select')].filter(e => {
          if (e.offsetParent === null) return false;
          const named = e.innerText.trim() || e.ariaLabel || e.title || e.getAttribute('aria-labelledby') ||
            (e.labels && e.labels.length) || e.placeholder || e.querySelector('[aria-label], [title]');
          return !named;
        }).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    if width < 640:
        small = page.evaluate(
            """() => ['go', 'stop', 'reroll'].map(id => document.getElementById(id).getBoundingClientRect().height)"""
        )
        assert min(small) >= 44
    assert visitor.errors == []
    visitor.context.close()
