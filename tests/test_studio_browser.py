"""The studio's page in a real browser, on the bundled models: generating, restoring, and what holds for every tab."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from studio_browser import IN_A_BROWSER, Visitor, newest

from vgen.app.core import Studio
from vgen.media import read_request

pytestmark = IN_A_BROWSER


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


def test_guidance_is_a_curve_that_is_dragged(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.fixed_seed(9)
    visitor.expect(visitor.page.locator("button[data-class='9']")).to_be_visible()  # what the page asks for has come
    visitor.page.get_by_text("Sampler and guidance").click()
    points = visitor.page.locator("#guidance-curve circle")
    visitor.expect(points).to_have_count(5)
    points.nth(2).scroll_into_view_if_needed()
    box = points.nth(2).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.page.mouse.move(x, y)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x, y - 150)  # far above: as high as it goes
    visitor.page.mouse.up()
    visitor.expect(points.nth(2)).to_have_attribute("aria-valuenow", "1.00")
    points.nth(0).focus()
    visitor.page.keyboard.press("PageUp")
    visitor.page.keyboard.press("ArrowRight")
    visitor.page.keyboard.press("ArrowDown")
    visitor.expect(points.nth(1)).to_have_attribute("aria-valuetext", "1.16")  # a fifth of the way from 1 to 1.8
    visitor.button("Generate").click()
    visitor.finish()
    path = newest(served[0], 4)[0]
    assert read_request(path).settings["guidance_schedule"] == [0.25, 0.2, 1.0, 0.75, 1.0]
    visitor.button("Constant").click()
    visitor.expect(points.nth(0)).to_have_attribute("aria-valuenow", "1.00")
    visitor.page.get_by_text("Repeat a picture").click()
    visitor.page.locator("#restore input[type=file]").set_input_files(str(path))
    visitor.expect(points.nth(0)).to_have_attribute("aria-valuenow", "0.25")
    visitor.page.get_by_label("number input for Guidance scale").fill("5")
    visitor.page.keyboard.press("Tab")
    visitor.expect(points.nth(2)).to_have_attribute("aria-valuetext", "5")
    visitor.expect(points.nth(2)).to_have_attribute("aria-label", "Guidance at scale 3 of 5")
    visitor.button("Generate").click()
    visitor.finish()
    visitor.page.get_by_text("Copy as", exact=True).first.click()
    visitor.expect(visitor.page.locator(".vgen-code textarea").first).to_have_value(
        re.compile(r"--guidance-scale 5 --guidance-schedule 0\.25:0\.2:1:0\.75:1")
    )


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
    visitor.expect(visitor.page.get_by_label("Sampler", exact=True)).to_have_value("halton")
    visitor.page.wait_for_timeout(2000)  # a choice redraws the fields that depend on it, and what was typed by then
    steps = visitor.page.get_by_label("Steps", exact=False).first
    steps.fill("6")
    steps.press("Tab")
    visitor.expect(steps).to_have_value("6")
    visitor.button("Generate").click()
    visitor.finish()
    assert visitor.page.locator("#run-scrub input[type=range]").get_attribute("max") == "6"


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
