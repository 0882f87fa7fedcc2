"""The Edit tab: pictures placed and painted, tokens marked, edits composited, runs gone on from."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from studio_helpers import OWNER, REQUEST, VISITOR, drain, finish, make_studio, sample
from torch import Tensor

from vgen import hub
from vgen.app import jobs, pictures
from vgen.app.branching import Branch, fork, keep_scales, keep_tokens, tree, uncertain
from vgen.app.core import Studio, owner_name
from vgen.app.edit import EditTab
from vgen.app.editing import Marks, mask_of, snap
from vgen.app.forms import copy_as
from vgen.app.generate import GenerateTab
from vgen.app.inspecting import Question, log_probabilities
from vgen.app.jobs import Job
from vgen.app.pictures import Placement, place, read_paint, read_picture, zoom_of
from vgen.media import read_request
from vgen.pipelines.clips import fingerprint
from vgen.pipelines.editing import keep_masks
from vgen.types import SettingError

SIZE, SIDE = 8, 4  # pixels and tokens of both tiny models
ZOOM = zoom_of(SIZE)
OTHER = owner_name(None, "another browser")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    studio = make_studio(tmp_path_factory.mktemp("studio"), "tiny", "masked", "video")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "KEPT_EACH", 1000)  # the runs of this module's fixtures
        yield studio
    studio.close()


@pytest.fixture(scope="module")
def tab(studio: Studio) -> EditTab:
    with gr.Blocks(), gr.Tabs(), gr.Tab("Edit"):
        visitor, current = gr.BrowserState(None), gr.BrowserState(None)
        return EditTab(studio, visitor, current)


@pytest.fixture(scope="module")
def runs(studio: Studio) -> dict[str, Job]:
    return {model: sample(studio, model) for model in ("tiny", "masked")}


def paint(*boxes: tuple[int, int, int, int], colour: int = 255) -> dict[str, Any]:
    """What an editor sends where boxes of canvas pixels (top, bottom, left, right) are painted over."""
    layer = np.zeros((SIZE * ZOOM, SIZE * ZOOM, 4), np.uint8)
    for top, bottom, left, right in boxes:
        layer[top * ZOOM : bottom * ZOOM, left * ZOOM : right * ZOOM] = (colour, 0, 0, 255)
    lying = np.full_like(layer, 255)
    return {"background": lying, "layers": [layer], "composite": lying}


def chosen(model: str, source: str | None = "run:0", upload: Any = None, **placing: Any) -> list[Any]:
    placed = {"fit": "crop", "percent": 100, "right": 0, "down": 0} | placing
    return [model, source, upload, *placed.values()]


def form(label: int = 1, seed: Any = 7, versions: Any = 2, sampler: Any = None, others: str = "") -> list[Any]:
    return [label, seed, False, versions, sampler, 1.5, others]


def edited(tab: EditTab, studio: Studio, run: Job, values: list[Any]) -> Job:
    started = tab.repaint.start(VISITOR, REQUEST, run.id, *values)
    job = studio.jobs.get(OWNER, started[0])
    assert job is not None
    return finish(job)


def files_of(job: Job) -> Tensor:
    """The pixels (B, 3, S, S) of a job's files."""
    assert job.state == "done", job.error
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in job.view.files]).permute(0, 3, 1, 2)


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, format="PNG")
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size, with no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


# ---- pictures that are handed in


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(20_000, 20_000), "the limit is 8192 a side"),
        (png_header(20_000, 1), "20000x1 pixels, the limit is 8192 a side"),
        (png_header(8000, 7000), "56 megapixels, the limit is 50"),
        (png_header(64, 64), "no picture that can be read"),
        (b"<html>", "no picture that can be read"),
        (b"", "no picture that can be read"),
        (b"%PDF-1.4 not a picture", "no picture that can be read"),
    ],
    ids=["20,000 pixels", "20,000 wide", "a bomb", "cut short", "a page", "nothing", "a document"],
)
def test_files_that_are_no_pictures_get_one_line(
    tab: EditTab, runs: dict[str, Job], tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(gr.Error, match=message) as caught:
        tab.repaint.open(VISITOR, REQUEST, None, *chosen("tiny", "upload", str(path)))
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_size_is_refused_before_any_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: Any) -> None:
        raise AssertionError("decoded")

    (path := tmp_path / "bomb.png").write_bytes(png_header(8000, 7000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(SettingError, match="megapixels"):
        read_picture(path)


def test_turned_and_transparent_pictures_are_read_as_they_are_seen(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save(tmp_path / "clear.png")
    pixels = np.asarray(read_picture(tmp_path / "clear.png"))
    assert pixels[0, 0].tolist() == [0, 0, 255] and pixels[1, 3].tolist() == [255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (2, 4)


def test_a_picture_of_the_models_size_lies_on_the_canvas_as_it_is() -> None:
    image = Image.open(io.BytesIO(png(SIZE, SIZE)))
    for fit in pictures.FITS:
        canvas = place(image, SIZE, Placement(fit=fit))
        assert np.array_equal(canvas.pixels.permute(1, 2, 0).numpy(), np.asarray(image)) and not canvas.outside.any()


def test_what_is_moved_leaves_the_rest_of_the_canvas_to_be_painted() -> None:
    image = Image.open(io.BytesIO(png(SIZE, SIZE)))
    canvas = place(image, SIZE, Placement(right=3, down=-2))
    assert np.array_equal(canvas.pixels[:, :6, 3:].permute(1, 2, 0).numpy(), np.asarray(image)[2:, :5])
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[:6, 3:] = True
    assert torch.equal(canvas.outside, ~inside)
    assert torch.equal(canvas.pixels[:, 6], canvas.pixels[:, 5])  # the edge goes on
    half = place(image, SIZE, Placement(percent=50))
    assert int((~half.outside).sum()) == 16 and not half.outside[2:6, 2:6].any()
    wide = place(Image.new("RGB", (16, 4)), SIZE, Placement(fit="pad"))
    assert int((~wide.outside).sum()) == 16 and not wide.outside[3:5].any()
    with pytest.raises(SettingError, match="beside the canvas"):
        place(image, SIZE, Placement(percent=50, right=7))


# ---- painting and marking


def test_paint_is_read_from_layers_and_back_to_exact_pixels() -> None:
    wanted = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    wanted[2:5, 1:3] = wanted[7, 7] = True
    value = paint((2, 5, 1, 3), (7, 8, 7, 8), colour=0)  # black paint is paint
    assert torch.equal(read_paint(value, SIZE), wanted)
    value["layers"][0][..., 3] //= 3  # thinner than half
    assert not read_paint(value, SIZE).any() and not read_paint(None, SIZE).any()
    value["layers"][0][5 * ZOOM + 3, 6 * ZOOM + 1, 3] = 255  # a thin stroke is not lost
    assert read_paint(value, SIZE).nonzero().tolist() == [[5, 6]]


@pytest.mark.parametrize("layer", [np.zeros((9, 9, 4), np.uint8), np.zeros((SIZE * ZOOM, SIZE * ZOOM), np.uint8)])
def test_paint_of_another_size_is_refused(layer: np.ndarray) -> None:
    with pytest.raises(SettingError, match="the painting is"):
        read_paint({"layers": [layer]}, SIZE)


def test_marks_snap_paint_to_tokens_and_clicks_win(studio: Studio, runs: dict[str, Job]) -> None:
    pipeline = studio.models.get("masked")
    painted = read_paint(paint((1, 3, 0, 1)), SIZE)  # parts of tokens 0 and 4
    assert snap(pipeline, painted, Marks()).flatten().nonzero().flatten().tolist() == [0, 4]
    marks = Marks().toggle(4, True).toggle(15, False)
    assert snap(pipeline, painted, marks).flatten().nonzero().flatten().tolist() == [0, 15]
    mask = mask_of(pipeline, painted, marks)
    assert mask.nonzero().tolist() == [[1, 0], [6, 6], [6, 7], [7, 6], [7, 7]]  # of a clicked token every pixel
    whole_token = mask_of(pipeline, painted, Marks(on=frozenset({0})))
    assert whole_token.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]


def pressed(text: str) -> list[int]:
    """Tokens that a grid shows as drawn anew."""
    buttons = text.split("data-token=")[1:]
    return [index for index, part in enumerate(buttons) if 'aria-pressed="true"' in part.split(">")[0]]


def test_the_tokens_are_shown_with_their_number_before_the_run(tab: EditTab, runs: dict[str, Job]) -> None:
    run = runs["masked"].id
    values = [*chosen("masked"), paint((0, 1, 0, 3)), Marks()]
    shown = tab.repaint.draw(VISITOR, REQUEST, run, *values)
    assert pressed(shown) == [0, 1] and "2 of 16 tokens will be drawn anew" in shown
    click = SimpleNamespace(token=1)
    shown, marks = tab.repaint.click(VISITOR, REQUEST, click, run, *values)
    assert pressed(shown) == [0] and marks == Marks(off=frozenset({1}))
    shown, marks = tab.repaint.mark_all(VISITOR, REQUEST, run, *values)
    assert pressed(shown) == list(range(16))
    shown, marks = tab.repaint.clear(VISITOR, REQUEST, run, *values[:-1], marks)
    assert pressed(shown) == [0, 1] and marks == Marks()
    shown = tab.repaint.draw(VISITOR, REQUEST, runs["tiny"].id, *chosen("tiny"), *values[-2:])
    free = sum(int((~kept).sum()) for kept in keep_masks(read_paint(values[-2], SIZE), (1, 2, 4)))
    assert f"2 of 16 tokens of the finest scale will be drawn anew, {free} of 21 over all scales" in shown
    opened = tab.repaint.open(VISITOR, REQUEST, run, *chosen("masked", percent=50))
    assert pressed(opened[1]) == [i for i in range(16) if i not in (5, 6, 9, 10)]


@pytest.mark.parametrize("token", [-1, 16, 1.5, None, "<b>", True])
def test_tokens_that_are_not_there_cannot_be_clicked(tab: EditTab, runs: dict[str, Job], token: Any) -> None:
    with pytest.raises(gr.Error, match=r"must be a whole number in 0\.\.15"):
        click = SimpleNamespace(token=token)
        tab.repaint.click(VISITOR, REQUEST, click, runs["tiny"].id, *chosen("tiny"), None, Marks())


# ---- repainting


@pytest.mark.parametrize("model", ["tiny", "masked"])
def test_an_edit_of_the_page_is_the_pipelines_edit(
    tab: EditTab, studio: Studio, runs: dict[str, Job], model: str
) -> None:
    """Shown step by step, and in its files, composited as `edit` does."""
    run, value = runs[model], paint((2, 6, 0, 5))
    job = edited(tab, studio, run, [*chosen(model, "run:1"), value, Marks(), *form(versions=2)])
    pipeline, mask = studio.models.get(model), read_paint(value, SIZE)
    original = run.view.recording.pixels(-1)[1]
    wanted = pipeline.edit(original, mask, 1, seeds=[7, 8], guidance_scale=1.5, output_type="pt").images
    assert torch.equal(files_of(job), wanted.mul(255).round().to(torch.uint8))
    recording = job.view.recording
    for index in range(len(recording)):
        kept = recording.pixels(index)[..., ~mask]
        assert torch.equal(kept, original[..., ~mask].expand_as(kept))
    assert not torch.equal(recording.pixels(0), recording.pixels(-1))


def test_an_edits_file_says_that_it_is_one(tab: EditTab, studio: Studio, runs: dict[str, Job], tmp_path: Path) -> None:
    run = runs["tiny"]
    job = edited(tab, studio, run, [*chosen("tiny"), paint((0, 4, 0, 4)), Marks(), *form(versions=1)])
    request = read_request(job.view.files[0])
    pipeline, mask = studio.models.get("tiny"), read_paint(paint((0, 4, 0, 4)), SIZE)
    hashes = (fingerprint(run.view.recording.pixels(-1)[0]), fingerprint(mask.to(torch.uint8)))
    assert (request.settings["edit"]["image"], request.settings["edit"]["mask"]) == hashes
    assert request.origin == "an edit: 25% of the pixels of an image repainted"
    with pytest.raises(SettingError, match="the image and the mask are not part of it"):
        pipeline(request.class_labels, seeds=request.seeds, **request.settings)
    assert all("image and mask are not in its files" in text for text in copy_as(pipeline, request).values())
    with gr.Blocks():
        generate = GenerateTab(studio, gr.BrowserState(None), gr.BrowserState(None))
    restored = generate.fill(request)[0]
    assert "open the image in the Edit tab" in restored and "the same pixels" not in restored
    assert "unknown here" not in restored


def test_pictures_of_the_library_and_handed_in_are_edited(
    tab: EditTab, studio: Studio, runs: dict[str, Job], tmp_path: Path
) -> None:
    path = runs["tiny"].view.files[0]
    entry = next(item for item in studio.library.search(OWNER) if item.path == path)
    (handed := tmp_path / "mine.png").write_bytes(path.read_bytes())
    mask = [paint((0, 4, 0, 8)), Marks(), *form(versions=1)]
    made = [
        files_of(edited(tab, studio, runs["tiny"], [*chosen("tiny", source, upload), *mask]))
        for source, upload in (("run:0", None), (f"file:{entry.id}", None), ("upload", str(handed)))
    ]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    listed = tab.repaint._sources(OWNER, runs["tiny"].id)
    assert ("Last run, image 1: ant, seed 0", "run:0") in listed and f"file:{entry.id}" in [item[1] for item in listed]
    fields = tab.repaint.choose(VISITOR, None, f"file:{entry.id}", REQUEST)
    assert fields[0] == "tiny" and fields[1].value == 0


def test_nobody_elses_pictures_can_be_edited(tab: EditTab, studio: Studio, runs: dict[str, Job]) -> None:
    entry = studio.library.search(OWNER)[0]
    for source in ("run:0", f"file:{entry.id}"):
        with pytest.raises(gr.Error, match="there is no such picture"):
            tab.repaint.open("another browser", REQUEST, runs["tiny"].id, *chosen("tiny", source))
    assert tab.repaint._sources(OTHER, runs["tiny"].id) == [("The picture handed in", "upload")]
    assert tab.repaint.choose("another browser", runs["tiny"].id, f"file:{entry.id}", REQUEST) == [gr.skip()] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paint": None}, "nothing is marked"),
        ({"versions": 17}, r"versions is .*17.*: it must be a whole number in 1\.\.16"),
        ({"versions": 1.5}, "versions is"),
        ({"seed": -1}, "seed is"),
        ({"label": 3}, "class is"),
        ({"label": "<img src=x onerror=alert(1)>"}, "class is"),
        ({"sampler": "maskgit"}, "unknown sampler"),
        ({"others": "top_k=-1"}, "top_k is -1"),
        ({"others": "edit=1"}, "of an edit"),
        ({"others": "guidance_scale=3"}, "has a control of its own"),
        ({"source": "file:../../etc/passwd"}, "no such picture"),
        ({"source": "run:99"}, "no such picture"),
        ({"source": "file:" + "9" * 40}, "no such picture"),
        ({"source": None}, "no such picture"),
        ({"model": "video"}, "makes videos, which cannot be repainted"),
        ({"model": "../models/tiny"}, "there is no model"),
        ({"fit": "<b>"}, "use one of crop, pad, stretch"),
        ({"percent": 100_000}, "size on the canvas"),
        ({"right": 1e9}, "move right"),
    ],
    ids=str,
)
def test_bad_edits_get_one_line_and_no_job(
    tab: EditTab, studio: Studio, runs: dict[str, Job], change: dict[str, Any], message: str
) -> None:
    before = studio.jobs.theirs(OWNER, "edit")
    placing = {name: change.pop(name) for name in ("fit", "percent", "right") if name in change}
    where = chosen(change.pop("model", "tiny"), change.pop("source", "run:0"), None, **placing)
    painted = change.pop("paint", paint((0, 4, 0, 4)))
    with pytest.raises(gr.Error, match=message):
        tab.repaint.start(VISITOR, REQUEST, runs["tiny"].id, *where, painted, Marks(), *form(**change))
    assert studio.jobs.theirs(OWNER, "edit") == before


# ---- going on from a run


def branched(tab: EditTab, studio: Studio, run: Job, way: str, amount: int, free: Any = (), **more: Any) -> Job:
    values = {"image": 2, "seed": 1, "versions": 1} | more
    marks = frozenset(free)
    started = tab.branch.start(
        VISITOR, REQUEST, None, run.id, values["image"], way, amount, marks, values["seed"], False, values["versions"]
    )
    job = studio.jobs.get(OWNER, started[0])
    assert job is not None
    return finish(job)


def tokens_of(job: Job) -> list[Tensor]:
    tokens = job.view.recording.steps[-1].tokens
    return tokens if isinstance(tokens, list) else [tokens]


def test_a_branch_with_the_runs_own_seed_is_the_run(tab: EditTab, studio: Studio, runs: dict[str, Job]) -> None:
    run = runs["tiny"]
    for step in (1, 2):
        job = branched(tab, studio, run, "step", step)  # image 2 has seed 1
        assert torch.equal(files_of(job), files_of(run)[1:])


@pytest.mark.parametrize("model", ["tiny", "masked"])
def test_a_branch_keeps_what_was_known_and_draws_the_rest_anew(
    tab: EditTab, studio: Studio, runs: dict[str, Job], model: str
) -> None:
    run = runs[model]
    step = run.view.recording.steps[1]
    job = branched(tab, studio, run, "step", 2, seed=99, versions=3)
    made, before = torch.cat(tokens_of(job), 1), torch.cat(tokens_of(run), 1)[1]
    known = step.known[1]
    assert len(made) == 3 and torch.equal(made[:, known], before[known].expand(3, -1))
    assert not torch.equal(made[:, ~known], before[~known].expand(3, -1))
    assert job.view.recording.steps[-1].total == (3 if model == "tiny" else run.view.recording.steps[-1].total - 2)


@pytest.mark.parametrize("model", ["tiny", "masked"])
def test_a_branchs_file_repeats_it(tab: EditTab, studio: Studio, runs: dict[str, Job], model: str) -> None:
    job = branched(tab, studio, runs[model], "step", 2, seed=99, versions=2)
    request = read_request(job.view.files[1])
    assert request.seeds == [100] and "branch at step 2" in request.origin and runs[model].id in request.origin
    pipeline = studio.models.get(model)
    out = pipeline(
        request.class_labels, seeds=request.seeds, sampler=request.sampler, output_type="pt", **request.settings
    )
    assert torch.equal(out.images.mul(255).round().to(torch.uint8), files_of(job)[1:])
    copies = copy_as(pipeline, request)
    assert copies["Command line"].startswith("vgen sample --from") and "known=" in copies["Python"]
    with gr.Blocks():
        generate = GenerateTab(studio, gr.BrowserState(None), gr.BrowserState(None))
    assert "'vgen sample --from' repeats it" in generate.fill(request)[0].replace("&#x27;", "'")


def test_what_is_given_does_not_count_as_the_pace_of_a_model(
    tab: EditTab, studio: Studio, runs: dict[str, Job]
) -> None:
    before = dict(studio.pace)
    branched(tab, studio, runs["tiny"], "step", 2)
    edited(tab, studio, runs["tiny"], [*chosen("tiny"), paint((0, 4, 0, 4)), Marks(), *form()])
    assert before and studio.pace == before


@pytest.mark.parametrize("step", [0, "x", None, 1.5])
def test_only_steps_that_can_be_are_looked_at(tab: EditTab, studio: Studio, runs: dict[str, Job], step: Any) -> None:
    panel, run = tab.branch.panel, runs["tiny"]
    with pytest.raises(gr.Error, match="step is"):
        panel.look(VISITOR, run.id, step, REQUEST)
    assert panel.look(VISITOR, run.id, 99, REQUEST) == panel.look(VISITOR, run.id, 3, REQUEST)
    assert panel.look("another browser", run.id, 1, REQUEST)[1] == ""


def test_a_run_is_followed_to_its_end_and_stopped(tab: EditTab, studio: Studio, runs: dict[str, Job]) -> None:
    panel = tab.repaint.panel
    started = tab.repaint.start(
        VISITOR, REQUEST, runs["tiny"].id, *chosen("tiny"), paint((0, 4, 0, 4)), Marks(), *form()
    )
    shown = drain(panel.follow(VISITOR, started[0], REQUEST))[-1]
    assert "Done: 2 in 3 evaluations" in shown[0] and "data:image/png" in shown[1] and len(shown[6].value) == 2
    assert panel.stop(VISITOR, started[0], REQUEST) == gr.skip()
    assert drain(panel.follow("another browser", started[0], REQUEST)) == [[gr.skip()] * 7]


def test_locked_scales_stay_and_the_others_are_drawn_anew(tab: EditTab, studio: Studio, runs: dict[str, Job]) -> None:
    before = [scale[1] for scale in tokens_of(runs["tiny"])]
    coarse = [scale[0] for scale in tokens_of(branched(tab, studio, runs["tiny"], "coarse", 2, seed=99))]
    fine = [scale[0] for scale in tokens_of(branched(tab, studio, runs["tiny"], "fine", 1, seed=98))]
    assert [torch.equal(a, b) for a, b in zip(coarse, before, strict=True)] == [True, True, False]
    assert torch.equal(fine[2], before[2]) and not torch.equal(torch.cat(fine[:2]), torch.cat(before[:2]))


@pytest.mark.parametrize("model", ["tiny", "masked"])
def test_locked_tokens_stay(tab: EditTab, studio: Studio, runs: dict[str, Job], model: str) -> None:
    job = branched(tab, studio, runs[model], "tokens", 1, free=[0, 1, 4, 5], seed=99, versions=4)
    made, before = tokens_of(job)[-1], tokens_of(runs[model])[-1][1]
    kept = torch.ones(16, dtype=torch.bool)
    kept[[0, 1, 4, 5]] = False
    assert torch.equal(made[:, kept], before[kept].expand(4, -1))
    assert not torch.equal(made[:, ~kept], before[~kept].expand(4, -1))


def test_a_branch_of_a_locked_run_keeps_what_was_locked(tab: EditTab, studio: Studio, runs: dict[str, Job]) -> None:
    locked = branched(tab, studio, runs["tiny"], "fine", 1, seed=98)
    again = branched(tab, studio, locked, "step", 1, image=1, seed=98)
    assert torch.equal(files_of(again), files_of(locked))


@pytest.mark.parametrize("model", ["tiny", "masked"])
def test_the_least_certain_tokens_are_those_of_least_probability(
    tab: EditTab, studio: Studio, runs: dict[str, Job], model: str
) -> None:
    def result(steps: Any) -> Any:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    recording = runs[model].view.recording
    found = result(uncertain(recording, 1, 5))
    final = tokens_of(runs[model])[-1][1]
    distribution = result(log_probabilities(recording, Question(1, others=True)))[-1]
    probability = distribution.gather(1, final[:, None])[:, 0]
    assert len(set(found)) == 5
    others = [i for i in range(16) if i not in found]
    assert float(probability[found].max()) <= float(probability[others].min())
    shown = drain(tab.branch.mark_least(VISITOR, REQUEST, None, runs[model].id, 2, "tokens", 1, frozenset(), 5))
    assert shown[-1][1] == frozenset(found) and pressed(shown[-1][0]) == sorted(found)


def test_runs_form_a_tree(tab: EditTab, studio: Studio, tmp_path: Path) -> None:
    owner = owner_name(None, "planter")
    root = sample(studio, "tiny", owner=owner)
    second = sample(studio, "tiny", owner=owner, seed=50)

    def grow(parent: Job, seed: int) -> Job:
        started = tab.branch.start("planter", REQUEST, None, parent.id, 1, "step", 1, frozenset(), seed, False, 1)
        job = studio.jobs.get(owner, started[0])
        assert job is not None
        return finish(job)

    child, other = grow(root, 60), grow(root, 61)
    grandchild = grow(child, 62)
    nodes = tree(studio, owner)
    assert [(node.job, node.depth) for node in nodes] == [
        (second, 0), (root, 0), (child, 1), (grandchild, 2), (other, 1),
    ]  # fmt: skip
    assert isinstance(child.view, Branch) and nodes[2].words == "branch at step 1 of 3: ant, seed 60"
    runs = tab.branch.list_runs("planter", REQUEST, None, None, 1, "step")[0]
    assert [value for _, value in runs.choices] == [node.job.id for node in nodes]
    assert all(OWNER not in str(choice) for choice in runs.choices) and tree(studio, OTHER) == []
    studio.jobs.forget(child)
    assert [(node.job, node.depth) for node in tree(studio, owner)] == [
        (grandchild, 0), (second, 0), (root, 0), (other, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": 3}, r"the run has 1\.\.2"),
        ({"image": "<b>"}, "is not there"),
        ({"amount": 3}, "every token of an image is known"),
        ({"amount": 4}, r"whole number in 1\.\.3"),
        ({"amount": None}, "whole number"),
        ({"way": "coarse", "amount": 3}, r"it must be 1\.\.2 of 3"),
        ({"way": "tokens"}, "no token is marked"),
        ({"way": "<script>"}, "use one of step, coarse"),
        ({"versions": 0}, "versions is"),
        ({"seed": 2**63}, "seed is"),
        ({"run": "another"}, "there is no run to go on from"),
        ({"run": None}, "there is no run to go on from"),
        ({"run": ["x"]}, "there is no run to go on from"),
    ],
    ids=str,
)
def test_bad_branches_get_one_line_and_no_job(
    tab: EditTab, studio: Studio, runs: dict[str, Job], change: dict[str, Any], message: str
) -> None:
    before = studio.jobs.theirs(OWNER, "branch")
    asked = {"run": runs["tiny"].id, "image": 1, "way": "step", "amount": 1, "free": frozenset(), "seed": 0}
    asked |= {"randomly": False, "versions": 1} | change
    with pytest.raises(gr.Error, match=message):
        tab.branch.start(VISITOR, REQUEST, None, *asked.values())
    assert studio.jobs.theirs(OWNER, "branch") == before


def test_runs_that_cannot_be_gone_on_from_say_why(tab: EditTab, studio: Studio, runs: dict[str, Job]) -> None:
    video = sample(studio, "video", settings={"frames": 2, "steps": 2})
    with pytest.raises(gr.Error, match="makes videos"):
        tab.branch.start(VISITOR, REQUEST, None, video.id, 1, "step", 1, frozenset(), 0, False, 1)
    assert video not in [node.job for node in tree(studio, OWNER)]
    smooth = sample(studio, "tiny", settings={"more_smooth": True})
    with pytest.raises(gr.Error, match="more_smooth feeds back mixtures"):
        tab.branch.start(VISITOR, REQUEST, None, smooth.id, 1, "step", 1, frozenset(), 0, False, 1)
    listed = tab.branch.list_runs(VISITOR, REQUEST, None, smooth.id, 1, "step")
    assert listed[0].value == smooth.id and "More_smooth feeds back mixtures" in listed[5]
    with pytest.raises(gr.Error, match="there is no run"):
        tab.branch.start("another browser", REQUEST, None, runs["tiny"].id, 1, "step", 1, frozenset(), 0, False, 1)
    with pytest.raises(SettingError, match="no scales to keep"):
        keep_scales(runs["masked"].view.recording, 0, 1, coarse=True)


def test_recap_goes_on_with_the_whole_evaluations_that_are_left(studio: Studio) -> None:
    run = sample(studio, "masked", settings={"steps": 6, "full_steps": 3, "partial_steps": 2})
    recording = run.view.recording
    assert fork(recording, 0, 0).settings == {"steps": 5, "full_steps": 2, "partial_steps": 2}
    assert fork(recording, 4, 0).settings == {"steps": 1, "full_steps": 0, "partial_steps": 0}
    assert keep_tokens(recording, 0, [3]).settings == {}


def test_class_names_do_not_run(studio: Studio, tab: EditTab, runs: dict[str, Job]) -> None:
    values = chosen("tiny"), paint((0, 1, 0, 1)), Marks()
    shown = tab.repaint.draw(VISITOR, REQUEST, runs["tiny"].id, *values[0], *values[1:])
    job = edited(tab, studio, runs["tiny"], [*values[0], *values[1:], *form(versions=1)])
    pipeline = job.view.recording.pipeline
    names, hostile = pipeline.config["id2label"], "<img src=x onerror=alert(1)>"
    pipeline.register_to_config(id2label={**names, "1": hostile})
    try:
        for text in (*map(str, tab.repaint.panel.view(job, True)[:2]), shown):
            assert hostile not in text
    finally:
        pipeline.register_to_config(id2label=names)


def test_the_bundled_models_are_offered(tab: EditTab) -> None:
    assert {value for _, value in tab.repaint.model.choices} >= set(hub.list_models())
