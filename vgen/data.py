"""Images to train on: torchvision's MNIST and Fashion-MNIST, Noto's emoji, or any folder of class folders.

Every source gives uint8 batches by index, so that a training step depends on (seed, step) alone.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen import emoji
from vgen.types import SettingError

HELD_OUT_EVERY = 20  # in folders that are not divided into train/ and test/
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FASHION = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


@dataclass(frozen=True)
class DataSet:
    """A data set known by name: its classes, and the size and channels that its images are evaluated in."""

    class_names: list[str]
    size: int
    channels: int
    torchvision: str | None = None  # its class there


BUILT_IN = {
    "fashion-mnist": DataSet(FASHION, 28, 1, "FashionMNIST"),
    "mnist": DataSet([str(digit) for digit in range(10)], 28, 1, "MNIST"),
    "noto-emoji": DataSet(emoji.NAMES, 32, 3),
}


class ImageSource(Protocol):
    """A labelled set of square images of one size."""

    @property
    def labels(self) -> Tensor:
        """Class ids (N,) int64."""
        ...

    @property
    def class_names(self) -> list[str]: ...

    def fingerprint(self) -> str:
        """Changes whenever the images do; cheap."""
        ...

    def images(self, indices: Sequence[int], crop_seed: int | None = None) -> Tensor:
        """Images (B, C, S, S) uint8; with `crop_seed` a random crop where the source has room for one."""
        ...


@dataclass(frozen=True)
class MemorySource:
    """Small images held in memory: pixels (N, C, S, S) uint8."""

    pixels: Tensor
    labels: Tensor
    class_names: list[str]

    def fingerprint(self) -> str:
        pixels = self.pixels[:, 0] if self.pixels.stride(1) == 0 else self.pixels  # grey ones are expanded
        return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()

    def images(self, indices: Sequence[int], crop_seed: int | None = None) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]


@dataclass(frozen=True)
class EmojiSource(MemorySource):
    """Emoji, which with `crop_seed` are placed at random, a little smaller; `large` has them twice as large."""

    large: np.ndarray  # (N, 2 S, 2 S, 3) uint8

    def images(self, indices: Sequence[int], crop_seed: int | None = None) -> Tensor:
        if crop_seed is None:
            return super().images(indices)
        size = self.pixels.shape[-1]
        rngs = (np.random.default_rng([crop_seed, index]) for index in indices)
        placed = [emoji.place_at_random(self.large[index], size, rng) for index, rng in zip(indices, rngs, strict=True)]
        return torch.from_numpy(np.stack(placed)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class FolderSource:
    """Image files on disk: the shorter side is resized (Lanczos), then cropped to a square (VAR's recipe)."""

    paths: list[Path]
    labels: Tensor
    class_names: list[str]
    size: int
    channels: int
    enlarge: float = 1.125  # shorter side before a random crop, relative to the crop

    def fingerprint(self) -> str:
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr((files, self.size, self.channels)).encode()).hexdigest()

    def images(self, indices: Sequence[int], crop_seed: int | None = None) -> Tensor:
        return torch.stack([self._image(int(index), crop_seed) for index in indices])

    def _image(self, index: int, crop_seed: int | None) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.channels == 1 else "RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise SettingError(f"cannot read the image {path} ({error}): mend or remove it") from error
        shorter = self.size if crop_seed is None else round(self.size * self.enlarge)
        ratio = shorter / min(image.size)
        width, height = (max(self.size, round(side * ratio)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        if crop_seed is not None:
            rng = np.random.default_rng([crop_seed, index])
            left, top = int(rng.integers(width - self.size + 1)), int(rng.integers(height - self.size + 1))
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)


def data_root(root: str | Path | None = None) -> Path:
    """Where data sets lie: the argument, else $VGEN_DATA, else ~/.cache/vgen/data."""
    return Path(root or os.environ.get("VGEN_DATA") or Path.home() / ".cache" / "vgen" / "data").expanduser()


def open_source(
    name: str, split: str, size: int, channels: int, root: str | Path | None = None, download: bool = True
) -> ImageSource:
    """Open "fashion-mnist", "mnist", "noto-emoji" or a folder of class folders; split is "train" or "test".

    The first two are downloaded into `root` when they are not there, unless `download` is off. A folder may hold
    train/ and test/; without them every 20th image is held out for testing. Raises SettingError where nothing can be
    trained on.
    """
    known = BUILT_IN.get(name)
    if known is None:
        return _open_folder(Path(name).expanduser(), split, size, channels)
    if known.torchvision is None:
        return _open_emoji(split, size, channels, data_root(root))
    return _open_torchvision(name, known.torchvision, split, size, channels, data_root(root), download)


def _open_torchvision(
    name: str, class_name: str, split: str, size: int, channels: int, root: Path, download: bool
) -> MemorySource:
    from torchvision import datasets  # slow to import, and not needed for folders

    if download:
        with suppress(OSError):  # a read-only place is fine where the files are there already
            root.mkdir(parents=True, exist_ok=True)
    try:
        found = getattr(datasets, class_name)(root, train=split == "train", download=download)
    except (OSError, RuntimeError) as error:
        tried = f" and could not be downloaded ({error})" if download else ""
        raise SettingError(
            f"{name} is not in {root}{tried}: put torchvision's files there, "
            "or name another folder with --data-root or VGEN_DATA"
        ) from error
    pixels = found.data[:, None]
    if pixels.shape[-1] != size:
        resized = torch.nn.functional.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
        pixels = resized.round().clamp(0, 255).to(torch.uint8)
    return MemorySource(pixels.expand(-1, channels, -1, -1), found.targets.long(), BUILT_IN[name].class_names)


def _open_emoji(split: str, size: int, channels: int, root: Path) -> EmojiSource:
    if channels != 3:
        raise SettingError("noto-emoji is in colour, but one channel was asked for: --set model.image_channels=3")
    found, large, labels = emoji.pictures(split, size, root)
    pixels = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
    return EmojiSource(pixels, torch.tensor(labels), emoji.NAMES, large)


def folder_files(folder: Path, split: str) -> tuple[list[tuple[Path, int]], list[str]]:
    """The images of a folder of class folders that a split has, each with its class, and the classes' names.

    Where the folder holds no train/ and test/, every 20th image is of the test split. Raises SettingError.
    """
    if not folder.is_dir():
        raise SettingError(
            f"data {str(folder)!r} is neither a folder nor one of {', '.join(BUILT_IN)}: give one of these"
        )
    inside = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    divided = "train" in inside and ("test" in inside or inside == {"train"})  # or a class is called "train"
    root = folder / "train" if divided else folder
    folder = folder / split if divided else folder
    if not folder.is_dir():
        raise SettingError(f"{folder.parent} holds train/ but no {split}/: add it, or name {folder.parent / 'train'}")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise SettingError(
            f"no images in {folder}: expected one folder per class with files like {folder / 'cats' / '1.png'}"
        )
    if not divided and len(files) >= HELD_OUT_EVERY:
        held_out = set(files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        files = [file for file in files if (file in held_out) == (split == "test")]
    return files, names


def _open_folder(folder: Path, split: str, size: int, channels: int) -> FolderSource:
    files, names = folder_files(folder, split)
    return FolderSource([path for path, _ in files], torch.tensor([label for _, label in files]), names, size, channels)


def spread(number: int, count: int) -> list[int]:
    """At most `count` indices below `number`, evenly spread: folders are sorted by class."""
    return torch.linspace(0, number - 1, min(number, count)).round().long().tolist()


def flip_at_random(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, C, H, W), each mirrored with probability one half."""
    flipped = torch.from_numpy(rng.random(len(images)) < 0.5)
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_unit_range(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> float32 in [0, 1]."""
    return images.float().add(1).mul(0.5)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8 0..255, rounded."""
    return images.float().mul(255).round().clamp(0, 255).to(torch.uint8)
