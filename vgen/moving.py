"""Clips to train on: moving digits made on the fly, or a folder of videos.

Every source gives uint8 clips by index, so that a training step depends on (seed, step) alone.
"""

import hashlib
from collections.abc import Sequence, Set
from numbers import Integral
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vgen.data import HELD_OUT_EVERY, open_source
from vgen.types import SettingError
from vgen.videos import PICTURES, VIDEO_SUFFIXES, open_video, read_video

DIGIT = 28  # pixels a side
EPOCH = 10_000  # clips that OpenSTL calls an epoch, and as many to test on
STEP = 0.1  # of the way across the canvas per frame, OpenSTL's
SPLITS = ("train", "test")


class ClipSource(Protocol):
    """A labelled set of clips of one size and length."""

    class_names: list[str]

    def __len__(self) -> int:
        """Clips of an epoch."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the clips do; cheap."""
        ...

    def clips(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Clips (B, F, C, S, S) uint8 and class ids (B, n) int64, -1 where a clip shows fewer than n classes.

        Clip i follows from (i, seed) alone, whichever others are drawn with it.
        """
        ...


class MovingDigits:
    """MNIST digits that move straight and bounce off the walls, as OpenSTL makes them (2306.11249) from Moving-MNIST.

    A digit starts anywhere, steps 0.1 of the way across in a direction of its own, is stopped at a wall and leaves it
    mirrored; where digits overlap the brighter pixel shows. The first frame stands one step after the start. The law
    is OpenSTL's; the sequences are not those of its fixed test file.
    """

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        size: int = 64,
        digits: int | Sequence[int] = 1,
        frames: int = 20,
        speed: float | tuple[float, float] | None = None,
        directions: int | None = None,
        seed: int = 0,
    ) -> None:
        """Open MNIST.

        Args:
            root: where MNIST lies; None for the usual place (vgen.data.data_root).
            split: "train" or "test" digits.
            size: side of the frames in pixels.
            digits: how many in a clip, or several numbers that are equally likely.
            frames: of a clip. A longer one begins with the shorter one.
            speed: pixels per frame, or the bounds of a uniform law; None for OpenSTL's 0.1 * (size - 28).
            directions: None for any angle; 4 or 8 for multiples of 90 or 45 degrees from whole pixels, in steps of
                `speed` whole pixels along each axis that is moved along.
            seed: of all clips, where `clips` is given none.

        Raises SettingError naming a value that is out of bounds.
        """
        self.counts = (int(digits),) if isinstance(digits, Integral) else tuple(digits)  # type: ignore[arg-type]
        self.size, self.frames, self.directions, self.seed, self.split = size, frames, directions, seed, split
        self.speed = _bounds(speed, size)
        self._check()
        source = open_source("mnist", split, DIGIT, 1, root)
        self.class_names = source.class_names
        self.pixels = source.images(range(len(source.labels)))[:, 0].contiguous().numpy()
        self.labels = source.labels
        self._source_fingerprint = source.fingerprint()

    def _check(self) -> None:
        if self.split not in SPLITS:
            raise SettingError(f"split is {self.split!r}: use one of {', '.join(SPLITS)}")
        if self.size <= DIGIT:
            raise SettingError(f"size is {self.size}: a digit of {DIGIT} pixels needs more to move in")
        if self.frames < 1:
            raise SettingError(f"frames is {self.frames}: it must be at least 1")
        if not self.counts or min(self.counts) < 1:
            raise SettingError(f"digits is {self.counts}: it must be at least 1")
        low, high = self.speed
        if not 0 <= low <= high < float("inf"):
            raise SettingError(f"speed is {self.speed}: give pixels per frame, at least 0, the smaller bound first")
        if self.directions not in (None, 4, 8):
            raise SettingError(f"directions is {self.directions!r}: use 4, 8 or None for any angle")
        if self.directions and not (float(low).is_integer() and float(high).is_integer()):
            raise SettingError(f"speed is {self.speed}: {self.directions} directions need whole pixels per frame")

    def __len__(self) -> int:
        return EPOCH

    def fingerprint(self) -> str:
        law = (self.size, self.counts, self.frames, self.speed, self.directions, self.seed, self.split)
        return hashlib.sha256(repr((self._source_fingerprint, law)).encode()).hexdigest()

    def clips(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Clips (B, F, 1, S, S) uint8 and the digits on them (B, n) int64, -1 where a clip has fewer than n.

        Indices may go beyond an epoch: every one has a clip of its own.
        """
        made = [self._clip(int(index), self.seed if seed is None else seed) for index in indices]
        if not made:
            raise SettingError("no clips were asked for: give at least one index")
        return torch.stack([clip for clip, _ in made]), torch.stack([labels for _, labels in made])

    def _clip(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([seed, index, SPLITS.index(self.split)])
        canvas = np.zeros((self.frames, self.size, self.size), dtype=np.uint8)
        labels = torch.full((max(self.counts),), -1)
        for place in range(self.counts[rng.integers(len(self.counts))]):
            which = int(rng.integers(len(self.pixels)))
            labels[place] = self.labels[which]
            for frame, (top, left) in zip(canvas, self._path(rng), strict=True):
                part = frame[top : top + DIGIT, left : left + DIGIT]
                np.maximum(part, self.pixels[which], out=part)
        return torch.from_numpy(canvas)[:, None], labels

    def _path(self, rng: np.random.Generator) -> np.ndarray:
        """Top left corners of a digit, (F, 2) int64 in pixels."""
        room = self.size - DIGIT
        if self.directions is None:
            start, angle = rng.random(2), rng.random() * 2 * np.pi
            velocity = np.array([np.sin(angle), np.cos(angle)]) * rng.uniform(*self.speed) / room
            return (room * bounce(start, velocity, 1.0, self.frames)).astype(np.int64)
        whole = rng.integers(room + 1, size=2)
        angle = rng.integers(self.directions) * 2 * np.pi / self.directions
        way = np.sign(np.round([np.sin(angle), np.cos(angle)], 6)).astype(np.int64)
        pixels = rng.integers(int(self.speed[0]), int(self.speed[1]), endpoint=True)
        return bounce(whole, way * pixels, room, self.frames)


class VideoFolder:
    """Clips out of videos on disk: files (mp4, webm, avi, mov, mkv, gif) or folders of frames, maybe in class folders.

    A folder that holds video files is a class, named after it; one that holds pictures alone is a video. Every 20th
    video is held out for testing. Of a very long video the first 10,000 frames are used.
    """

    def __init__(
        self, root: str | Path, split: str, size: int = 64, frames: int = 20, stride: int = 1, channels: int = 3
    ) -> None:
        """Find the videos; none is opened yet.

        Args:
            root: the folder.
            split: "train" or "test".
            size: side of the square clips in pixels; the shorter side of a frame is resized to it.
            frames: of a clip.
            stride: take every so manyth frame.
            channels: 3, or 1 for grey clips.

        Raises SettingError where nothing can be trained on.
        """
        root = Path(root).expanduser()
        if split not in SPLITS:
            raise SettingError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
        for name, value in (("size", size), ("frames", frames), ("stride", stride)):
            if value < 1:
                raise SettingError(f"{name} is {value}: it must be at least 1")
        if channels not in (1, 3):
            raise SettingError(f"channels is {channels}: use 3, or 1 for grey clips")
        if not root.is_dir():
            raise SettingError(f"there is no folder {str(root)!r}: name one that holds videos")
        self.size, self.frames, self.stride, self.channels = size, frames, stride, channels
        self.class_names, videos = _find_videos(root)
        if len(videos) >= HELD_OUT_EVERY:
            videos = [item for i, item in enumerate(videos, 1) if (i % HELD_OUT_EVERY == 0) == (split == "test")]
        self.paths = [path for path, _ in videos]
        self.labels = torch.tensor([label for _, label in videos])
        self._lengths: dict[Path, int] = {}  # counting frames takes reading a file from end to end

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        inside = [sorted(path.iterdir()) if path.is_dir() else [path] for path in self.paths]
        stats = [(str(file.resolve()), file.stat()) for files in inside for file in files]
        found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        law = (self.size, self.frames, self.stride, self.channels)
        return hashlib.sha256(repr((found, law)).encode()).hexdigest()

    def clips(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Clips (B, F, C, S, S) uint8 of videos number `indices`, and class ids (B, 1) int64.

        With a seed each starts anywhere in its video and is cropped anywhere; without one it is the first clip, cropped
        in the middle. Indices beyond the last video begin again, with other starts and crops. Raises SettingError
        naming a video that is damaged or too short.
        """
        if not len(indices):
            raise SettingError("no clips were asked for: give at least one index")
        clips = torch.stack([self._clip(int(index), seed) for index in indices])
        return clips, self.labels[torch.as_tensor(indices) % len(self.paths)][:, None]

    def _clip(self, index: int, seed: int | None) -> Tensor:
        path, needed = self.paths[index % len(self.paths)], (self.frames - 1) * self.stride + 1
        length = self._length(path)
        if length < needed:
            raise SettingError(f"{path} has {length} frames, a clip needs {needed}: remove it, or ask for fewer frames")
        start, crop = 0, (0.5, 0.5)
        if seed is not None:
            rng = np.random.default_rng([seed, index])
            start, crop = int(rng.integers(length - needed + 1)), (rng.random(), rng.random())
        found = self._read(path, start, crop)
        if len(found) < self.frames:  # hidden frames were counted: see vgen.ffmpeg.Stream
            found = self._read(path, 0, crop)
        if len(found) < self.frames:
            raise SettingError(f"{path} gave {len(found)} of {self.frames} frames: mend or remove it")
        pixels = torch.from_numpy(found).permute(0, 3, 1, 2)
        return luma(pixels) if self.channels == 1 else pixels

    def _length(self, path: Path) -> int:
        if path not in self._lengths:
            self._lengths[path] = open_video(path).length
        return self._lengths[path]

    def _read(self, path: Path, start: int, crop: tuple[float, float]) -> np.ndarray:
        return read_video(path, self.frames, self.size, start=start, stride=self.stride, crop=crop)[0]


def _find_videos(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Names of the classes, and all videos with their class."""
    loose = _videos_in(root)
    classes = [(entry, found) for entry in _folders(root) if entry not in loose and (found := _videos_in(entry))]
    if loose and classes:
        raise SettingError(
            f"{root} holds both videos such as {loose[0].name} and class folders such as {classes[0][0].name}: "
            "put every video into a class folder, or none"
        )
    if not loose and not classes:
        raise SettingError(f"no videos in {root}: expected files such as clip.mp4, folders of frames, or class folders")
    if loose:
        return ["video"], [(path, 0) for path in loose]
    return [entry.name for entry, _ in classes], [(path, i) for i, (_, paths) in enumerate(classes) for path in paths]


def _videos_in(folder: Path) -> list[Path]:
    """The video files and frame folders that lie in a folder itself, by name."""
    pictures = [entry for entry in _folders(folder) if not _files(entry, VIDEO_SUFFIXES) and _files(entry, PICTURES)]
    return sorted(_files(folder, VIDEO_SUFFIXES) + pictures)


def _files(folder: Path, suffixes: Set[str]) -> list[Path]:
    entries = [entry for entry in folder.iterdir() if entry.suffix.lower() in suffixes and entry.name[0] != "."]
    return [entry for entry in entries if entry.is_file()]


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")


def luma(pixels: Tensor) -> Tensor:
    """Brightness of uint8 pixels (..., 3, H, W) as (..., 1, H, W), rounded; exact for grey ones."""
    red, green, blue = pixels.float().unbind(-3)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8).unsqueeze(-3)


def bounce(start: np.ndarray, velocity: np.ndarray, wall: float, frames: int) -> np.ndarray:
    """Positions (F, axes) after 1, 2, ... steps from `start` between walls at 0 and `wall`, by OpenSTL's rule.

    A step that reaches a wall ends on it, and that component of the velocity turns round.
    """
    position, velocity, path = start.copy(), velocity.copy(), []
    for _ in range(frames):
        position = position + velocity
        velocity = np.where((position <= 0) | (position >= wall), -velocity, velocity)
        position = position.clip(0, wall)
        path.append(position)
    return np.stack(path)


def _bounds(speed: float | tuple[float, float] | None, size: int) -> tuple[float, float]:
    """The bounds of the speed in pixels per frame."""
    if speed is None:
        return (STEP * (size - DIGIT),) * 2
    low, high = speed if isinstance(speed, Sequence) else (speed, speed)
    return low, high
