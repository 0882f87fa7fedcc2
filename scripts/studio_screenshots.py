"""Take the pictures of the studio that the README shows: `python scripts/studio_screenshots.py`.

Serves the studio with the bundled models, does what a visitor does in Chromium (Debian's, by Playwright), and writes
docs/studio-TAB.png.
"""

import io
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_studio import FLAGS
from PIL import Image

from vgen.app.core import Studio
from vgen.app.studio import build, launch
from vgen.files import atomic_file

WAIT = 120_000  # milliseconds


def main(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs"),
    width: Annotated[int, typer.Option(help="Of the window in pixels.")] = 1280,
    only: Annotated[str, typer.Option(help="Tabs, separated by commas; default: all.")] = "",
) -> None:
    """Open each tab, use it once, and take its picture."""
    from playwright.sync_api import sync_playwright

    chosen = [name for name in only.split(",") if name] or list(VISITS)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        studio = Studio(Path(folder), device="cpu")
        page = build(studio)
        _, url, _ = launch(studio, page, prevent_thread_lock=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        window = browser.new_page(viewport={"width": width, "height": 900})
        window.set_default_timeout(WAIT)
        window.goto(url)
        window.get_by_role("button", name="Generate", exact=True).wait_for()
        generate(window)
        for name in chosen:
            if name != "generate":
                window.get_by_role("tab", name=name.capitalize(), exact=True).click()
            VISITS[name](window)
            window.wait_for_timeout(1500)
            window.mouse.move(0, 0)
            _save(window.screenshot(full_page=True), out / f"studio-{name}.png")
            print(out / f"studio-{name}.png")
        browser.close()
        page.close(verbose=False)
        studio.close()


def _save(png: bytes, path: Path) -> None:
    """With 128 colours, which is enough for a page and a quarter of the bytes."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    with atomic_file(path) as partial:
        image.save(partial, format="PNG", optimize=True)


def generate(window: Any) -> None:
    """Images of four classes, unless they are there."""
    if window.locator("#run-results img").count():
        return
    window.get_by_label("New random seed for every run").uncheck()
    for number in (9, 8, 3):
        window.locator(f"button[data-class='{number}']").click()
    window.get_by_label("Seed", exact=True).fill("3")
    window.get_by_label("Seed", exact=True).blur()
    window.get_by_role("button", name="Generate", exact=True).click()
    window.get_by_text("Done:").first.wait_for()


def compare(window: Any) -> None:
    """A race of all samplers."""
    window.get_by_role("button", name="Start the race").click()
    window.get_by_text("Done").last.wait_for()


def evaluate(window: Any) -> None:
    """A curve over guidance."""
    window.get_by_role("button", name="Evaluate", exact=True).click()
    window.get_by_text("Done").last.wait_for()


def edit(window: Any) -> None:
    """Other handles for the tenth picture, a bag."""
    window.get_by_label("Picture", exact=True).click()
    window.get_by_role("option").nth(9).click()
    tokens = window.locator("#edit-tokens [data-token]")
    for number in range(21):  # the upper three of seven rows
        tokens.nth(number).click()
        window.wait_for_timeout(150)
    window.get_by_role("button", name="Repaint", exact=True).click()
    window.locator("#edit-status").get_by_text("Done").wait_for()


def nothing(window: Any) -> None:
    """The tab as it opens."""


VISITS = {
    "generate": generate,
    "compare": compare,
    "edit": edit,
    "inspect": nothing,
    "evaluate": evaluate,
    "models": nothing,
    "history": nothing,
}


if __name__ == "__main__":
    typer.run(main)
