"""The Compare tab: races and grids equal solo runs, their clock counts sampling alone, and what is finished stays."""

import csv
import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from studio_helpers import OWNER, REQUEST, VISITOR, drain, finish, make_studio

from vgen.app import cells, measured, race
from vgen.app.cells import Grid
from vgen.app.compare import CompareTab
from vgen.app.compare_view import differences_html, entrants_html, grid_html, order_html, status
from vgen.app.core import Studio
from vgen.app.forms import Ask
from vgen.app.jobs import Job
from vgen.app.measured import Comparison, Turns, carry_out, submit
from vgen.app.recording import sheet
from vgen.media import read_request
from vgen.types import SettingError, Step

BASE = Ask(model="masked", classes=[1], per_class=2, seed=5)
TINY = replace(BASE, model="tiny")
OTHER = "another browser's token"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = make_studio(tmp_path_factory.mktemp("compare"), "tiny", "masked", "video")
    yield made
    made.close()


@pytest.fixture(scope="module")
def tab(studio: Studio) -> CompareTab:
    with gr.Blocks():
        state = gr.BrowserState(None, storage_key="s", secret="0" * 16)
        return CompareTab(studio, state, state)


@pytest.fixture(scope="module")
def raced(studio: Studio) -> Comparison:
    """A finished race, the last entrant of which repeats the first."""
    comparison = race.entrants(studio, BASE, "maskgit steps=4\nhalton, steps = 8\nsampler=maskgit steps=4")
    job = finish(submit(studio, OWNER, "race", comparison, race.summarise))
    assert job.state == "done", job.error
    return comparison


def grid(studio: Studio, columns: str, rows: str = "", fixed: str = "", base: Ask = TINY) -> Grid:
    """Axes as "name=values"."""
    axes = [tuple(text.split("=", 1)) if text else (cells.NONE, "") for text in (columns, rows)]
    return cells.cells(studio, base, fixed, *axes)  # type: ignore[arg-type]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def by_hand(studio: Studio, kind: str, comparison: Comparison, summarise: measured.Summary) -> tuple[Job, Iterator]:
    """A comparison that this thread carries out, step by step."""
    job = Job(OWNER, kind, comparison.model, lambda job: iter(()), lambda error: None, state="running", view=comparison)
    return job, carry_out(studio, job, comparison, summarise)


# ---- races


def test_entrants_make_what_solo_runs_make(studio: Studio, raced: Comparison) -> None:
    pipeline = studio.models.get("masked")
    for run, sampler, steps in zip(raced.runs, ("maskgit", "halton", "maskgit"), (4, 8, 4), strict=True):
        alone = pipeline([1, 1], seeds=[5, 6], sampler=sampler, steps=steps, output_type="np")
        assert torch.equal(run.step.tokens, alone.tokens) and run.evaluations == alone.evaluations == steps
        for image, path, seed in zip(alone.images, run.files, (5, 6), strict=True):
            assert np.array_equal(pixels(path), np.round(image * 255).astype(np.uint8))
            request = read_request(path)
            assert (request.sampler, request.settings["steps"], request.seeds) == (sampler, steps, [seed])
    listed = {entry.path for entry in studio.library.search(OWNER)}
    assert {path for run in raced.runs for path in run.files} <= listed


def test_an_entrant_is_a_sampler_settings_or_both() -> None:
    assert race.parse_entrant("halton steps=8, top_k = 10") == ("halton", {"steps": 8, "top_k": 10})
    assert race.parse_entrant("sampler=halton,top-p=0.5") == ("halton", {"top_p": 0.5})
    assert race.parse_entrant("temperature=1") == (None, {"temperature": 1})
    assert race.parse_entrant("  ") == (None, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("maskgit", "2 to 8 entrants, not 1"),
        ("maskgit\n" * 9, "2 to 8 entrants, not 9"),
        ("maskgit\nmaskgot", "entrant 2, 'maskgot': unknown sampler 'maskgot'"),
        ("maskgit\nhalton sampler=random", "two samplers"),
        ("maskgit\nguidance_scale=-1", "entrant 2.*must lie in"),
        ("maskgit\ntop_k=<b>", "neither a number nor a name"),
        ("maskgit\nmaskgit steps=3 steps=4", "twice"),
        ("x" * 3000, "the limit is 2000"),
    ],
)
def test_entrants_that_cannot_race(studio: Studio, text: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        race.entrants(studio, BASE, text)


def test_suggestions_can_race(studio: Studio) -> None:
    for model in ("masked", "tiny", "video"):
        pipeline = studio.models.get(model)
        text = "\n".join(race.suggest(pipeline))
        found = race.entrants(studio, Ask(model=model, classes=[]), text)
        assert len(found.runs) >= 2 and len({run.request.to_json() for run in found.runs}) == len(found.runs)
    assert race.suggest(studio.models.get("masked")) == list(studio.models.get("masked").samplers)


def test_the_clock_counts_evaluations_alone(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that an evaluation moves by 1 and decoding by 1000: a preview after every step costs nothing."""
    clock, pipeline = [0.0], studio.models.get("masked")
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])

    def move(seconds: float) -> Any:
        return lambda *_: clock.__setitem__(0, clock[0] + seconds)

    hooks = [
        pipeline.generator.register_forward_hook(move(1)),
        pipeline.tokenizer.decoder.register_forward_hook(move(1000)),
    ]
    try:
        comparison = race.entrants(studio, BASE, "maskgit steps=4\nhalton steps=8")
        _, steps = by_hand(studio, "race", comparison, race.summarise)
        for _ in steps:
            entrants_html(comparison)
    finally:
        for hook in hooks:
            hook.remove()
    assert clock[0] > 1000  # previews were drawn
    assert [run.seconds for run in comparison.runs] == [4, 8]
    assert [run.label[0] for run in race.placed(comparison)] == ["1", "2"]
    table = list(csv.DictReader(comparison.files[0].open()))
    assert [(row["evaluations"], row["milliseconds"]) for row in table] == [("4", "4000.0"), ("8", "8000.0")]
    assert "4000.0" in order_html(comparison) and "1000.00" in order_html(comparison)


def test_the_warm_up_is_not_part_of_a_run(studio: Studio) -> None:
    comparison = race.entrants(studio, BASE, "maskgit steps=4\nhalton steps=8\nrandom steps=2")
    job, steps = by_hand(studio, "race", comparison, race.summarise)
    for _ in range(4 + 1 + 1):  # the first one's four evaluations, and one of each other
        next(steps)
        assert {run.state for run in comparison.runs} == {"waiting"} and not any(r.seconds for r in comparison.runs)
    assert status(studio, job, comparison)[0].startswith("Warming up")
    next(steps)
    assert comparison.runs[0].state == "running" and comparison.runs[0].evaluations == 1
    steps.close()


def test_who_waits_for_the_device_has_it_before_who_had_it_last() -> None:
    turns, order = Turns(), []

    def preview() -> None:
        with turns.taken():
            order.append("preview")

    with turns.taken():
        thread = threading.Thread(target=preview)
        thread.start()
        deadline = time.monotonic() + 10
        while not (waits := turns._next.locked()) and time.monotonic() < deadline:
            time.sleep(0)
        order.append("evaluation 1")
    with turns.taken():
        order.append("evaluation 2")
    thread.join()
    assert waits and order == ["evaluation 1", "preview", "evaluation 2"]


# ---- differences


def test_a_repeated_entrant_has_the_same_tokens(raced: Comparison) -> None:
    first, halton, again = raced.runs
    assert race.describe_difference(first, again).startswith("the same 32 tokens; pixels differ by 0.0")
    (found,) = race.differing(first.step, halton.step)
    expected = int((first.step.tokens != halton.step.tokens).sum())
    assert expected > 0 and f"{expected} of 32 tokens differ" in race.describe_difference(first, halton)
    shown = differences_html(raced)
    for row in found:  # what is faded is what is the same
        _, same, border = race.outline(row)
        assert f'class="same" d="{same}"' in shown and shown.count(f'd="{border}"') == 2
    assert shown.count("h1v1h-1z") == 32 - expected + 32


def test_differences_are_found_scale_by_scale(studio: Studio) -> None:
    pipeline = studio.models.get("tiny")
    *_, step = pipeline.stream([0], seeds=[1])
    changed = [part.clone() for part in step.tokens]
    changed[1][0, 3] += 1
    changed[2][0, 6] += 1
    found = race.differing(step, replace(step, tokens=changed))
    assert [part.nonzero().tolist() for part in found] == [[], [[0, 3]], [[0, 6]]]
    side, same, border = race.outline(found[2][0])  # token 6 of 4 x 4: column 2 of row 1
    assert side == 4 and same.count("z") == 15 and "M2 1h1v1h-1z" not in same
    assert border == "M2 1h1M2 2h1M2 1v1M3 1v1"
    assert race.outline(torch.ones(16, dtype=torch.bool))[2].count("M") == 16  # nothing between cells that are set
    assert race.outline(torch.ones(3, dtype=torch.bool)) is None


def test_continuous_tokens_have_no_difference_in_codes() -> None:
    step = Step(index=0, total=1, tokens=torch.zeros(1, 4, 3), known=torch.ones(1, 4, dtype=torch.bool), evaluations=1)
    assert race.differing(step, step) is None and race.differing(None, step) is None


def test_videos_race_too(studio: Studio) -> None:
    comparison = race.entrants(studio, Ask(model="video", per_class=1), "frames=3 steps=2\nframes=3 steps=3")
    job = finish(submit(studio, OWNER, "race", comparison, race.summarise))
    assert job.state == "done", job.error
    assert "no codes to compare" in race.describe_difference(*comparison.runs)
    shown = entrants_html(comparison) + differences_html(comparison)
    assert shown.count("<video") == 4 and "<svg" not in shown


# ---- grids


def test_cells_are_files_that_repeat_themselves(studio: Studio) -> None:
    made = grid(studio, "guidance_scale=1,3", "seed=0,7", "temperature=0.9")
    job = finish(submit(studio, OWNER, "grid", made, cells.summarise))
    assert job.state == "done", job.error
    pipeline = studio.models.get("tiny")
    for row, seed in enumerate((0, 7)):
        for column, scale in enumerate((1, 3)):
            run = made.cell(row, column)
            for index, path in enumerate(run.files):
                alone = pipeline([1], seeds=[seed + index], guidance_scale=scale, temperature=0.9)
                assert np.array_equal(pixels(path), np.asarray(alone.images[0]))
                assert read_request(path) == run.request.row(index)
    table, picture = made.files
    rows = list(csv.DictReader(table.open()))
    assert [(row["guidance_scale"], row["seed"]) for row in rows] == [("1", "0"), ("3", "0"), ("1", "7"), ("3", "7")]
    for row, run in zip(rows, made.runs, strict=True):
        assert [table.parent / name for name in row["files"].split(";")] == run.files
        assert int(row["evaluations"]) == run.evaluations == 3
    assert picture.is_file() and studio.library.search(OWNER, "tiny")


def test_labels_lie_outside_the_pixels(studio: Studio) -> None:
    made = grid(studio, "class=ant, 2", "temperature=0.5,1", base=replace(TINY, per_class=1))
    finish(submit(studio, OWNER, "grid", made, cells.summarise))
    assert made.columns.shown == ["ant", "cat"]
    picture = pixels(made.files[1])
    tile = np.asarray(sheet(made.cell(1, 1).newest.pixels(-1)))
    height, width = tile.shape[:2]
    bottom, right = picture.shape[0] - cells.MARGIN, picture.shape[1] - cells.MARGIN
    assert np.array_equal(picture[bottom - height : bottom, right - width : right], tile)
    top = cells.FONT + 2 * cells.MARGIN  # above it the columns' labels, beside it the first row's
    assert (picture[:top] < 128).any() and (picture[top : top + cells.FONT, : cells.MARGIN + 40] < 128).any()


def test_stop_keeps_the_cells_that_are_finished(studio: Studio) -> None:
    made = grid(studio, "temperature=0.5,1,2")
    _, steps = by_hand(studio, "grid", made, cells.summarise)
    while made.runs[1].evaluations < 2:
        next(steps)
    steps.close()
    assert [run.state for run in made.runs] == ["done", "stopped", "waiting"]
    assert all(path.is_file() for path in made.runs[0].files) and not made.runs[1].files
    table, picture = made.files
    assert [row["temperature"] for row in csv.DictReader(table.open())] == ["0.5"] and picture.is_file()
    shown = grid_html(made)
    assert shown.count("gradio_api/file=") == 4 and "data:image/png" in shown and "waits" in shown


def test_a_full_disk_leaves_what_is_whole(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = Studio.write, []

    def failing(self: Studio, *given: Any) -> list[Path]:
        calls.append(given)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *given)

    monkeypatch.setattr(Studio, "write", failing)
    made = grid(studio, "temperature=0.5,1,2")
    job = finish(submit(studio, OWNER, "grid", made, cells.summarise))
    assert job.state == "failed" and "the disk is full" in (job.error or "")
    assert [run.state for run in made.runs] == ["done", "stopped", "waiting"] and made.files[0].is_file()


@pytest.mark.parametrize(
    ("columns", "rows", "fixed", "said"),
    [
        ("top_k=" + ",".join(str(i) for i in range(13)), "seed=1,2,3,4,5", "", "65 cells, the limit is 64"),
        ("seed=1,2", "seed=3", "", "both axes are seed|names seed twice"),
        ("class=1", "class=2", "", "both axes are class"),
        ("", "", "", "both axes are off"),
        ("../../etc=1", "", "", "cannot be along an axis"),
        ("seed=-1", "", "", "seed is '-1'"),
        ("seed=1.5", "", "", "cell seed 1.5: seed is '1.5'"),
        ("class=7", "", "", "class 7 is outside 0..2"),
        ("class=<b>", "", "", "unknown class"),
        ("class=", "", "", "no values"),
        ("top_k=", "", "", "axis 'top_k=' has no values"),
        ("top_k=1", "", "top_k=2", "along an axis and among the settings"),
        ("temperature=1,nan", "", "", "cell temperature nan"),
        ("top_p=1,2", "", "", "cell top_p 2: top_p is 2"),
        ("top_k=" + "1" * 3000, "", "", "the limit is 2000"),
    ],
)
def test_grids_that_cannot_be(studio: Studio, columns: str, rows: str, fixed: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        grid(studio, columns, rows, fixed)


def test_all_cells_together_have_a_limit(studio: Studio) -> None:
    made = grid(studio, "temperature=1,2,3,4,5,6,7,8", "seed=1,2,3,4", base=replace(TINY, per_class=9))
    with pytest.raises(SettingError, match="288 samples together, the limit is 256"):
        submit(studio, OWNER, "grid", made, cells.summarise)
    assert not studio.jobs.unfinished(OWNER)


# ---- the tab


def test_a_race_from_the_page_is_followed_to_its_end(studio: Studio, tab: CompareTab) -> None:
    form = ["masked", 1, 2, 5, "maskgit steps=4\nhalton steps=8"]
    tab.race.start(VISITOR, REQUEST, *form)
    views = drain(tab.race.follow(VISITOR, REQUEST))
    text, cards, order, difference, files, *_ = views[-1]
    assert "Done: 2 runs" in text and cards.count("finished") == 0 and cards.count("gradio_api/file=") == 8
    assert order.count("<tr>") == 3 and "tokens differ" in difference
    assert [Path(item["path"]).name for item in files.value] == ["race.csv"]
    again = drain(tab.race.follow(VISITOR, REQUEST))  # a page that was loaded anew
    assert again[-1][:4] == views[-1][:4]
    assert [item for view in drain(tab.race.follow(OTHER, REQUEST)) for item in view if item != gr.skip()] == []


def test_only_its_owner_stops_a_comparison(studio: Studio, tab: CompareTab) -> None:
    form = ["tiny", 1, 2, 5, "", "temperature", "0.5,1", "seed", "1,2"]
    hold = threading.Event()

    def wait(job: Job) -> Iterator[None]:
        hold.wait(30)
        yield

    before = studio.jobs.submit("visitor-0000000000000000", "test", "holds the queue", wait)
    tab.grid.start(VISITOR, REQUEST, *form)
    job = studio.jobs.latest(OWNER, "grid")
    assert job is not None and job.state == "queued"
    tab.grid.end(OTHER, REQUEST)
    tab.grid.end(["no", "token"], REQUEST)
    tab.race.end(VISITOR, REQUEST)
    assert job.state == "queued"
    assert "Stopping" in tab.grid.end(VISITOR, REQUEST) and job.state == "stopped"
    hold.set()
    finish(before)
    assert "Stopped: 0 of 4 finished" in drain(tab.grid.follow(VISITOR, REQUEST))[-1][0]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (["masked", 1, 10, 5, "maskgit\nhalton"], "samples in each run is &#x27;10&#x27;"),
        (["masked", 1, float("nan"), 5, "maskgit\nhalton"], "samples in each run"),
        (["masked", 1, 1, -1, "maskgit\nhalton"], "seed is &#x27;-1&#x27;"),
        (["masked", 99, 1, 0, "maskgit\nhalton"], "class 99 is outside"),
        (["masked", "<script>", 1, 0, "maskgit\nhalton"], "&lt;script&gt;"),
        (["../../etc/passwd", 1, 1, 0, "maskgit\nhalton"], "there is no model"),
        (["masked", 1, 1, 0, None], "2 to 8 entrants, not 0"),
        ([None, {}, [], "x", {}], "samples in each run"),
    ],
)
def test_bad_input_is_a_line_on_the_page(studio: Studio, tab: CompareTab, form: list[Any], said: str) -> None:
    with pytest.raises(gr.Error, match=said):
        tab.race.start(VISITOR, REQUEST, *form)
    assert not studio.jobs.unfinished(OWNER)


def test_names_of_classes_are_text_not_markup(studio: Studio) -> None:
    pipeline = studio.models.get("tiny")
    names = dict(pipeline.config["id2label"])
    pipeline.register_to_config(id2label=names | {"1": "<img src=x onerror=alert(1)>"})
    try:
        made = grid(studio, "class=1,2", "seed=1")
        finish(submit(studio, OWNER, "grid", made, cells.summarise))
        raced = race.entrants(studio, TINY, "temperature=1\ntemperature=0.5")
        finish(submit(studio, OWNER, "race", raced, race.summarise))
        shown = grid_html(made) + entrants_html(raced) + differences_html(raced) + order_html(raced)
    finally:
        pipeline.register_to_config(id2label=names)
    assert "onerror" in shown and "<img src=x" not in shown


def test_the_form_fits_the_model(studio: Studio, tab: CompareTab) -> None:
    for model in ("masked", "tiny", "video"):
        label, entrants, _, across, across_values, down, down_values = tab.choose_model(model)
        assert label.value in [value for _, value in label.choices]
        race.entrants(studio, tab.base(model, label.value, 1, 0), entrants)
        chosen = (across.value, across_values), (down.value, down_values)
        made = cells.cells(studio, tab.base(model, label.value, 1, 0), "", *chosen)
        assert len(made.runs) >= 3
        for name in cells.axis_names(studio.models.get(model)):
            assert name in [value for _, value in across.choices]
