"""The studio without its page: requests from forms, runs, their steps and files, and the models it offers."""

import errno
import io
import json
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from studio_helpers import OWNER, finish, make_studio, sample
from tiny import tiny_pipeline

from vgen import batch, cli
from vgen.app import core, recording
from vgen.app.core import Studio, owner_name, stream
from vgen.app.forms import Ask, copy_as, parse_settings, setting_names, to_request
from vgen.app.parts import too_early
from vgen.app.recording import Recording
from vgen.media import read_request
from vgen.types import CheckpointError, Request, SettingError
from vgen.videos import read_video


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    made = make_studio(tmp_path, "tiny", "masked", "video")
    yield made
    made.close()


# ---- runs


def test_a_run_gives_the_files_that_the_command_line_gives(studio: Studio, tmp_path: Path) -> None:
    job = sample(studio, classes=["bee", "ant"], per_class=2, seed=5, settings={"guidance_scale": 3.0})
    assert job.state == "done" and job.error is None
    pipeline = studio.models.get("tiny")
    items = batch.plan([1, 0], 2, 5)
    done = batch.sample_to_files(pipeline, items, tmp_path / "cli", settings={"guidance_scale": 3.0})
    assert [path.read_bytes() for path in job.view.files] == [path.read_bytes() for path in done.paths]
    assert [path.name for path in job.view.files] == [path.name for path in done.paths]
    assert all(path.parent.parent == studio.library.files / OWNER for path in job.view.files)
    assert [entry.path for entry in studio.library.search(OWNER)] == job.view.files[::-1]
    assert [entry.path for entry in studio.library.search(OWNER, "bee 6")] == [job.view.files[1]]


def test_every_step_can_be_looked_at_again(studio: Studio) -> None:
    run = sample(studio, "masked", settings={"steps": 4}).view
    pipeline = studio.models.get("masked")
    steps = list(stream(pipeline, run.request))
    assert len(run.recording) == len(steps) == 4
    for index, step in enumerate(steps):
        assert torch.equal(run.recording.pixels(index), pipeline.decode(step))
        assert f"step {index + 1} of 4" in run.recording.label(index)
    assert torch.equal(run.recording.pixels(-1), pipeline.decode(steps[-1]))


def test_videos_become_films(studio: Studio) -> None:
    job = sample(studio, "video", per_class=2, settings={"frames": 4, "steps": 2})
    assert job.state == "done", job.error
    assert [path.suffix for path in job.view.files] == [".mp4", ".gif"] * 2
    assert read_request(job.view.files[1]).seeds == [0] and read_request(job.view.files[2]).seeds == [1]
    frames, _ = read_video(job.view.files[1])
    assert len(frames) == 4
    assert "evaluation" in job.view.recording.label(0) and job.view.recording.picture(0)[:4] == b"\x89PNG"


def test_a_stopped_run_keeps_its_steps_frees_its_cache_and_writes_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed, first, go = threading.Event(), threading.Event(), threading.Event()
    pipeline = studio.models.get("masked")
    original = pipeline.stream

    def watched(*args: Any, **named: Any) -> Iterator[Any]:
        steps = original(*args, **named)
        try:
            for step in steps:
                yield step
                first.set()
                assert go.wait(20)
        finally:
            steps.close()
            freed.set()

    monkeypatch.setattr(pipeline, "stream", watched)
    job = studio.sample(OWNER, Ask(model="masked", classes=[0], settings={"steps": 8}))
    assert first.wait(20)
    studio.jobs.stop(OWNER, job.id)
    go.set()
    finish(job)
    assert job.state == "stopped" and freed.is_set()
    assert 1 <= len(job.view.recording) <= 2 and job.view.files == []
    assert studio.library.search(OWNER) == []
    assert job.view.recording.picture(-1)[:4] == b"\x89PNG"


def test_mistakes_show_at_once_where_the_model_is_loaded_and_in_the_run_otherwise(studio: Studio) -> None:
    job = sample(studio, settings={"top_k": -1})
    assert job.state == "failed" and job.error == "top_k is -1: it must lie in 0..16"
    with pytest.raises(SettingError, match="top_k is -1"):
        studio.sample(OWNER, Ask(model="tiny", settings={"top_k": -1}))


def test_a_full_disk_is_one_line_and_the_studio_goes_on(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(core, "save_png", full)
        job = sample(studio)
    assert job.state == "failed" and "the disk is full" in str(job.error)
    assert studio.library.search(OWNER) == [] and len(job.view.recording) == 3  # it can still be looked at
    assert sample(studio).state == "done"


def test_memory_that_ran_out_says_what_to_do(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = studio.models.get("tiny")

    def greedy(*args: Any, **named: Any) -> Iterator[Any]:
        raise MemoryError
        yield

    monkeypatch.setattr(pipeline, "stream", greedy)
    assert "take fewer images" in str(sample(studio).error)


def test_thumbnails_are_drawn_once_for_each_checkpoint(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    found = studio.thumbnails("tiny")
    assert [name for _, name in found] == ["ant", "bee", "cat"]
    pixels = studio.models.get("tiny")([0, 1, 2], seeds=[0, 0, 0]).images
    shown = [Image.open(io.BytesIO(png)).resize((8, 8), Image.Resampling.NEAREST) for png, _ in found]
    assert [np.array(image).tolist() for image in shown] == [np.array(image).tolist() for image in pixels]
    monkeypatch.setattr(studio.jobs, "submit", lambda *args: pytest.fail("they were there"))
    assert studio.thumbnails("tiny") == found
    assert studio.thumbnails("video") == []


def test_what_a_run_will_take_follows_from_the_last_one(studio: Studio) -> None:
    assert studio.estimate("masked", "maskgit", 4) is None
    run = sample(studio, "masked", settings={"steps": 4}).view
    each = run.seconds / 2  # it made two
    assert studio.estimate("masked", "maskgit", 6) == (pytest.approx(6 * each), 4)
    assert studio.estimate("masked", "maskgit", 6, steps=8) == (pytest.approx(12 * each), 8)
    assert studio.estimate("masked", "halton", 6) is None


# ---- recordings


def test_a_recording_is_thinned_and_keeps_its_end(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = studio.models.get("masked")
    request = studio.request(Ask(model="masked", classes=[0], settings={"steps": 16}))
    steps = list(stream(pipeline, request))
    monkeypatch.setattr(recording, "MAX_BYTES", 4 * recording._size(steps[0]))
    kept = Recording(pipeline, request)
    for step in steps:
        kept.add(step)
    assert len(kept) <= 6 and kept.dropped + len(kept) == 16
    assert kept.steps[-1].index == 15
    assert [step.index for step in kept.steps] == sorted(step.index for step in kept.steps)


def test_a_first_preview_waits_for_its_share_of_the_run(studio: Studio) -> None:
    """Where the last run's pictures took a tenth of a second, the next run's first one comes after seven tenths."""
    sample(studio, per_class=2)
    studio.glances["tiny", 2] = 0.1
    job = sample(studio, per_class=2)
    assert job.view.recording.glance == 0.1 and job.began is not None  # nobody looked, so nothing newer is known
    for elapsed, early in ((0.0, True), (0.69, True), (0.71, False)):
        job.began = time.time() - elapsed
        assert too_early(job) is early
    job.view.recording.picture(-1)
    assert 0 < job.view.recording.glance != 0.1
    job.view.recording.glance = 0.0  # not known: at once
    job.began = time.time()
    assert not too_early(job)


# ---- forms


BAD_ASKS: list[tuple[dict[str, Any], str]] = [
    ({"per_class": 0}, "images per class is '0': it must be a whole number in 1..64"),
    ({"per_class": 1.5}, "images per class"),
    ({"per_class": "4"}, "images per class"),
    ({"per_class": True}, "images per class"),
    ({"per_class": float("nan")}, "images per class"),
    ({"per_class": 40}, "120 samples were asked for"),
    ({"seed": -1}, "seed is '-1'"),
    ({"seed": 1 << 63}, "seed is"),
    ({"seed": None}, "seed is 'None'"),
    ({"classes": ["dog"]}, "unknown class 'dog'"),
    ({"classes": [3]}, "class 3 is outside 0..2"),
    ({"classes": "ant"}, "classes must be a list"),
    ({"classes": [0] * 65}, "at most 64"),
    ({"classes": ["<script>alert(1)</script>"]}, "unknown class"),
    ({"sampler": "nonsense"}, "unknown sampler 'nonsense'"),
    ({"settings": {"guidance_scale": 1e9}}, "guidance_scale is"),
    ({"settings": {"temperature": float("nan")}}, "temperature is nan"),
    ({"settings": {"top_p": "all"}}, "top_p is 'all'"),
    ({"settings": {"nonsense": 1}}, "unknown setting 'nonsense'"),
    ({"settings": [1, 2]}, "settings must be an object"),
    ({"model": "../../etc"}, "there is no model '../../etc'"),
    ({"model": "/etc/passwd"}, "there is no model"),
    ({"model": "x" * 10_000}, "there is no model"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_ASKS)
def test_what_is_out_of_bounds_is_one_line(studio: Studio, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as error:
        studio.request(Ask(**{"model": "tiny"} | changes))
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("model", "sampler", "settings", "says"),
    [
        ("masked", "ancestral", {"steps": 1001}, "steps is 1001, the studio takes at most 1000"),
        ("video", None, {"frames": 257}, "frames is 257, the studio takes at most 256"),
    ],
)
def test_runs_have_bounds_of_their_own(
    studio: Studio, model: str, sampler: str | None, settings: Any, says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        studio.request(Ask(model=model, sampler=sampler, settings=settings))


def test_no_classes_are_unconditional_and_none_are_all(studio: Studio) -> None:
    assert studio.request(Ask(model="tiny", classes=[])).class_labels is None
    assert studio.request(Ask(model="tiny")).class_labels == [0, 1, 2]


def test_settings_as_text() -> None:
    assert parse_settings("full_steps=2, mask-schedule = linear\nrestart=false") == {
        "full_steps": 2,
        "mask_schedule": "linear",
        "restart": False,
    }
    for text, says in (("x", "has no value"), ("a=1\na=2", "given twice"), ("a=<b>", "neither"), ("a" * 3000, "limit")):
        with pytest.raises(SettingError, match=says):
            parse_settings(text)


def test_a_sampler_is_offered_what_it_reads(studio: Studio) -> None:
    pipeline = studio.models.get("masked")
    assert "choice_temperature" in setting_names(pipeline, "maskgit")
    assert "choice_temperature" not in setting_names(pipeline, "halton")
    assert set(setting_names(pipeline, "first-hitting")) >= {"noise_schedule", "steps", "guidance_scale"}


@pytest.mark.parametrize(
    ("model", "ask"),
    [
        ("tiny", {"classes": [2, 0], "per_class": 2, "seed": 9, "settings": {"top_k": 3, "more_smooth": True}}),
        ("masked", {"classes": [], "sampler": "halton", "settings": {"steps": 4, "mask_schedule": "linear"}}),
        ("tiny", {"classes": [1], "settings": {"guidance_scale": 1.0}}),
        ("tiny", {"classes": [1], "settings": {"guidance_scale": 6.0, "guidance_schedule": [1, 0.25, 0]}}),
    ],
)
def test_the_copied_commands_make_the_same_images(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, model: str, ask: Any
) -> None:
    run = sample(studio, model, **ask).view
    copies = copy_as(studio.models.get(model), run.request)
    monkeypatch.chdir(studio.models.folder or tmp_path)  # where the model's name is a folder
    words = shlex.split(copies["Command line"])
    assert words[0] == "vgen" and cli.main(words[1:]) == 0
    made = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [np.array(Image.open(path)).tolist() for path in made] == [
        np.array(Image.open(path)).tolist() for path in run.files
    ]
    scope: dict[str, Any] = {}
    exec(copies["Python"].replace(f"out.{'images'}", ""), scope)
    assert [np.array(image).tolist() for image in scope["out"].images] == [
        np.array(Image.open(path)).tolist() for path in run.files
    ]
    body = shlex.split(copies["curl"].splitlines()[0])
    data = json.loads(body[body.index("-d") + 1])["data"]
    names = ("model", "classes", "per_class", "seed", "sampler", "settings")
    again = dict(zip(names, data, strict=True))
    again["classes"] = again["classes"] or []
    assert studio.request(Ask(**again)) == run.request


def test_a_request_that_no_command_makes_points_to_its_file(studio: Studio) -> None:
    pipeline = studio.models.get("tiny")
    request = pipeline.request([0, 1], [7, 3], None, {})
    assert "--from" in copy_as(pipeline, request)["Command line"]
    assert to_request(pipeline, Ask(model="tiny", classes=[0], seed=3)).seeds == [3]


# ---- models


def test_models_are_loaded_once_and_the_oldest_gives_way(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgen.app.shelf.HELD", 2)
    one = studio.models.get("tiny")
    assert studio.models.get("tiny") is one
    studio.models.get("masked")
    studio.models.get("tiny")
    studio.models.get("video")
    assert studio.models.loaded() == ["tiny", "video"]
    assert studio.models.unload("tiny") and not studio.models.unload("tiny")


def test_a_models_path_is_in_no_file(studio: Studio) -> None:
    run = sample(studio).view
    assert read_request(run.files[0]).model == "tiny"
    assert str(studio.folder.parent) not in run.files[0].read_bytes().decode("latin-1")


def test_a_damaged_model_is_one_line(studio: Studio, tmp_path: Path) -> None:
    weights = next((tmp_path / "models" / "tiny" / "generator").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        studio.models.get("tiny")
    assert sample(studio).state == "failed"
    assert sample(studio, "masked").state == "done"


def test_a_device_that_is_not_there_shows_before_the_page_does(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="no GPU is visible"):
            Studio(tmp_path / "out", device="cuda")
    with pytest.raises(SettingError, match="there is no folder"):
        Studio(tmp_path / "out", models=tmp_path / "missing")


# ---- owners


def test_owners_are_told_apart_and_their_names_tell_nothing() -> None:
    names = {owner_name(None, "a"), owner_name(None, "b"), owner_name("a", "b"), owner_name("b", "b")}
    assert len(names) == 4 and not any(part == "a" or part == "b" for name in names for part in name.split("-"))
    assert owner_name("a", "x") == owner_name("a", "y")  # a login is the same person in every browser


def test_an_owner_is_no_path(studio: Studio) -> None:
    for owner in ("../x", "a/b", "", ".", "visitor-XYZ"):
        with pytest.raises(ValueError, match="no owner's name"):
            studio.owner_folder(owner)


def test_requests_survive_their_way_through_files(studio: Studio) -> None:
    run = sample(studio, per_class=1, seed=4).view
    assert read_request(run.files[0]) == run.request.row(0)
    assert Request.from_json(run.request.to_json()) == run.request
    assert tiny_pipeline().resolve_sampler(None) == run.request.sampler
