"""Clips to train on: the law of moving digits, and that a clip follows from its number alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from tiny import pattern, write_mnist
from torch import Tensor

from vgen.moving import MovingDigits, VideoFolder, bounce, luma
from vgen.types import SettingError
from vgen.videos import save_video


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST files whose digits have no black pixel, so that they can be found again on black."""
    return write_mnist(tmp_path_factory.mktemp("data"), "MNIST", train=40, test=20)


def flat_digits(root: Path) -> Path:
    """MNIST files with 0 as a dark square and 1 as a bright one."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.array([100, 200], dtype=np.uint8), 28 * 28)
    for prefix in ("train", "t10k"):
        sizes = np.array([0x803, 2, 28, 28], dtype=">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(sizes + pixels.tobytes())
        labels = np.array([0x801, 2], dtype=">i4").tobytes() + bytes([0, 1])
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return root


def corners(clip: Tensor) -> np.ndarray:
    """Where the digit's top left corner is in each frame (F, 1, S, S), having checked that all of it is there."""
    found = []
    for frame in clip[:, 0].numpy():
        rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
        assert len(rows) == len(columns) == 28 and frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        found.append((rows[0], columns[0]))
    return np.array(found).astype(np.int64)


# ---- what is drawn


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_clip_shows_one_whole_digit_of_its_label_on_black(root: Path, split: str) -> None:
    clips, labels = MovingDigits(root, split, frames=6).clips(range(20))
    assert clips.shape == (20, 6, 1, 64, 64) and clips.dtype == torch.uint8
    assert labels.shape == (20, 1) and len(set(labels.flatten().tolist())) > 4
    for clip, label in zip(clips, labels, strict=True):
        pictures = [pattern(int(label), jitter, 28) for jitter in range(2)]
        shown = [frame[0, y : y + 28, x : x + 28] for frame, (y, x) in zip(clip.numpy(), corners(clip), strict=True)]
        assert any(all(np.array_equal(picture, part) for part in shown) for picture in pictures)


def test_the_brighter_digit_shows_where_two_overlap(tmp_path: Path) -> None:
    clips, labels = MovingDigits(flat_digits(tmp_path), "train", size=40, digits=2).clips(range(30))
    mixed = clips[labels.sum(1) == 1].numpy()
    assert len(mixed) > 5 and set(np.unique(mixed)) == {0, 100, 200}
    assert ((mixed == 200).sum((-1, -2)) == 28 * 28).all()  # never hidden, and nothing adds up
    dark = (mixed == 100).sum((-1, -2))
    assert dark.min() < 28 * 28 and dark.max() <= 28 * 28


def test_the_number_of_digits_may_vary(root: Path) -> None:
    _, labels = MovingDigits(root, "train", digits=(1, 3), frames=1).clips(range(200))
    shown = (labels >= 0).sum(1)
    assert labels.shape == (200, 3) and set(shown.tolist()) == {1, 3}
    assert stats.binomtest(int((shown == 1).sum()), 200).pvalue > 1e-4
    assert (labels[shown == 1][:, 1:] == -1).all()


def test_digits_are_drawn_evenly_and_with_replacement(root: Path) -> None:
    _, labels = MovingDigits(root, "train", digits=2, frames=1).clips(range(1000))
    assert stats.chisquare(np.bincount(labels.flatten(), minlength=10)).pvalue > 1e-4
    twins = int((labels[:, 0] == labels[:, 1]).sum())
    assert stats.binomtest(twins, 1000, 0.1).pvalue > 1e-4


# ---- how it moves


def test_bouncing_is_the_published_rule() -> None:
    """Written out for one coordinate, as OpenSTL has it."""
    rng = np.random.default_rng(0)
    starts, velocities = rng.random((50, 2)), rng.uniform(-0.3, 0.3, (50, 2))
    paths = [bounce(start, velocity, 1.0, 30) for start, velocity in zip(starts, velocities, strict=True)]
    for path, start, velocity in zip(paths, starts, velocities, strict=True):
        for axis in range(2):
            x, v = start[axis], velocity[axis]
            for position in path[:, axis]:
                x += v
                if x <= 0:
                    x, v = 0.0, -v
                if x >= 1.0:
                    x, v = 1.0, -v
                assert position == x
    assert np.mean(paths) == pytest.approx(0.5, abs=0.1) and np.max(paths) == 1 and np.min(paths) == 0


def test_a_digit_steps_a_tenth_of_the_way_in_any_direction(root: Path) -> None:
    """Measured on a canvas so wide that whole pixels do not matter: 40 of 400 pixels per frame."""
    source = MovingDigits(root, "train", size=428, frames=2)
    paths = np.stack([corners(source.clips([i])[0][0]) for i in range(300)])
    free = ((paths > 0) & (paths < 400)).all((1, 2))
    steps = (paths[:, 1] - paths[:, 0])[free]
    assert np.linalg.norm(steps, axis=1) == pytest.approx(40, abs=1.5)
    octants = np.floor(np.arctan2(steps[:, 0], steps[:, 1]) / (np.pi / 4)).astype(int) + 4
    assert stats.chisquare(np.bincount(octants.clip(0, 7), minlength=8)).pvalue > 1e-4
    assert stats.kstest(paths[free].reshape(-1, 2)[:, 0] / 400, "uniform").pvalue > 1e-6


def test_positions_are_rounded_down_and_stay_on_the_canvas(root: Path) -> None:
    clips, _ = MovingDigits(root, "train", frames=40).clips(range(40))
    paths = np.concatenate([corners(clip) for clip in clips])
    assert paths.min() == 0 and paths.max() == 36
    clips, _ = MovingDigits(root, "train", size=30, frames=1, speed=0).clips(range(100))
    assert {int(side) for clip in clips for side in corners(clip).flatten()} == {0, 1}  # 2 at the wall itself


@pytest.mark.parametrize(("directions", "ways"), [(4, 4), (8, 8)])
def test_directions_move_by_whole_pixels(root: Path, directions: int, ways: int) -> None:
    source = MovingDigits(root, "train", size=128, frames=8, speed=(3, 5), directions=directions)
    seen = set()
    for i in range(120):
        path = corners(source.clips([i])[0][0])
        steps = np.diff(path, axis=0)[((path[1:] % 100 > 0) & (path[:-1] % 100 > 0)).all(1)]
        for dy, dx in steps:
            seen.add((int(dy), int(dx)))
    speeds = {max(abs(dy), abs(dx)) for dy, dx in seen}
    assert speeds == {3, 4, 5}
    assert all(dy == 0 or dx == 0 or abs(dy) == abs(dx) for dy, dx in seen)
    assert len({(int(np.sign(dy)), int(np.sign(dx))) for dy, dx in seen}) == ways


def test_speeds_are_pixels_per_frame(root: Path) -> None:
    still, _ = MovingDigits(root, "train", speed=0, frames=5).clips(range(5))
    assert all(torch.equal(clip, clip[:1].expand_as(clip)) for clip in still)
    source = MovingDigits(root, "train", size=428, frames=2, speed=(10, 30))
    paths = np.stack([corners(source.clips([i])[0][0]) for i in range(100)])
    free = ((paths > 0) & (paths < 400)).all((1, 2))
    lengths = np.linalg.norm(paths[free, 1] - paths[free, 0], axis=1)
    assert stats.kstest((lengths - 10) / 20, "uniform").pvalue > 1e-4


# ---- what a clip depends on


@pytest.mark.parametrize("options", [{}, {"digits": (1, 2)}, {"speed": 4, "directions": 8}])
def test_a_clip_follows_from_its_number_alone(root: Path, options: dict[str, Any]) -> None:
    source = MovingDigits(root, "train", frames=4, **options)
    clips, labels = source.clips([7, 123_456_789, 3])
    for place, index in enumerate([7, 123_456_789, 3]):
        alone, label = MovingDigits(root, "train", frames=4, **options).clips([index])
        assert torch.equal(alone[0], clips[place]) and torch.equal(label[0], labels[place])
    assert not torch.equal(clips[0], clips[2])


def test_a_longer_clip_begins_with_the_shorter_one(root: Path) -> None:
    short, labels = MovingDigits(root, "train", digits=2, frames=5).clips(range(6))
    long, same = MovingDigits(root, "train", digits=2, frames=25).clips(range(6))
    assert torch.equal(long[:, :5], short) and torch.equal(labels, same)


def test_the_seed_gives_other_clips(root: Path) -> None:
    source = MovingDigits(root, "train", frames=3, seed=5)
    assert torch.equal(source.clips([1])[0], source.clips([1], seed=5)[0])
    assert not torch.equal(source.clips([1])[0], source.clips([1], seed=6)[0])
    other = MovingDigits(root, "test", frames=3, seed=5)
    assert not np.array_equal(corners(other.clips([1])[0][0]), corners(source.clips([1])[0][0]))  # nor do they repeat
    assert len(source) == 10_000 and source.class_names == [str(i) for i in range(10)]


def test_the_fingerprint_follows_the_law(root: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"size": 65}, {"digits": 2}, {"frames": 3}, {"speed": 4}, {"seed": 1}]
    changes += [{"speed": 4, "directions": 8}]
    prints = [MovingDigits(root, "train", **change).fingerprint() for change in changes]
    prints.append(MovingDigits(root, "test").fingerprint())
    assert len(set(prints)) == len(prints)
    assert MovingDigits(root, "train").fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 28}, "size is 28"),
        ({"frames": 0}, "frames is 0"),
        ({"digits": 0}, "digits is"),
        ({"digits": ()}, "digits is"),
        ({"speed": -1}, "speed is"),
        ({"speed": (4, 2)}, "smaller bound first"),
        ({"speed": float("nan")}, "speed is"),
        ({"directions": 5}, "directions is 5"),
        ({"directions": 8}, "whole pixels"),
        ({"split": "valid"}, "split is 'valid'"),
    ],
)
def test_settings_out_of_bounds_are_named(root: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        MovingDigits(root, **({"split": "train"} | options))


def test_no_clips_are_no_batch(root: Path) -> None:
    with pytest.raises(SettingError, match="at least one index"):
        MovingDigits(root, "train").clips([])


# ---- folders of videos


def levels(number: int, frames: int = 12, height: int = 32, width: int = 32) -> np.ndarray:
    """Frame i of video n has the brightness 10 * n + 8 * i, but for a white line at the left."""
    grey = (10 * number + 8 * np.arange(frames)).astype(np.uint8)
    made = np.broadcast_to(grey[:, None, None, None], (frames, height, width, 3)).copy()
    made[:, :, :2] = 255
    return made


def write_videos(root: Path, suffix: str, number: int, folder: str = "") -> None:
    for i in range(number):
        save_video(levels(i), root / folder / f"{i:03d}{suffix}", 10)


def shown(clip: Tensor) -> list[int]:
    """Brightness of each frame (F, C, S, S)."""
    return clip[:, 0, 16, 16].tolist()


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ""])
def test_clips_are_pieces_of_their_videos(tmp_path: Path, suffix: str) -> None:
    write_videos(tmp_path, suffix, 3)
    source = VideoFolder(tmp_path, "train", size=32, frames=4, stride=2)
    clips, labels = source.clips([0, 1, 2, 4])
    assert clips.shape == (4, 4, 3, 32, 32) and clips.dtype == torch.uint8 and labels.tolist() == [[0]] * 4
    assert len(source) == 3 and source.class_names == ["video"]
    for clip, number in zip(clips, [0, 1, 2, 1], strict=True):
        assert np.abs(np.array(shown(clip)) - levels(number)[:8:2, 0, 9, 0]).max() <= 3
    starts = set()
    for index in range(40):
        values = np.array(shown(source.clips([index], seed=7)[0][0]))
        start = round((values[0] - 10 * (index % 3)) / 8)
        assert np.abs(values - levels(index % 3)[start::2][:4, 0, 9, 0]).max() <= 3
        starts.add(start)
    assert starts == set(range(6))  # 12 frames hold six clips of seven


def test_a_clip_of_a_folder_follows_from_its_number_and_seed(tmp_path: Path) -> None:
    save_video(levels(0, width=64), tmp_path / "0.gif", 10)
    save_video(levels(1, height=48), tmp_path / "1.gif", 10)
    source = VideoFolder(tmp_path, "train", size=16, frames=3)
    clips, _ = source.clips([5, 2, 9], seed=1)
    for place, index in enumerate([5, 2, 9]):
        assert torch.equal(VideoFolder(tmp_path, "train", size=16, frames=3).clips([index], seed=1)[0][0], clips[place])
    assert len({source.clips([0], seed=seed)[0].numpy().tobytes() for seed in range(8)}) > 4
    assert len({source.clips([0, 2, 4, 6], seed=0)[0][i].numpy().tobytes() for i in range(4)}) > 2  # every epoch anew
    line = [bool((clip[0, 0, :, 0] > 200).all()) for clip in source.clips([0] * 4 + [2, 4, 6, 8], seed=3)[0]]
    assert not all(line)  # crops move


def test_class_folders_are_labelled_by_sorted_names(tmp_path: Path) -> None:
    write_videos(tmp_path, ".gif", 2, "walk")
    write_videos(tmp_path, "", 1, "jump")
    write_videos(tmp_path, ".gif", 1, "run")
    Image.new("L", (8, 8)).save(tmp_path / "run" / "thumbnail.png")  # does not make a video of the folder
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "run" / ".000.gif").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    source = VideoFolder(tmp_path, "test", size=32, frames=2)
    assert source.class_names == ["jump", "run", "walk"] and source.labels.tolist() == [0, 1, 2, 2]
    assert [path.name for path in source.paths] == ["000", "000.gif", "000.gif", "001.gif"]
    assert source.clips([3, 0])[1].tolist() == [[2], [0]]


def test_every_twentieth_video_is_held_out(tmp_path: Path) -> None:
    for i in range(41):
        (tmp_path / f"{i:03d}.gif").write_bytes(b"")
    train, test = VideoFolder(tmp_path, "train"), VideoFolder(tmp_path, "test")
    assert [path.name for path in test.paths] == ["019.gif", "039.gif"]
    assert len(train) == 39 and not set(train.paths) & set(test.paths)


def test_grey_clips_are_luma(tmp_path: Path) -> None:
    colour = np.zeros((2, 8, 8, 3), np.uint8)
    colour[..., 0], colour[..., 1], colour[..., 2] = 200, 100, 50
    save_video(colour, tmp_path / "0.gif", 10)
    clips, _ = VideoFolder(tmp_path, "train", size=8, frames=2, channels=1).clips([0])
    assert clips.shape == (1, 2, 1, 8, 8) and set(clips.flatten().tolist()) == {124}  # 59.8 + 58.7 + 5.7
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(luma(every), every[:1])


def test_hidden_frames_do_not_shorten_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that counts more frames than there are: the clip is then taken from the start."""
    write_videos(tmp_path, ".gif", 1)
    source = VideoFolder(tmp_path, "train", size=32, frames=10)
    monkeypatch.setattr(source, "_length", lambda path: 16)
    assert all(source.clips([i], seed=0)[0].shape[1] == 10 for i in range(8))


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    write_videos(tmp_path, "", 2)
    first = VideoFolder(tmp_path, "train").fingerprint()
    assert VideoFolder(tmp_path, "train").fingerprint() == first
    assert VideoFolder(tmp_path, "train", size=32).fingerprint() != first
    Image.new("L", (32, 32)).save(tmp_path / "001" / "000011.png")
    assert VideoFolder(tmp_path, "train").fingerprint() != first


def test_videos_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_videos(tmp_path, ".gif", 1)
    with pytest.raises(SettingError, match=r"000\.gif has 12 frames, a clip needs 13: remove it"):
        VideoFolder(tmp_path, "train", frames=7, stride=2).clips([0])
    (tmp_path / "000.gif").write_bytes(b"GIF89a")
    with pytest.raises(SettingError, match=r"000\.gif"):
        VideoFolder(tmp_path, "train").clips([0])
    with pytest.raises(SettingError, match="at least one index"):
        VideoFolder(tmp_path, "train").clips([])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "valid"}, "split is 'valid'"),
        ({"size": 0}, "size is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"channels": 2}, "channels is 2"),
        ({}, "no videos in"),
    ],
)
def test_a_folder_that_cannot_be_opened_says_why(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        VideoFolder(tmp_path, **({"split": "train"} | options))


def test_other_places_hold_no_videos(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no folder .*nowhere"):
        VideoFolder(tmp_path / "nowhere", "train")
    write_videos(tmp_path, ".gif", 1)
    write_videos(tmp_path, ".gif", 1, "class")
    with pytest.raises(SettingError, match=r"both videos such as 000\.gif and class folders such as class"):
        VideoFolder(tmp_path, "train")
