"""The command line with a video model: files in four formats, repeats from each of them, clips to go on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tiny_video import clips, tiny_far, tiny_pipeline

import vgen
from vgen import cli
from vgen.batch import VideoFiles
from vgen.media import read_request
from vgen.types import SettingError
from vgen.videos import open_video, read_video, save_video, video_sheet

DEFAULTS = {"frames": 4, "steps": 2}
CLIP = clips(1, 3)[0].movedim(1, -1).numpy()  # (F, S, S, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "video"
    tiny_pipeline(settings=DEFAULTS).save_pretrained(folder)
    return str(folder)


class Result(NamedTuple):
    code: int
    out: list[str]
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`vgen sample` in an empty folder; gives its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Result:
        code = cli.main(["sample", *map(str, arguments)])
        found = capsys.readouterr()
        return Result(code, found.out.splitlines(), found.err)

    return command


def made(result: Result) -> list[Path]:
    assert result.code == 0, result.err
    return [Path(line) for line in result.out]


def frames(path: Path) -> np.ndarray:
    return read_video(path)[0]


def direct(model: str, **named: Any) -> np.ndarray:
    """Frames (B, F, S, S, 3) uint8 of the pipeline itself."""
    found = vgen.load(model)(output_type="pil", **named).frames
    return np.stack([np.stack([np.asarray(frame) for frame in video]) for video in found])


# ---- formats


def test_a_video_becomes_four_files_each_of_which_repeats_it(run: Run, model: str) -> None:
    paths = made(run(model, "--seed", 7, "--frames", 5, "--fps", 20))
    assert [str(path) for path in paths] == [f"samples/000000_cnone_s7{end}" for end in (".mp4", ".gif", "", ".npz")]
    film, gif, folder, exact = paths
    wanted = direct(model, seeds=[7], frames=5)[0]
    assert wanted.std() > 5
    for path in (gif, folder, exact):
        assert np.array_equal(frames(path), wanted), path
    assert frames(film).shape == (5, 16, 16, 3)  # enlarged to what players show
    assert np.abs(frames(film)[:, ::2, ::2].astype(int) - wanted).mean() < 12  # lossy
    assert [open_video(path).fps for path in paths] == [20, 20, None, 20]
    requests = [read_request(path) for path in paths]
    assert all(request == requests[0] for request in requests)
    assert requests[0].seeds == [7] and requests[0].class_labels is None
    settings = requests[0].settings
    assert (settings["frames"], settings["steps"]) == (5, 2) and "context" not in settings
    assert all(read_request(path) == requests[0] for path in folder.iterdir())
    for number, path in enumerate(paths):
        (again,) = made(run("--from", path, "--format", "npz", "--out", f"again{number}"))
        assert np.array_equal(frames(again), wanted) and read_request(again) == requests[0]


def test_flags_override_the_request_of_a_video(run: Run, model: str) -> None:
    (first,) = made(run(model, "--seed", 3, "--format", "npz"))
    (longer,) = made(run("--from", first, "--frames", 6, "--format", "npz", "--out", "longer"))
    assert frames(first).shape[0] == 4 and np.array_equal(frames(longer)[:4], frames(first))
    (other,) = made(run("--from", first, "--seed", 9, "--format", "npz", "--out", "other"))
    assert np.array_equal(frames(other), direct(model, seeds=[9])[0])
    assert not np.array_equal(frames(other), frames(first))


def test_formats_are_chosen_and_written_once(run: Run, model: str) -> None:
    assert frames(made(run(model, "--format", "gif", "--fps", 0.01, "--out", "slow"))[0]).shape[0] == 4
    paths = made(run(model, "--format", "NPZ, png,npz", "--fps", 1000))  # a GIF could not be as fast
    assert [str(path) for path in paths] == ["samples/000000_cnone_s0.npz", "samples/000000_cnone_s0"]
    names = sorted(path.name for path in Path("samples").iterdir())
    assert names == ["000000_cnone_s0", "000000_cnone_s0.npz", "manifest.jsonl", "run.json"]


def test_files_say_what_they_cannot_be() -> None:
    assert (VideoFiles().formats, VideoFiles().fps) == (("mp4", "gif", "png", "npz"), 10)
    assert VideoFiles(fps=50).fps == 50 and VideoFiles(formats=["mp4"], fps=1000).fps == 1000
    for given, says in (
        ({"fps": 0.001}, "fps is 0.001: it must be at least 0.01"),
        ({"fps": float("inf")}, "fps is inf: it must be at least 0.01, and a GIF shows at most 50$"),
        ({"fps": 51}, "a GIF shows at most 50; leave gif out of the formats"),
        ({"fps": 1001, "formats": ["png", "npz"]}, "there are at most 1000$"),
        ({"formats": []}, "no format was named"),
    ):
        with pytest.raises(SettingError, match=says):
            VideoFiles(**given)


# ---- many videos


def test_a_row_of_a_batch_equals_its_solo_run(run: Run, tmp_path: Path) -> None:
    names = {0: "walk", 1: "run", 2: "jump"}
    tiny_pipeline(tiny_far(num_classes=3), id2label=names, settings=DEFAULTS).save_pretrained(tmp_path / "model")
    arguments = ["--classes", "walk,2", "--per-class", 2, "--seed", 3, "--format", "npz", "--batch-size", 3]
    paths = made(run("model", *arguments, "--guidance-scale", 2, "--sheet"))
    assert [path.stem for path in paths] == [f"00000{i}_c000{label}_s{3 + i}" for i, label in enumerate((0, 0, 2, 2))]
    for path, label, seed in zip(paths, (0, 0, 2, 2), (3, 4, 5, 6), strict=True):
        request = read_request(path)
        assert (request.class_labels, request.seeds) == ([label], [seed])
        alone = direct("model", class_labels=[label], seeds=[seed], guidance_scale=2.0)[0]
        assert np.abs(frames(path).astype(int) - alone).max() <= 1  # matrices of other sizes round differently
    assert len({frames(path).tobytes() for path in paths}) == 4
    sheet = np.array(Image.open("samples/sheet.png"))
    assert np.array_equal(sheet, np.array(video_sheet([frames(path) for path in paths])))


# ---- clips to go on from


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    save_video(CLIP, tmp_path / "clip.npz", 10)
    return tmp_path / "clip.npz"


@pytest.mark.parametrize("given", [None, 2])
def test_a_clip_is_continued_and_asked_for_again(run: Run, model: str, clip: Path, given: int | None) -> None:
    flags = [] if given is None else ["--context-frames", given]
    (path,) = made(run(model, "--context", clip, *flags, "--format", "npz"))
    assert np.array_equal(frames(path), direct(model, seeds=[0], context=CLIP[:given])[0])
    settings = read_request(path).settings
    assert settings["context_frames"] == (given or 3) and settings["context"].startswith("sha256:")
    refused = run("--from", path, "--format", "npz", "--out", "again")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and not Path("again").exists()
    assert "continues a clip that is not part of it" in refused.err and "--context" in refused.err
    (again,) = made(run("--from", path, "--context", clip, "--format", "npz", "--out", "again"))
    assert np.array_equal(frames(again), frames(path)) and read_request(again) == read_request(path)
    save_video(255 - CLIP, clip, 10)
    (other,) = made(run("--from", path, "--context", clip, "--format", "npz", "--out", "other"))
    assert not np.array_equal(frames(other), frames(path))


def test_no_frames_of_a_clip_are_no_clip(run: Run, model: str, clip: Path) -> None:
    (path,) = made(run(model, "--context", clip, "--context-frames", 0, "--format", "npz"))
    assert np.array_equal(frames(path), direct(model, seeds=[0])[0])
    assert "context" not in read_request(path).settings
    (again,) = made(run("--from", path, "--format", "npz", "--out", "again"))
    assert np.array_equal(frames(again), frames(path))


def test_a_models_own_clips_need_not_be_given(run: Run, tmp_path: Path) -> None:
    tiny_pipeline(settings=DEFAULTS | {"context_frames": 2}).save_pretrained(tmp_path / "model")
    own = clips(3, 2, seed=5)
    np.savez(tmp_path / "model" / "context.npz", own.movedim(2, -1).numpy())
    (path,) = made(run("model", "--seed", 4, "--format", "npz"))
    assert np.array_equal(frames(path), direct("model", seeds=[4], context=own[1], context_frames=2)[0])
    (again,) = made(run("--from", path, "--format", "npz", "--out", "again"))
    assert np.array_equal(frames(again), frames(path)) and "context" not in read_request(path).settings


# ---- mistakes


def test_mistakes_are_one_line_that_names_them(run: Run, model: str, saved: Path, clip: Path) -> None:
    Path("notes.txt").write_text("no video")
    Path("broken.npz").write_bytes(b"PK")
    before = sorted(Path().iterdir())
    image = str(saved)
    for arguments, code, says in (
        ([model, "--fps", 0], 2, "fps is 0: it must be at least 0.01"),
        ([model, "--fps", "nan"], 2, "fps is nan"),
        ([model, "--fps", 60], 2, "fps is 60: it must be at least 0.01, and a GIF shows at most 50; leave gif out"),
        ([model, "--format", "mp4", "--fps", 2000], 2, "0.01, and there are at most 1000"),
        ([model, "--format", "npz,webm"], 2, "unknown format 'webm': use one or more of mp4, gif, png, npz"),
        ([model, "--format", ","], 2, "no format was named"),
        ([model, "--frames", 0], 2, "frames is 0: it must lie in 1.."),
        ([model, "--context", clip, "--frames", 3], 2, "frames is 3, of which 3 are given"),
        ([model, "--context", clip, "--context-frames", 5, "--frames", 9], 2, "but the clip has 3 frames"),
        ([model, "--context", clip, "--context-frames", -1], 2, "context_frames is -1: it must lie in 0.."),
        ([model, "--context-frames", 2], 2, "this model has no clips of its own"),
        ([model, "--context", "notes.txt"], 2, "notes.txt is no video"),
        ([model, "--context", "broken.npz"], 2, "cannot read the video broken.npz"),
        ([model, "--context", "none.mp4"], 1, "no such file: none.mp4"),
        (["--from", "none.mp4"], 1, "no such file: none.mp4"),
        (["--from", clip], 2, "carries no vgen request"),
        ([image, "--format", "mp4"], 2, "unknown format 'mp4': use one or more of png, npz, webdataset"),
        ([image, "--fps", 5], 2, "makes images, which have no frames per second: leave out --fps"),
        ([image, "--context", clip], 2, "makes images, which continue no clip: leave out --context"),
        ([image, "--frames", 4], 2, "unknown setting 'frames'"),
        ([model, "--top-k", 4], 2, "unknown setting 'top_k'"),
    ):
        found = run(*arguments)
        assert found.code == code and found.out == [], (arguments, found)
        assert len(found.err.splitlines()) == 1 and says in found.err, (arguments, found.err)
    assert sorted(Path().iterdir()) == before


def test_a_request_of_an_image_takes_no_flags_of_videos(run: Run, saved: Path, clip: Path) -> None:
    (path,) = made(run(saved, "--classes", 0))
    for flags in (["--fps", 5], ["--context", clip]):
        found = run("--from", path, *flags)
        assert found.code == 2 and "makes images" in found.err and len(found.err.splitlines()) == 1
