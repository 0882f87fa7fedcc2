"""What the studio's tests in a browser share: Chromium through Playwright, a served studio, and a visitor.

Skipped where there is no Chromium; nothing is downloaded.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vgen.app.core import Studio
from vgen.app.studio import build, launch

try:
    from playwright import sync_api
except ImportError:  # an extra's
    sync_api = None  # type: ignore[assignment]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IN_A_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or sync_api is None, reason="there is no Chromium, or no Playwright"),
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


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Studio, str]]:
    """A studio of the bundled models, and where it is served."""
    studio = Studio(folder, device="cpu")
    studio.thumbnails("fashion-var")
    page = build(studio)
    _, url, _ = launch(studio, page, prevent_thread_lock=True)
    try:
        yield studio, url
    finally:
        page.close(verbose=False)
        studio.close()


@contextmanager
def browsing() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=WAIT / 2)  # a busy machine is no defect of the page
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

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def choose(self, label: str, option: str) -> None:
        """An option of a dropdown."""
        self.page.get_by_label(label, exact=True).click()
        self.page.get_by_role("option", name=option).click()

    def seed(self) -> str:
        return self.page.get_by_label("Seed", exact=True).input_value()

    def fixed_seed(self, seed: int) -> None:
        self.page.get_by_label("New random seed for every run").uncheck()
        self.page.get_by_label("Seed", exact=True).fill(str(seed))
        self.page.get_by_label("Seed", exact=True).blur()


@contextmanager
def visiting(browser: Any, url: str) -> Iterator[Visitor]:
    """A visitor who, at the end, has seen no error and asked nobody else for anything."""
    made = Visitor(browser, url)
    yield made
    unexpected = [text for text in made.errors if not any(words in text for words in made.forgiven)]
    assert unexpected == [] and made.strangers == []
    made.context.close()


def newest(studio: Studio, number: int) -> list[Path]:
    return sorted(studio.library.files.rglob("0*.png"), key=lambda path: path.stat().st_mtime_ns)[-number:]
