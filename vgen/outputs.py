"""The files that samples become: one each, or all in one array or archive that grows item by item.

A sink takes items in order, says what the manifest should remember, and can go on after a process that was killed.
"""

import hashlib
import json
import math
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from vgen.files import atomic_file, sha256
from vgen.ledger import Line
from vgen.media import png_bytes, save_png
from vgen.types import Request, SettingError
from vgen.videos import MAX_FPS, MAX_GIF_FPS, MIN_FPS, save_video

VIDEO_FORMATS = {"mp4": ".mp4", "gif": ".gif", "png": "", "npz": ".npz"}  # and their suffixes; "png" is a folder
IMAGE_FORMATS = ("png", "npz", "webdataset")
EPOCH = (1980, 1, 1, 0, 0, 0)  # of all members of archives, so that equal runs are equal files
BLOCK = 1 << 20


@dataclass(frozen=True)
class Item:
    """One image or video of a run. Its seed and class follow from its index alone."""

    index: int
    class_label: int | None
    seed: int

    @property
    def stem(self) -> str:
        """File name without its suffix: sortable, class and seed visible."""
        label = "none" if self.class_label is None else f"{self.class_label:04}"
        return f"{self.index:06}_c{label}_s{self.seed}"

    @property
    def name(self) -> str:
        """File name of an image."""
        return f"{self.stem}.png"


@dataclass(frozen=True, kw_only=True)
class VideoFiles:
    """Which files a video becomes. Raises SettingError."""

    formats: Sequence[str] = tuple(VIDEO_FORMATS)
    fps: float = 10.0

    def __post_init__(self) -> None:
        _check_formats(self.formats, tuple(VIDEO_FORMATS))
        limit = MAX_GIF_FPS if "gif" in self.formats else MAX_FPS
        if not MIN_FPS <= self.fps <= limit:
            what = "a GIF shows" if "gif" in self.formats else "there are"
            remedy = "; leave gif out of the formats for more" if limit < self.fps <= MAX_FPS else ""
            bounds = f"it must be at least {MIN_FPS:g}, and {what} at most {limit:g}"
            raise SettingError(f"fps is {self.fps:g}: {bounds}{remedy}")


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Which files images become: "png", one each; "npz", all in samples.npz, as ADM's evaluator reads them;
    "webdataset", all in samples.tar. Raises SettingError."""

    formats: Sequence[str] = ("png",)

    def __post_init__(self) -> None:
        _check_formats(self.formats, IMAGE_FORMATS)


def _check_formats(formats: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in formats if name not in known]:
        raise SettingError(f"unknown format {unknown[0]!r}: use one or more of {', '.join(known)}")
    if not formats:
        raise SettingError(f"no format was named: use one or more of {', '.join(known)}")


class Sink(ABC):
    """One form of a run's samples. Items come in the order of their index."""

    def resume(self, done: Mapping[int, Line]) -> set[int]:
        """Those of the items that the manifest calls done which this form really holds; called before any `add`."""
        return set(done)

    @abstractmethod
    def add(self, item: Item, sample: Any, request: Request) -> Line:
        """Take an item; returns what the manifest remembers of it."""

    def finish(self) -> None:  # noqa: B027
        """Every item is there: put what grew in its place."""


class PictureFiles(Sink):
    """A PNG for each image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resume(self, done: Mapping[int, Line]) -> set[int]:
        return {i for i, line in done.items() if all((self.folder / name).is_file() for name in line["files"])}

    def add(self, item: Item, sample: Image.Image, request: Request) -> Line:
        save_png(sample, path := self.folder / item.name, request)
        return {"files": {item.name: sha256(path)}}


class ClipFiles(Sink):
    """A video (F, H, W, 3) uint8 as files of several kinds."""

    def __init__(self, folder: Path, films: VideoFiles) -> None:
        self.folder, self.films = folder, films

    def resume(self, done: Mapping[int, Line]) -> set[int]:
        return {i for i, line in done.items() if all((self.folder / name).exists() for name in line["files"])}

    def add(self, item: Item, sample: np.ndarray, request: Request) -> Line:
        files = {}
        for name in self.films.formats:
            path = self.folder / f"{item.stem}{VIDEO_FORMATS[name]}"
            save_video(sample, path, self.films.fps, request)
            files[path.name] = sha256(*sorted(path.iterdir())) if path.is_dir() else sha256(path)
        return {"files": files}


class LargeFile(Sink):
    """All items of a shard in one file, which grows under another name until it is complete."""

    stem, suffix, remembered = "samples", "", ""

    def __init__(self, folder: Path, items: Sequence[Item], infix: str = "") -> None:
        self.path = folder / f"{self.stem}{infix}{self.suffix}"
        self.joined = folder / f"{self.stem}{self.suffix}"  # of all shards, once they were merged
        self.growing = folder / f".{self.stem}{infix}{self.suffix}"
        self.items = items
        self.complete = False
        self.done: Mapping[int, Line] = {}

    def resume(self, done: Mapping[int, Line]) -> set[int]:
        self.done = done
        self.complete = (self.path.is_file() or self.joined.is_file()) and all(i.index in done for i in self.items)
        if self.complete:
            return set(done)
        return self.held(done, self.growing.stat().st_size if self.growing.is_file() else 0)

    def add(self, item: Item, sample: Any, request: Request) -> Line:
        if self.complete:  # another form of the item was gone, this one is there
            return {self.remembered: self.done[item.index][self.remembered]}
        return {self.remembered: self.put(item, sample, request)}

    @abstractmethod
    def put(self, item: Item, sample: Any, request: Request) -> Any:
        """Take an item; returns what is to be remembered of its place."""

    @abstractmethod
    def held(self, done: Mapping[int, Line], size: int) -> set[int]:
        """Those of the items done that the first `size` bytes, which there are, hold."""


class ArrayFile(LargeFile):
    """All images in samples.npz: `arr_0` (N, H, W, 3) uint8 and `arr_1` (N,) labels, where there are classes.

    Pixels are written to their place in a file beside it as they come and are never held together in memory.
    """

    suffix, remembered = ".npz", "shape"

    def __init__(self, folder: Path, items: Sequence[Item], infix: str = "") -> None:
        super().__init__(folder, items, infix)
        self.places = {item.index: place for place, item in enumerate(items)}
        self.shape: tuple[int, ...] = ()

    def held(self, done: Mapping[int, Line], size: int) -> set[int]:
        found = set()
        for i, line in done.items():
            if shape := line.get("shape"):
                self.shape = tuple(shape)
                if (self.places[i] + 1) * math.prod(shape) <= size:
                    found.add(i)
        return found

    def put(self, item: Item, sample: Image.Image, request: Request) -> list[int]:
        pixels = np.asarray(sample.convert("RGB"))
        if self.shape and pixels.shape != self.shape:
            raise SettingError(f"item {item.index} has the shape {pixels.shape}, others {self.shape}: use --format png")
        self.shape = pixels.shape
        with self.growing.open("r+b" if self.growing.is_file() else "w+b") as file:
            file.seek(self.places[item.index] * pixels.nbytes)
            file.write(pixels.tobytes())
        return list(pixels.shape)

    def finish(self) -> None:
        if self.complete:
            return
        labels = [item.class_label for item in self.items]
        os.truncate(self.growing, len(self.items) * math.prod(self.shape))  # an older run may have had more
        with self.growing.open("rb") as pixels:
            write_npz(self.path, blocks(pixels), (len(self.items), *self.shape), labels)
        self.growing.unlink()


class Archive(LargeFile):
    """All images in samples.tar, as WebDataset reads it: a PNG and a JSON of class and seed for each."""

    suffix, remembered = ".tar", "tar_end"

    def held(self, done: Mapping[int, Line], size: int) -> set[int]:
        """Members lie one after the other: what counts is the first items without a gap."""
        found, end = set(), 0
        for item in self.items:
            stop = done.get(item.index, {}).get("tar_end")
            if stop is None or not end < stop <= size:
                break
            found.add(item.index)
            end = stop
        if size:
            os.truncate(self.growing, end)
        return found

    def put(self, item: Item, sample: Image.Image, request: Request) -> int:
        facts = json.dumps({"index": item.index, "class": item.class_label, "seed": item.seed}, sort_keys=True)
        with self.growing.open("ab") as file:
            for suffix, content in ((".png", png_bytes(sample, request)), (".json", facts.encode())):
                write_member(file, item.stem + suffix, content)
            return file.tell()

    def finish(self) -> None:
        if self.complete:
            return
        with self.growing.open("ab") as file:
            end_archive(file)
            file.flush()
            os.fsync(file.fileno())
        self.growing.replace(self.path)


# ---- archives


def write_member(file: BinaryIO, name: str, content: bytes) -> None:
    """A file of a tar archive, whose header depends on name and size alone."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write(content + b"\0" * (-len(content) % tarfile.BLOCKSIZE))


def end_archive(file: BinaryIO) -> None:
    """Two empty blocks, and as many more as fill a record."""
    file.write(b"\0" * (2 * tarfile.BLOCKSIZE))
    file.write(b"\0" * (-file.tell() % tarfile.RECORDSIZE))


def write_npz(path: Path, pixels: Iterator[bytes], shape: tuple[int, ...], labels: Sequence[int | None]) -> None:
    """An uncompressed npz of `arr_0` (N, H, W, 3) uint8, its bytes coming in blocks, and labels as `arr_1`."""
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for block in pixels:
                member.write(block)
        if labels and None not in labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """A file from where it is read to its end, a megabyte at a time."""
    while block := file.read(BLOCK):
        yield block


def pixel_hash(sample: Any) -> str:
    """Of the pixels of an image or a video, whatever files they end up in."""
    pixels = np.ascontiguousarray(sample.convert("RGB") if isinstance(sample, Image.Image) else sample)
    return hashlib.sha256(f"{list(pixels.shape)}".encode() + pixels.tobytes()).hexdigest()
