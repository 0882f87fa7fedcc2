"""The studio's other tabs in a real browser, on the bundled models."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from studio_browser import IN_A_BROWSER, WAIT, Visitor, newest

from vgen.app.core import Studio
from vgen.media import read_request

pytestmark = IN_A_BROWSER


def test_a_race_of_two_samplers(visitor: Visitor) -> None:
    visitor.tab("Compare")
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
    visitor.tab("Edit")
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


def test_a_branch_keeps_the_first_scales(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.fixed_seed(5)
    visitor.button("Generate").click()
    visitor.finish()
    visitor.tab("Edit")
    visitor.page.get_by_role("tab", name="Lock tokens, branch").click()
    visitor.expect(visitor.page.locator("#branch-runs input[type=radio]").first).to_be_checked()
    visitor.page.locator("#branch-amount input[type=number]").fill("3")
    visitor.page.keyboard.press("Tab")
    visitor.expect(visitor.page.locator("#branch-tokens")).to_contain_text("scale 3 of 5")
    visitor.button("Go on").click()
    visitor.expect(visitor.page.locator("#branch-status")).to_contain_text("Done:", timeout=WAIT)
    request = read_request(newest(served[0], 1)[0])
    assert [len(scale) for scale in request.settings["tokens"]] == [1, 4, 9]
    visitor.expect(visitor.page.locator("#branch-runs input[type=radio]")).to_have_count(2)


def test_a_token_is_inspected_and_put_back_otherwise(visitor: Visitor) -> None:
    visitor.button("Generate").click()
    visitor.finish()
    visitor.tab("Inspect")
    tokens = visitor.page.locator("#token-grid [data-token]")
    visitor.expect(tokens.first).to_be_visible()
    visitor.page.locator("#token-grid [data-token='24']").first.click()
    detail = visitor.page.locator("#token-detail")
    visitor.expect(detail).to_contain_text("Token 25 of scale 5")
    detail.locator("[data-code]").nth(1).click()
    visitor.expect(visitor.page.locator("#inspect-tokens-status")).to_contain_text("Last run: fashion-var")
    for name, key in (("Codebook", "codebook"), ("Round trip", "round-trip")):
        visitor.page.get_by_role("tab", name=name).click()
        visitor.expect(visitor.page.locator(f"#inspect-{key}-status")).to_be_visible()
    visitor.page.get_by_role("tab", name="First hitting").click()
    visitor.page.get_by_role("button", name=re.compile("Run an example: four bags")).click()
    status = visitor.page.locator("#inspect-first-hitting-status")
    visitor.expect(status).to_contain_text("Last run: fashion-maskgit", timeout=WAIT)
    visitor.tab("Generate")
    visitor.button("Generate").click()
    visitor.finish()
    visitor.tab("Inspect")  # the panel that was in front reads the newer run
    visitor.expect(status).to_contain_text("first-hitting", timeout=WAIT)


def test_a_curve_of_quality(visitor: Visitor) -> None:
    visitor.tab("Evaluate")
    visitor.page.locator("#evaluate-values textarea, #evaluate-values input").first.fill("1, 3")
    visitor.page.get_by_label("number input for Images a point (N)").fill("20")
    visitor.page.keyboard.press("Tab")
    visitor.button("Evaluate").click()
    status = visitor.page.locator("#evaluate-status")
    visitor.expect(status).to_contain_text("Done: 2 points of 20 images", timeout=2 * WAIT)
    visitor.expect(visitor.page.locator("#evaluate-plots svg").first).to_be_visible()
    visitor.expect(visitor.page.locator("#evaluate-table tbody tr")).to_have_count(2)
    visitor.expect(visitor.page.locator("#evaluate-protocol")).to_contain_text("20")
    visitor.page.get_by_label("Figure to plot").click()
    visitor.page.get_by_role("option").nth(1).click()
    visitor.expect(visitor.page.locator("#evaluate-plots svg").first).to_be_visible()


def test_models_are_listed_looked_into_and_loaded(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.tab("Models")
    table = visitor.page.locator("#models-table")
    visitor.expect(table.get_by_role("row")).to_have_count(len(served[0].models.names()) + 1)
    visitor.choose("Model to look at", "fashion-nfig")
    visitor.expect(visitor.page.locator("#models-facts")).to_contain_text("fashion-nfig")
    visitor.expect(visitor.page.locator("#models-card")).to_contain_text("licen", ignore_case=True)
    config = json.loads(visitor.page.locator("#tabs .vgen-code textarea").first.input_value())
    assert "generator" in config
    status = visitor.page.locator("#models-status")
    visitor.button("Unload").click()
    visitor.expect(status).to_contain_text(re.compile("fashion-nfig (is out of memory|was not loaded)"))
    visitor.button("Load").click()
    visitor.expect(status).to_contain_text("fashion-nfig is in memory")
    assert "fashion-nfig" in served[0].models.loaded()
    visitor.page.get_by_text("Bring a checkpoint").click()
    visitor.expect(visitor.page.get_by_text("--allow-upload")).to_be_visible()


def test_history_is_searched_starred_deleted_and_brought_back(
    visitor: Visitor, served: tuple[Studio, str], tmp_path: Path
) -> None:
    visitor.fixed_seed(41)
    visitor.button("Generate").click()
    visitor.finish()
    assert len(newest(served[0], 4)) == 4
    visitor.tab("History")
    tiles = visitor.page.locator("#history-tiles .vgen-tile")
    visitor.expect(tiles).to_have_count(4)
    visitor.page.locator("#history-search input, #history-search textarea").first.fill("43")
    visitor.expect(tiles).to_have_count(1)
    tiles.locator("[data-do=star]").click()
    visitor.page.locator("#history-search input, #history-search textarea").first.fill("")
    visitor.expect(tiles).to_have_count(4)
    visitor.page.get_by_label("Starred only").check()
    visitor.expect(tiles).to_have_count(1)
    tiles.locator("[data-do=open]").click()
    visitor.expect(visitor.page.locator("#history-facts")).to_contain_text("43")
    assert json.loads(visitor.page.locator("#tabs .vgen-code textarea").first.input_value())["seeds"] == [43]
    tiles.locator("input[data-id]").check()
    visitor.button("Delete ticked").click()
    visitor.expect(tiles).to_have_count(0)
    visitor.button("Undo last delete").click()
    visitor.expect(tiles).to_have_count(1)
    tiles.locator("[data-do=open]").click()
    visitor.button("Restore into Generate").click()
    visitor.expect(visitor.page.get_by_label("Seed", exact=True)).to_have_value("43")
    visitor.expect(visitor.page.locator("#restored")).to_contain_text("the same pixels")


def test_a_video_and_its_noise_levels(visitor: Visitor, served: tuple[Studio, str]) -> None:
    visitor.choose("Model", "moving-far")
    visitor.expect(visitor.page.get_by_label("Frames, with those given")).to_have_value("20")
    visitor.page.get_by_label("number input for Images per class").fill("1")
    visitor.page.keyboard.press("Tab")
    visitor.button("Generate").click()
    visitor.finish()
    visitor.expect(visitor.page.locator("#run-video video")).to_be_visible()
    visitor.expect(visitor.page.locator("#run-step")).to_contain_text("20 of 20 frames finished")
    assert list(served[0].library.files.rglob("*.mp4")) and list(served[0].library.files.rglob("*.gif"))
    visitor.tab("Inspect")
    visitor.page.get_by_role("tab", name="Wavefront").click()
    visitor.expect(visitor.page.locator("#wave-result")).to_contain_text("20 frames in 30 evaluations", timeout=WAIT)
