"""The studio part of `benchmark.py`: how long a visitor waits, and what looking at a run costs it.

Imported by `benchmark.py`, whose `studio` command prints the figures.
"""

import asyncio
import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
WAIT = 60_000  # milliseconds
WAITING = """() => new Promise((resolve) => {
  const begun = performance.now();
  const times = {};
  const before = document.querySelector('img#run-picture')?.getAttribute('src');
  const look = () => {
    const picture = document.querySelector('img#run-picture')?.getAttribute('src');
    if (picture && picture !== before && !times.first) times.first = performance.now() - begun;
    const status = document.querySelector('#run-status')?.innerText ?? '';
    if (times.first && status.startsWith('Done')) {
      times.done = performance.now() - begun;
      resolve(times);
    } else setTimeout(look, 5);
  };
  document.getElementById('go').click();
  look();
})"""


def run_page(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds until the page can be used, and from a click on Generate to the first preview and to the end of a
    warm run of one image, as medians; job: model, repeats, device."""
    from playwright.sync_api import sync_playwright

    from vgen.app.core import Studio
    from vgen.app.studio import build, launch

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        studio = Studio(Path(folder), device=job["device"])
        studio.thumbnails(job["model"])
        page = build(studio)
        _, url, _ = launch(studio, page, prevent_thread_lock=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        opened, firsts, ends = [], [], []
        for _ in range(job["repeats"]):
            window = browser.new_page()
            window.set_default_timeout(WAIT)
            began = time.perf_counter()
            window.goto(url, wait_until="commit")
            window.get_by_role("button", name="Generate", exact=True).wait_for()
            opened.append(1000 * (time.perf_counter() - began))
            window.locator("#thumbnails img").first.wait_for()
            window.get_by_label("Images per class").first.fill("1")
            window.wait_for_timeout(500)
            for turn in range(4):
                found = window.evaluate(WAITING)
                if turn:  # the first one is not warm
                    firsts.append(found["first"])
                    ends.append(found["done"])
            window.close()
        browser.close()
        page.close(verbose=False)
        studio.close()
    return {"page_ms": median(opened), "first_preview_ms": median(firsts), "finished_ms": median(ends)}


def run_previews(job: dict[str, Any]) -> dict[str, float]:
    """How much longer a run takes while somebody watches it, turn by turn; job: model, settings, images, repeats."""
    from vgen.app.core import Studio
    from vgen.app.forms import Ask
    from vgen.app.jobs import Job
    from vgen.app.parts import watch

    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(Path(folder), device=job["device"])
        ask = Ask(model=job["model"], classes=[9], per_class=job["images"], settings=job["settings"])
        times: dict[bool, list[float]] = {False: [], True: []}
        shown = 0
        for turn in range(job["repeats"] + 1):
            for watched in (False, True):
                run = studio.sample("visitor-0000000000000000", ask)

                async def look(run: Job = run) -> None:
                    nonlocal shown
                    async for last in watch(run):
                        recording = run.view.recording
                        if not last and recording is not None and len(recording):
                            recording.picture(-1)
                            shown += 1

                watcher = threading.Thread(target=lambda: asyncio.run(look()))
                if watched:
                    watcher.start()
                run.wait_until_ended(600)
                if watched:
                    watcher.join()
                if turn and run.view.seconds is not None:
                    times[watched].append(run.view.seconds)
        studio.close()
    return {
        "seconds": median(times[False]),
        "watched_seconds": median(times[True]),
        "slower": median(b / a for a, b in zip(times[False], times[True], strict=True)),
        "pictures_a_run": shown / (job["repeats"] + 1),
    }
