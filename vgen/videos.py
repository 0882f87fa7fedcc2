"""Video files: writing MP4, GIF, npz and folders of PNG frames with the Request inside, and reading what others wrote.

Everything is written whole or not at all, and read within bounds that are checked before a frame is decoded.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vgen import ffmpeg
from vgen.files import atomic_file, atomic_folder
from vgen.media import UNREADABLE, contact_sheet, save_png, sheet_zoom
from vgen.types import Request, SettingError

FILMS = {".mp4", ".webm", ".avi", ".mov", ".mkv", ".m4v"}
VIDEO_SUFFIXES = FILMS | {".gif"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MAX_FRAMES = 10_000
MAX_FRAME_PIXELS = 1 << 25  # 8K is just below
MAX_PIXELS = 1 << 28  # of all frames that are returned: 805 MB
MIN_FPS, MAX_FPS = 0.01, 1000.0  # a GIF shows a frame for 655 seconds at most
MAX_GIF_FPS = 50.0  # a GIF counts in hundredths of a second, and browsers slow down what lasts only one
MIN_MP4_SIDE = 16  # of a macroblock; players show smaller films badly or not at all
Crop = tuple[float, float]


@dataclass(frozen=True)
class Video:
    """A video that has been opened, not decoded."""

    path: Path
    width: int
    height: int
    length: int  # frames; MAX_FRAMES + 1 stands for any larger number
    fps: float | None  # None where the file does not say
    decode: Callable[[int, int, int], Iterator[np.ndarray]]  # (start, stride, count) -> frames (H, W, 3) uint8


# ---- writing


def save_video(frames: np.ndarray | Tensor, path: Path, fps: float, request: Request | None = None) -> None:
    """Write frames (F, H, W, 3) uint8, whole or not at all, with the request that repeats them.

    By the suffix of `path`:
        .mp4: H.264 in yuv420p with the index in front, which browsers play while it loads. Lossy, and even sides of at
            least 16 are needed: smaller frames are enlarged by a whole factor, and an odd side gets its last row or
            column twice.
        .gif: endless; exact up to 256 colours a frame; at most 50 frames per second.
        .npz: `arr_0` (F, H, W, 3), `fps` and `request`; exact.
        none: a folder of PNG frames, exact; replaces a folder only where that holds nothing but such frames.

    Raises SettingError for what cannot be written as asked, OSError where ffmpeg or the disk fails.
    """
    frames = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise SettingError(f"frames are {frames.dtype} {frames.shape}: expected uint8 (F, H, W, 3)")
    if not MIN_FPS <= fps <= MAX_FPS:
        raise SettingError(f"fps is {fps}: it must lie in {MIN_FPS:g}..{MAX_FPS:g}")
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".npz": _write_npz, "": _write_folder}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise SettingError(f"cannot write {path.name}: use .mp4, .gif, .npz, or no suffix for a folder of PNG frames")
    writer(np.ascontiguousarray(frames), path, fps, request)


def mp4_frames(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) as an MP4 holds them: enlarged by a whole factor to sides of 16, odd sides padded."""
    factor = -(-MIN_MP4_SIDE // min(frames.shape[1:3])) if min(frames.shape[1:3]) < MIN_MP4_SIDE else 1
    if factor > 1:
        frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _write_mp4(frames: np.ndarray, path: Path, fps: float, request: Request | None) -> None:
    frames = mp4_frames(frames)
    height, width = frames.shape[1:3]
    comment = request.to_json() if request else ""
    with atomic_file(path) as partial:
        ffmpeg.write_mp4((frame.data for frame in frames), width, height, fps, partial, comment)


def _write_gif(frames: np.ndarray, path: Path, fps: float, request: Request | None) -> None:
    """By blocks: Pillow would drop a frame that equals the one before it."""
    from PIL.GifImagePlugin import getdata, getheader

    if fps > MAX_GIF_FPS:
        raise SettingError(f"fps is {fps}: a GIF shows at most {MAX_GIF_FPS:g}; use .mp4")
    ends = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int) * 10  # milliseconds; rounding never adds up
    info = {"loop": 0, "comment": request.to_json().encode() if request else b""}
    with atomic_file(path) as partial, partial.open("wb") as file:
        for number, frame in enumerate(frames):
            image = Image.fromarray(frame).quantize(256)  # median cut: exact where there are no more
            if number == 0:
                file.writelines(getheader(image.copy(), info=info)[0])
            duration = int(ends[number + 1] - ends[number])
            file.writelines(getdata(image, duration=duration, include_color_table=True))
        file.write(b";")


def _write_npz(frames: np.ndarray, path: Path, fps: float, request: Request | None) -> None:
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=frames, fps=np.float64(fps), request=np.array(request.to_json() if request else ""))


def _write_folder(frames: np.ndarray, path: Path, fps: float, request: Request | None) -> None:
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file: frames need a folder")
    if path.is_dir() and (strangers := [e for e in path.iterdir() if not re.fullmatch(r"\d{6}\.png", e.name)]):
        raise SettingError(f"{path} holds {strangers[0].name}, which writing frames there would remove: name another")
    with atomic_folder(path) as partial:
        for number, frame in enumerate(frames):
            save_png(Image.fromarray(frame), partial / f"{number:06d}.png", request)


# ---- reading


def read_video(
    path: Path,
    frames: int | None = None,
    size: int | None = None,
    *,
    start: int = 0,
    stride: int = 1,
    crop: Crop = (0.5, 0.5),
) -> tuple[np.ndarray, float | None]:
    """Frames (F, H, W, 3) uint8 of a film (.mp4, .webm, .avi, .mov, .mkv), a GIF, an .npz or a folder of pictures.

    Args:
        frames: at most so many; None for all.
        size: resize the shorter side to this and cut out a square; None leaves frames as they are.
        start: number of the first frame.
        stride: take every so manyth frame.
        crop: where the square lies, down and across, from 0 (top, left) to 1.

    Gives the file's own frames per second too, whatever the stride, or None where it does not say. Raises
    FileNotFoundError, or SettingError for a file that is no video, is damaged, or is too large.
    """
    for name, value, low in (("frames", frames, 1), ("size", size, 1), ("start", start, 0), ("stride", stride, 1)):
        if value is not None and value < low:
            raise SettingError(f"{name} is {value}: it must be at least {low}")
    video = open_video(path)
    if frames is None and video.length > MAX_FRAMES:
        raise SettingError(f"{path} has more than {MAX_FRAMES} frames: cut it, or read fewer")
    count = len(range(start, video.length, stride))
    count = count if frames is None else min(count, frames)
    if count < 1:
        raise SettingError(f"{path} has {video.length} frames, and none from number {start} on")
    if count * (size**2 if size else video.width * video.height) > MAX_PIXELS:
        raise SettingError(
            f"{count} frames of {path} hold more than {MAX_PIXELS} pixels: read fewer, or make them smaller"
        )
    try:
        found = [_fit(frame, size, crop) for frame in video.decode(start, stride, count)]
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not found:
        raise SettingError(f"cannot decode {path}: it gave no frames; mend or remove it")
    return np.stack(found), video.fps


def open_video(path: Path) -> Video:
    """Find out a video's size and length without decoding it. Raises as `read_video`."""
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    openers = {".gif": _open_gif, ".npz": _open_npz} | dict.fromkeys(FILMS, _open_film)
    opener = _open_folder if path.is_dir() else openers.get(path.suffix.lower())
    if opener is None:
        raise SettingError(f"{path} is no video: use {', '.join(sorted(VIDEO_SUFFIXES))}, .npz or a folder of pictures")
    try:
        video = opener(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if video.length < 1 or min(video.width, video.height) < 1:
        raise SettingError(f"{path} has no frames: mend or remove it")
    if video.width * video.height > MAX_FRAME_PIXELS:
        raise SettingError(
            f"{path} has frames of {video.width} x {video.height}, the limit is {MAX_FRAME_PIXELS} pixels: make them "
            "smaller"
        )
    return video


def _unreadable(path: Path, error: BaseException) -> SettingError:
    if isinstance(error, SettingError):
        return error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SettingError(f"cannot read the video {path} ({reason}): mend or remove it")


def _fit(frame: np.ndarray, size: int | None, crop: Crop) -> np.ndarray:
    """A frame (H, W, 3), its shorter side resized to `size` and cut to a square."""
    if size is None or frame.shape[:2] == (size, size):
        return frame
    height, width = frame.shape[:2]
    ratio = size / min(height, width)
    width, height = max(size, round(width * ratio)), max(size, round(height * ratio))
    image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
    top, left = round((height - size) * crop[0]), round((width - size) * crop[1])
    return np.array(image.crop((left, top, left + size, top + size)))


# ---- openers


def _open_film(path: Path) -> Video:
    stream = ffmpeg.probe(path, MAX_FRAMES + 1, MAX_FRAME_PIXELS)

    def decode(start: int, stride: int, count: int) -> Iterator[np.ndarray]:
        for data in ffmpeg.read(path, stream, start, stride, count, MAX_FRAME_PIXELS):
            yield np.frombuffer(data, dtype=np.uint8).reshape(stream.height, stream.width, 3)

    return Video(path, stream.width, stream.height, stream.length, stream.fps, decode)


def _open_gif(path: Path) -> Video:
    with Image.open(path, formats=["GIF"]) as image:
        width, height = image.size
        length = min(getattr(image, "n_frames", 1), MAX_FRAMES + 1)
        duration = 0
        for number in range(min(length, MAX_FRAMES)):
            image.seek(number)
            duration += int(image.info.get("duration", 0))

    def decode(start: int, stride: int, count: int) -> Iterator[np.ndarray]:
        with Image.open(path, formats=["GIF"]) as image:
            for number in range(start, start + count * stride, stride):
                image.seek(number)
                yield np.array(image.convert("RGB"))

    return Video(path, width, height, length, 1000 * length / duration if duration else None, decode)


def _open_npz(path: Path) -> Video:
    """`arr_0` (F, H, W, 3), or with one channel, read no further than its header."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            raise SettingError(f"{path} has no arr_0: expected uint8 (F, H, W, 3)")
        with archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        raise SettingError(f"arr_0 of {path} is {dtype} {shape}: expected uint8 (F, H, W, 3)")
    fps = None
    if "fps.npy" in names:
        with np.load(path) as arrays:
            fps = float(arrays["fps"])
        fps = fps if 0 < fps <= MAX_FPS else None

    def decode(start: int, stride: int, count: int) -> Iterator[np.ndarray]:
        if shape[0] * shape[1] * shape[2] > MAX_PIXELS:
            raise SettingError(f"arr_0 of {path} has the shape {shape}, more than {MAX_PIXELS} pixels: cut it")
        with np.load(path) as arrays:
            frames = arrays["arr_0"]
        yield from np.broadcast_to(frames, (*shape[:3], 3))[start::stride][:count]

    return Video(path, shape[2], shape[1], min(shape[0], MAX_FRAMES + 1), fps, decode)


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder, by name; of `2.png` and `10.png` the former first."""

    def order(path: Path) -> list[tuple[bool, int, str]]:
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", path.name)]

    files = [file for file in folder.iterdir() if file.name[0] != "." and file.suffix.lower() in PICTURES]
    return sorted(files, key=order)


def _open_folder(path: Path) -> Video:
    files = frame_files(path)
    if not files:
        raise SettingError(f"{path} has no frames: expected pictures such as {path / '000000.png'}")
    with Image.open(files[0]) as image:
        width, height = image.size

    def decode(start: int, stride: int, count: int) -> Iterator[np.ndarray]:
        for file in files[start::stride][:count]:
            with Image.open(file) as image:
                if image.size != (width, height):
                    sizes = f"{image.size[0]} x {image.size[1]}, {files[0].name} has {width} x {height}"
                    raise SettingError(f"{file} has {sizes}: frames of a video have one size")
                yield np.array(image.convert("RGB"))

    return Video(path, width, height, min(len(files), MAX_FRAMES + 1), None, decode)


# ---- showing


def video_sheet(clips: Sequence[np.ndarray], columns: int = 10, zoom: int | None = None) -> Image.Image:
    """Clips (F, H, W, 3) uint8 one below the other, each as a row of at most `columns` frames, evenly spread."""
    if not len(clips):
        raise SettingError("there are no clips to show: give at least one")
    columns = min(columns, max(len(clip) for clip in clips))
    tiles = []
    for clip in clips:
        chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        row = [Image.fromarray(np.ascontiguousarray(clip[number])) for number in chosen]
        tiles += row + [Image.new("RGB", row[0].size, "white")] * (columns - len(row))
    return contact_sheet(tiles, columns, zoom or sheet_zoom(max(clips[0].shape[1:3])))
