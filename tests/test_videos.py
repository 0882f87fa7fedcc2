"""Video files: what is written plays and reads back, what others wrote is read within bounds."""

import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from test_media import random_request

from vgen import ffmpeg, videos
from vgen.media import read_request
from vgen.types import Request, SettingError
from vgen.videos import mp4_frames, open_video, read_video, save_video, video_sheet

SUFFIXES = [".mp4", ".gif", ".npz", ""]


def clip(frames: int = 6, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """A bright bar that moves over a quiet background, (F, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    made = np.broadcast_to(rng.integers(0, 60, 3, dtype=np.uint8), (frames, height, width, 3)).copy()
    for number, frame in enumerate(made):
        frame[:, number * 3 % width : number * 3 % width + 5] = [220, 120, 40]
    return made


def moving_grey(frames: int = 8, side: int = 32) -> np.ndarray:
    """Frame i is grey, of brightness 20 * i + 30: each one can be told from the others after compression."""
    levels = np.arange(frames, dtype=np.uint8) * 20 + 30
    return np.broadcast_to(levels[:, None, None, None], (frames, side, side, 3)).copy()


def film(path: Path, frames: np.ndarray, *options: str, fps: float = 10) -> Path:
    """A film as some other program might write it."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", size, "-r", str(fps), "-i", "-", *options, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path


def description(path: Path) -> str:
    """What ffmpeg says of a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def box_names(path: Path) -> list[bytes]:
    """The outermost boxes of an MP4, in order."""
    data, place, names = path.read_bytes(), 0, []
    while place < len(data):
        size, name = struct.unpack(">I4s", data[place : place + 8])
        names.append(name)
        place += size
    return names


# ---- what is written


def test_an_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    save_video(clip(10), tmp_path / "x.mp4", 12.5)
    said = description(tmp_path / "x.mp4")
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709, ", said), said
    assert "32x32" in said and "12.50 fps" in said and "Duration: 00:00:00.80" in said
    names = box_names(tmp_path / "x.mp4")
    assert names.index(b"moov") < names.index(b"mdat")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_come_back(tmp_path: Path, suffix: str) -> None:
    frames = clip(7)
    save_video(frames, tmp_path / f"x{suffix}", 8, random_request(0))
    found, fps = read_video(tmp_path / f"x{suffix}")
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert fps == (None if suffix == "" else pytest.approx(8, rel=0.01))
    if suffix == ".mp4":
        assert np.abs(found.astype(int) - frames).mean() < 4  # half the colour resolution blurs the bar's edges
    else:
        assert np.array_equal(found, frames)


def test_compression_keeps_colours(tmp_path: Path) -> None:
    """Flat colours: any mistake of matrix or range moves them by far more than rounding does."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3)).copy()
    save_video(frames, tmp_path / "x.mp4", 10)
    found, _ = read_video(tmp_path / "x.mp4")
    assert np.abs(found.astype(int) - frames).max() <= 4


def test_grey_films_are_close(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 1), dtype=np.uint8).repeat(3, -1)
    save_video(noise, tmp_path / "x.mp4", 10)
    found, _ = read_video(tmp_path / "x.mp4")
    error = (found.astype(float) - noise) / 255
    assert -10 * np.log10((error**2).mean()) > 38  # noise is the worst case


@pytest.mark.parametrize(
    ("height", "width", "written"),
    [
        (64, 48, (64, 48)),
        (33, 47, (34, 48)),
        (8, 8, (16, 16)),
        (5, 40, (20, 160)),
        (1, 1, (16, 16)),
        (17, 15, (34, 30)),
    ],
)
def test_sides_that_an_mp4_cannot_have(tmp_path: Path, height: int, width: int, written: tuple[int, int]) -> None:
    frames = clip(3, height, width)
    save_video(frames, tmp_path / "x.mp4", 10)
    found, _ = read_video(tmp_path / "x.mp4")
    assert found.shape[1:3] == written == mp4_frames(frames).shape[1:3]
    factor = max(1, -(-16 // min(height, width)))
    enlarged = frames.repeat(factor, 1).repeat(factor, 2)
    padded = mp4_frames(frames)
    assert np.array_equal(padded[:, : height * factor, : width * factor], enlarged)
    assert np.array_equal(padded[:, -1], padded[:, height * factor - 1])
    assert np.array_equal(padded[:, :, -1], padded[:, :, width * factor - 1])


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npz"])
@pytest.mark.parametrize("seed", range(6))
def test_a_request_survives_its_video(tmp_path: Path, suffix: str, seed: int) -> None:
    request = random_request(seed)
    save_video(clip(2), tmp_path / f"x{suffix}", 8, request)
    assert read_request(tmp_path / f"x{suffix}") == request


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npz"])
def test_a_long_request_survives(tmp_path: Path, suffix: str) -> None:
    request = Request(model="a=b;c#d\\e\nf 本", seeds=list(range(40_000)))
    save_video(clip(2), tmp_path / f"x{suffix}", 8, request)
    assert read_request(tmp_path / f"x{suffix}") == request
    assert len(read_video(tmp_path / f"x{suffix}")[0]) == 2


def test_every_frame_of_a_folder_carries_the_request(tmp_path: Path) -> None:
    request = random_request(3)
    save_video(clip(3), tmp_path / "x", 8, request)
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    assert all(read_request(tmp_path / "x" / name) == request for name in names)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npz"])
def test_a_video_without_a_request_says_so(tmp_path: Path, suffix: str) -> None:
    save_video(clip(2), tmp_path / f"x{suffix}", 8)
    with pytest.raises(SettingError, match="carries no vgen request"):
        read_request(tmp_path / f"x{suffix}")


def test_somebody_elses_comment_is_no_request(tmp_path: Path) -> None:
    film(tmp_path / "x.mp4", clip(2), "-metadata", "comment=holiday")
    with pytest.raises(SettingError, match=r"x\.mp4: not a vgen request"):
        read_request(tmp_path / "x.mp4")


def test_long_and_open_boxes_are_passed(tmp_path: Path) -> None:
    """Films beyond 4 GB have boxes with sizes of 64 bits, and the last one may leave its size open."""

    def box(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", len(content) + 8, name) + content

    request = random_request(1)
    tags = box(b"\xa9cmt", box(b"data", bytes(8) + request.to_json().encode()))
    udta = box(b"udta", box(b"meta", bytes(4) + box(b"hdlr", bytes(25)) + box(b"ilst", box(b"\xa9too", b"x") + tags)))
    long = struct.pack(">I4sQ", 1, b"mdat", 16 + 1000) + bytes(1000)
    moov = struct.pack(">I4s", 0, b"moov") + box(b"mvhd", bytes(100)) + udta
    (tmp_path / "x.mp4").write_bytes(box(b"ftyp", b"isom") + long + moov)
    assert read_request(tmp_path / "x.mp4") == request
    (tmp_path / "x.mp4").write_bytes(box(b"ftyp", b"isom") + long[:500])
    with pytest.raises(SettingError, match="cut short"):
        read_request(tmp_path / "x.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npz"])
@pytest.mark.parametrize("content", [b"", b"not a video at all, but long enough", bytes(range(256)) * 8])
def test_garbage_carries_no_request(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(SettingError, match="x"):
        read_request(tmp_path / f"x{suffix}")


def test_a_gif_is_endless_and_keeps_equal_frames_and_time(tmp_path: Path) -> None:
    frames = clip(1).repeat(30, axis=0)
    frames[10:] = clip(1, seed=4)
    save_video(frames, tmp_path / "x.gif", 30)
    found, fps = read_video(tmp_path / "x.gif")
    assert np.array_equal(found, frames) and fps == pytest.approx(30)  # hundredths of a second: 3, 4, 3, 3, 4 ...
    with Image.open(tmp_path / "x.gif") as image:
        assert image.info["loop"] == 0


def test_colours_of_a_gif_are_exact_up_to_256_a_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4, 256, 3), dtype=np.uint8)
    colours[2] = np.arange(256, dtype=np.uint8)[:, None]  # every grey
    colours[3] = np.arange(256, dtype=np.uint8)[:, None] // 128 + [7, 8, 9]  # neighbours
    few = colours[:, rng.permutation(1024) % 256].reshape(4, 32, 32, 3)
    save_video(few, tmp_path / "x.gif", 10)
    assert np.array_equal(read_video(tmp_path / "x.gif")[0], few)
    many = np.add.outer(np.arange(64), np.arange(64))[..., None] * [2, 1, 1] + [0, 5, 60]
    many = (many + rng.integers(0, 4, (2, 64, 64, 3))).clip(0, 255).astype(np.uint8)
    save_video(many, tmp_path / "y.gif", 10)
    assert np.abs(read_video(tmp_path / "y.gif")[0].astype(int) - many).mean() < 6


def test_tensors_are_frames_too(tmp_path: Path) -> None:
    frames = clip(3)
    save_video(torch.from_numpy(frames), tmp_path / "x.npz", 5)
    assert np.array_equal(read_video(tmp_path / "x.npz")[0], frames)
    save_video(np.ascontiguousarray(frames[:, :, ::-1])[:, :, ::-1], tmp_path / "y.mp4", 5)  # not contiguous
    assert np.abs(read_video(tmp_path / "y.mp4")[0].astype(int) - frames).mean() < 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": -3}, "fps is -3"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"path": "x.gif", "fps": 60}, "at most 50"),
        ({"path": "x.avi"}, r"cannot write x\.avi"),
        ({"frames": clip().astype(np.float32)}, "float32"),
        ({"frames": clip()[:0]}, "expected uint8"),
        ({"frames": clip()[0]}, "expected uint8"),
        ({"frames": clip()[..., :1]}, "expected uint8"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    given = {"frames": clip(), "path": "x.mp4", "fps": 10} | changes
    with pytest.raises(SettingError, match=says):
        save_video(given["frames"], tmp_path / given["path"], given["fps"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_video_is_whole_or_absent(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x{suffix}"
    save_video(clip(3), path, 8)
    before = read_video(path)[0]

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_video(clip(5, seed=1), path, 8)
    assert np.array_equal(read_video(path)[0], before)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failing_ffmpeg_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho '[x @ 0x1] it broke' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(OSError, match="could not write the video: it broke"):
        save_video(np.zeros((50, 256, 256, 3), np.uint8), tmp_path / "x.mp4", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    (tmp_path / "y.mp4").write_bytes(b"")
    with pytest.raises(SettingError, match=r"cannot decode .*y\.mp4: it broke"):
        read_video(tmp_path / "y.mp4")


def test_a_missing_ffmpeg_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(SettingError, match="ffmpeg is missing: install imageio-ffmpeg"):
        save_video(clip(), tmp_path / "x.mp4", 8)
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError, match=r"thesis\.tex, which writing frames there would remove"):
        save_video(clip(), tmp_path / "x", 8)
    assert (tmp_path / "x" / "thesis.tex").read_text() == "years of work"
    save_video(clip(5), tmp_path / "y", 8)
    save_video(clip(2), tmp_path / "y", 8)
    assert len(list((tmp_path / "y").iterdir())) == 2


# ---- what is read


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv420p"]),
        ("x.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv444p", "-bf", "3", "-g", "4"]),
        ("x.MOV", ["-c:v", "mpeg4", "-q:v", "2"]),
        ("x.avi", ["-c:v", "mpeg4", "-q:v", "2"]),
        ("x.mkv", ["-c:v", "ffv1"]),
        ("x.webm", ["-c:v", "libvpx", "-b:v", "1M"]),
    ],
)
def test_films_of_others_are_read_frame_by_frame(tmp_path: Path, name: str, options: list[str]) -> None:
    frames = moving_grey()
    path = film(tmp_path / name, frames, *options)
    found, fps = read_video(path)
    assert found.shape == frames.shape and fps == pytest.approx(10)
    assert np.abs(found.astype(int) - frames).max() <= 8
    assert open_video(path).length == 8


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_some_frames_are_those_of_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_video(moving_grey(), path, 8)
    every, _ = read_video(path)
    for start, stride, count in [(0, 1, 3), (2, 1, 2), (1, 3, 2), (0, 2, None), (7, 5, None), (3, 2, 100)]:
        some, fps = read_video(path, count, start=start, stride=stride)
        assert np.array_equal(some, every[start::stride][:count]), (start, stride, count)
        assert fps is None or fps == pytest.approx(8, rel=0.01)
    with pytest.raises(SettingError, match="8 frames, and none from number 8 on"):
        read_video(path, start=8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_are_resized_and_cut_to_a_square(tmp_path: Path, suffix: str) -> None:
    frames = np.zeros((2, 32, 96, 3), np.uint8)
    frames[:, :, 32:64], frames[:, :, 64:] = 120, 240
    save_video(frames, tmp_path / f"x{suffix}", 8)
    for place, level in ((0.0, 0), (0.5, 120), (1.0, 240)):
        found, _ = read_video(tmp_path / f"x{suffix}", size=16, crop=(0.0, place))
        assert found.shape == (2, 16, 16, 3)
        assert np.abs(found[:, 3:-3, 3:-3].astype(int) - level).max() <= 6
    assert read_video(tmp_path / f"x{suffix}", size=64)[0].shape == (2, 64, 64, 3)


def test_a_phone_held_upright_gives_upright_frames(tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 200  # the left half of what is stored
    film(tmp_path / "x.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-display_rotation", "90", "-i"]
    subprocess.run([*command, str(tmp_path / "x.mp4"), "-c", "copy", str(tmp_path / "y.mp4")], check=True)
    found, _ = read_video(tmp_path / "y.mp4")
    assert found.shape == (3, 64, 32, 3)
    assert abs(int(found[0, :28].mean()) - int(found[0, 36:].mean())) > 150


def test_pictures_are_ordered_by_number_and_have_one_size(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        Image.new("L", (8, 8), number * 20).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    found, fps = read_video(tmp_path)
    assert found[:, 0, 0, 0].tolist() == [20, 180, 200] and fps is None
    Image.new("L", (8, 9)).save(tmp_path / "frame11.png")
    with pytest.raises(SettingError, match=r"frame11\.png has 8 x 9, frame1\.png has 8 x 8"):
        read_video(tmp_path)


def test_grey_arrays_are_read_in_colour(tmp_path: Path) -> None:
    frames = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5, 1)
    np.savez(tmp_path / "x.npz", arr_0=frames)
    found, fps = read_video(tmp_path / "x.npz")
    assert np.array_equal(found, frames.repeat(3, -1)) and fps is None


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif", ".npz"])
@pytest.mark.parametrize("content", [b"", b"no video at all, but long enough", bytes(range(256)) * 40])
def test_what_is_no_video_is_said_in_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"noise{suffix}").write_bytes(content)
    with pytest.raises(SettingError, match=f"noise{suffix}.*(remove|expected)") as raised:
        read_video(tmp_path / f"noise{suffix}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npz"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.9])
def test_a_cut_file_is_named(tmp_path: Path, suffix: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    save_video(noise, tmp_path / f"cut{suffix}", 8)
    data = (tmp_path / f"cut{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SettingError, match=f"cut{suffix}"):
        read_video(tmp_path / f"cut{suffix}")


def test_a_playlist_in_disguise_reads_nothing_else(tmp_path: Path) -> None:
    secret = film(tmp_path / "secret.mp4", clip(3))
    for text in (f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile secret.mp4\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(SettingError, match=r"cannot decode .*list\.mp4"):
            read_video(tmp_path / "list.mp4")


def test_arrays_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for arrays in ({"arr_0": clip().astype(float)}, {"arr_0": clip()[0]}, {"other": clip()}):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(SettingError, match=r"expected uint8 \(F, H, W, 3\)"):
            read_video(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", arr_0=clip()[:0])
    with pytest.raises(SettingError, match="no frames"):
        read_video(tmp_path / "x.npz")


def test_what_is_not_there_or_has_no_frames(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(SettingError, match=r"x\.txt is no video: use"):
        read_video(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="empty has no frames"):
        read_video(tmp_path / "empty")
    sound = ["-f", "lavfi", "-i", "anullsrc", "-t", "0.1", str(tmp_path / "sound.mp4")]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *sound], check=True)
    with pytest.raises(SettingError, match=r"cannot decode .*sound\.mp4"):
        read_video(tmp_path / "sound.mp4")


@pytest.mark.parametrize(
    "options", [{"frames": 0}, {"size": 0}, {"start": -1}, {"stride": 0}], ids=lambda value: next(iter(value))
)
def test_numbers_out_of_bounds_are_named(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(options))} is {next(iter(options.values()))}"):
        read_video(tmp_path / "x.mp4", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_limits_hold_before_a_frame_is_decoded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x{suffix}"
    save_video(clip(8), path, 8)

    def never(*arguments: object) -> None:
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(ffmpeg, "read", never)
    monkeypatch.setattr(videos, "_fit", never)
    with monkeypatch.context() as limits:
        limits.setattr(videos, "MAX_FRAMES", 4)
        assert open_video(path).length == 5  # no further is counted
        limits.setattr(videos, "MAX_FRAMES", 7)
        with pytest.raises(SettingError, match="more than 7 frames: cut it, or read fewer"):
            read_video(path)
    with monkeypatch.context() as limits:
        limits.setattr(videos, "MAX_PIXELS", 8 * 32 * 32 - 1)
        with pytest.raises(SettingError, match=r"8 frames of .* hold more than 8191 pixels"):
            read_video(path)
    with monkeypatch.context() as limits:
        limits.setattr(videos, "MAX_FRAME_PIXELS", 32 * 32 - 1)
        with pytest.raises(SettingError, match=r"frames of 32 x 32, the limit|cannot decode"):
            read_video(path)


def test_reading_may_stop_at_any_frame(tmp_path: Path) -> None:
    """No process is left behind."""
    save_video(clip(40, 128, 128), tmp_path / "x.mp4", 8)
    frames = open_video(tmp_path / "x.mp4").decode(0, 1, 40)
    assert np.abs(next(frames).astype(int) - clip(40, 128, 128)[0]).mean() < 4
    frames.close()  # type: ignore[attr-defined]
    children = Path("/proc/self/task")
    if children.exists():
        listed = [(entry / "children").read_text() for entry in children.iterdir() if (entry / "children").exists()]
        assert not any(listed)


# ---- sheets


def test_a_sheet_shows_a_clip_in_each_row() -> None:
    grey, short = moving_grey(8, 4), moving_grey(2, 4) + 5
    sheet = np.array(video_sheet([grey, short], columns=3, zoom=1))
    assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert [int(sheet[3, 3 + 6 * i, 0]) for i in range(3)] == [30, 110, 170]  # frames 0, 4 and 7
    assert [int(sheet[9, 3 + 6 * i, 0]) for i in range(3)] == [35, 55, 255]
    with pytest.raises(SettingError, match="no clips"):
        video_sheet([])
