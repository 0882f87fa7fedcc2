"""Sets of images to evaluate: a folder or tar of files, an .npz of ADM's form, or a split of a data set.

All give (B, 3, H, W) uint8 by range of index, and say what is known of them. Know no network and no metric.
"""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vgen.data import BUILT_IN, SUFFIXES, folder_files, open_source
from vgen.evaluation.arrays import ArrayMember
from vgen.media import KEY
from vgen.progress import progress
from vgen.types import Request, SettingError

LOSSLESS = {"PNG", "BMP", "TIFF", "GIF"}
MAX_FILE_BYTES = 1 << 28  # of one image
OUR_NAME = re.compile(r"\d+_c(\d+|none)_s\d+$")
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass
class Batch:
    """Images and what was measured while they were made."""

    pixels: Tensor  # (B, 3, H, W) uint8
    columns: dict[str, Tensor] = field(default_factory=dict)  # (B,) each


class ImageSet(Protocol):
    """N images of one size."""

    name: str
    labels: list[int] | None  # class of each image where it is known
    label_names: list[str] | None  # names by class id, where they have names
    columns: tuple[str, ...]  # what `read` measures besides
    facts: dict[str, Any]  # for the protocol: files, size, sampling settings
    warnings: list[str]
    cheap: bool  # reading costs little next to extracting features

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Batch:
        """Images start..stop."""
        ...

    def identity(self, start: int, stop: int) -> str | None:
        """What decides these images, where it is known without making them; None: their pixels do."""
        ...

    def describe(self, index: int) -> str:
        """Where image `index` is, for messages."""
        ...


def open_images(text: str, *, skip_broken: bool = False, data_root: Path | None = None) -> "ImageSet":
    """Open "fashion-mnist:test", a folder, an .npz or a .tar. Raises SettingError for anything else, or damaged files.

    "photos:test" is what training on the folder "photos" holds out, "photos:train" what it learns from.

    With `skip_broken`, files that cannot be read are left out and named in `facts["broken"]`.
    """
    name, _, split = text.partition(":")
    if name in BUILT_IN:
        if split not in ("train", "test"):
            raise SettingError(f"{text!r} names no split: write {name}:test or {name}:train")
        return SplitImages(text, data_root)
    path = Path(text).expanduser()
    if split in ("train", "test") and not path.exists() and (folder := Path(name).expanduser()).is_dir():
        wanted = {file for file, _ in folder_files(folder, split)[0]}
        entries = [entry for entry in _folder_entries(folder) if folder / entry.name in wanted]
        return FileImages(text, entries, skip_broken)
    if path.is_dir():
        tars = sorted(tar for tar in path.glob("*.tar") if tar.name[0] != ".")
        entries = _folder_entries(path)
        if tars and entries:
            raise SettingError(f"{text} holds both images and .tar files: evaluate one kind at a time")
        entries = entries or [entry for tar in tars for entry in _tar_entries(tar)]
        return FileImages(text, entries, skip_broken)
    if not path.is_file():
        sets = ", ".join(f"{known}:test" for known in BUILT_IN)
        raise SettingError(f"no images at {text!r}: give a folder, an .npz, a .tar, or a data set such as {sets}")
    if tarfile.is_tarfile(path):
        return FileImages(text, _tar_entries(path), skip_broken)
    if zipfile.is_zipfile(path):
        return ArrayImages(text, path)
    raise SettingError(f"{text} is neither an .npz nor an uncompressed .tar of images: give one, or a folder of PNG")


# ---- files


@dataclass(frozen=True)
class Entry:
    """One image file, wherever it lies."""

    name: str
    open: Callable[[], BinaryIO]
    group: str = ""  # name of its class folder
    label: int | None = None


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    format: str
    mode: str
    request: str | None


class FileImages:
    """Image files. All are checked before any work: a broken one found after hours would be found too late."""

    cheap = True
    columns: tuple[str, ...] = ()

    def __init__(self, name: str, entries: Sequence[Entry], skip_broken: bool) -> None:
        if not entries:
            raise SettingError(f"no images in {name}: expected files like 000000.png")
        self.name = name
        with progress(len(entries), f"check {name}", "files") as shown, ThreadPoolExecutor(2) as pool:
            headers = []
            for found in pool.map(_inspect, entries):
                headers.append(found)
                shown.advance()
        broken = [(e, h) for e, h in zip(entries, headers, strict=True) if isinstance(h, str)]
        if broken and (not skip_broken or len(broken) == len(entries)):
            first, why = broken[0]
            raise SettingError(
                f"{len(broken)} of {len(entries)} files in {name} cannot be read, first {first.name} ({why}): mend or "
                "remove them" + ("" if skip_broken else ", or leave them out with --skip-broken")
            )
        whole = [(e, h) for e, h in zip(entries, headers, strict=True) if isinstance(h, _Header)]
        self.entries = [entry for entry, _ in whole]
        self.labels, self.label_names = _labels(self.entries)
        self.facts, self.warnings = _facts(name, self.entries, [header for _, header in whole])
        if broken:
            self.facts["broken"] = [entry.name for entry, _ in broken]
            self.warnings.append(f"broken files left out of {name}: {len(broken)}, first {broken[0][0].name}")

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, start: int, stop: int) -> Batch:
        return Batch(torch.stack([self._image(index) for index in range(start, stop)]))

    def _image(self, index: int) -> Tensor:
        try:
            with self.entries[index].open() as file, Image.open(file) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except UNREADABLE as error:
            raise SettingError(f"cannot read {self.describe(index)} ({error}): mend or remove it") from error

    def identity(self, start: int, stop: int) -> str | None:
        return None

    def describe(self, index: int) -> str:
        return self.entries[index].name


def _inspect(entry: Entry) -> "_Header | str":
    """What is in a file, or why it cannot be read."""
    try:
        with entry.open() as file:
            file.seek(0, io.SEEK_END)
            if file.tell() > MAX_FILE_BYTES:
                return f"{file.tell()} bytes, over the limit of {MAX_FILE_BYTES}"
            file.seek(0)
            with Image.open(file) as image:
                mode = "RGBA" if "transparency" in image.info else image.mode
                found = _Header(image.size, image.format or "", mode, image.info.get(KEY))
                if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
                    return "more than 8 bits a channel, but 8-bit pixels are wanted"
                if image.format == "PNG":
                    image.verify()  # all checksums; decoding as well would double the cost of reading
                else:
                    image.load()
        return found
    except UnidentifiedImageError:
        return "no picture"
    except UNREADABLE as error:
        return " ".join(str(error).split()) or type(error).__name__


def _facts(name: str, entries: Sequence[Entry], headers: Sequence[_Header]) -> tuple[dict[str, Any], list[str]]:
    sizes = Counter(header.size for header in headers)
    if len(sizes) > 1:
        (usual, number), *others = sizes.most_common()
        odd, fewer = others[-1]
        example = next(e.name for e, h in zip(entries, headers, strict=True) if h.size == odd)
        raise SettingError(
            f"{name} mixes sizes: {number} images of {_size(usual)} and {fewer} of {_size(odd)}, such as {example}; "
            "evaluate images of one size"
        )
    formats = sorted({header.format for header in headers})
    facts = {"files": "+".join(formats).lower(), "size": _size(headers[0].size)}
    warnings = []
    if all(header.mode in ("1", "L") for header in headers):
        facts["grey"] = "as RGB"
    if any(header.mode in ("RGBA", "LA", "PA") for header in headers):
        warnings.append(f"{name} has images with transparency, which is dropped")
    if lossy := sum(header.format not in LOSSLESS for header in headers):
        warnings.append(f"{lossy} files of {name} may be compressed with loss, which changes FID: save PNG")
    runs = {_sampling(header.request) for header in headers if header.request}
    if len(runs) == 1 and all(header.request for header in headers):
        facts["sampling"] = json.loads(runs.pop())
    elif runs:
        warnings.append(f"{name} mixes images of {len(runs)} different requests, or with images of unknown origin")
    return facts, warnings


def _sampling(text: str) -> str:
    """What a request says of how images were sampled, less what differs from image to image."""
    try:
        return json.dumps(sampling_facts(Request.from_json(text)))
    except SettingError:
        return json.dumps({"request": "unreadable"})


def sampling_facts(request: Request) -> dict[str, Any]:
    """The part of a request that belongs into a protocol."""
    found = {"model": request.model, "checkpoint": request.checkpoint[:16], "sampler": request.sampler}
    place = {"dtype": request.dtype, "device": request.device, "vgen": request.vgen}
    return found | dict(sorted(request.settings.items())) | place


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _folder_entries(folder: Path) -> list[Entry]:
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    paths = [path for path in paths if path != folder / "sheet.png"]  # of `vgen sample --sheet`
    entries = []
    for path in sorted(paths):
        inside = path.relative_to(folder)
        group = inside.parts[0] if len(inside.parts) > 1 else ""
        entries.append(Entry(str(inside), partial(_open_file, path), group, _named_label(path.stem)))
    return entries


def _open_file(path: Path) -> BinaryIO:
    return path.open("rb")


def _tar_entries(path: Path) -> list[Entry]:
    """Images of a WebDataset: files of one stem are one sample, its class in .cls or in "label" or "cls" of .json."""
    entries, labels = [], {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, _, suffix = member.name.rpartition(".")
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                if f".{suffix.lower()}" in SUFFIXES:
                    entries.append((member.name, stem, member.offset_data, member.size))
                elif suffix in ("cls", "json") and member.size < 1 << 20:
                    labels[stem] = _tar_label(archive.extractfile(member), suffix)
            end = archive.offset
        with path.open("rb") as file:  # tarfile takes damage for the archive's end, which is a block of zeros
            file.seek(end)
            rest = file.read(2 * tarfile.RECORDSIZE)  # zeros fill up a record
            if not rest.startswith(bytes(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"it breaks off after {end} bytes")
            if any(rest):
                raise tarfile.ReadError("there is more after its end: was another one appended?")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SettingError(f"{path} is a damaged or compressed tar ({error}): get it again, or unpack it") from error
    return [
        Entry(name, partial(_tar_member, path, offset, size), "", labels.get(stem, _named_label(Path(stem).name)))
        for name, stem, offset, size in entries
    ]


def _tar_member(path: Path, offset: int, size: int) -> BinaryIO:
    with path.open("rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(min(size, MAX_FILE_BYTES + 1)))


def _tar_label(file: Any, suffix: str) -> int | None:
    with suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        content = json.loads(file.read())
        value = content if suffix == "cls" else content["label" if "label" in content else "cls"]
        return value if type(value) is int else None
    return None


def _named_label(stem: str) -> int | None:
    """The class in a file name of ours: 000123_c0007_s123."""
    found = OUR_NAME.search(stem)
    return int(found[1]) if found and found[1] != "none" else None


def _labels(entries: Sequence[Entry]) -> tuple[list[int] | None, list[str] | None]:
    """Classes by what the files say, else by their folders, which have names unless all are numbers."""
    known = [entry.label for entry in entries if entry.label is not None]
    if len(known) == len(entries):
        return known, None
    groups = sorted({entry.group for entry in entries})
    if len(groups) < 2 or "" in groups:
        return None, None
    if all(group.isdecimal() for group in groups):
        return [int(entry.group) for entry in entries], None
    return [groups.index(entry.group) for entry in entries], groups


# ---- arrays


class ArrayImages:
    """`arr_0` of an .npz, (N, H, W, 3) or (N, H, W) uint8, read from the archive piece by piece; classes in `arr_1`."""

    cheap = True
    columns: tuple[str, ...] = ()

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.warnings: list[str] = []
        self.array = ArrayMember(path, "arr_0")  # stays open: a compressed member can only be read in order
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3))):
            raise SettingError(f"arr_0 of {name} is {dtype} {shape}: expected uint8 (N, H, W, 3)")
        if min(shape) < 1:
            raise SettingError(f"arr_0 of {name} has the shape {shape}: it holds no images")
        self.shape = shape
        self.facts: dict[str, Any] = {"files": "npz", "size": _size((shape[2], shape[1]))}
        if len(shape) == 3 or shape[-1] == 1:
            self.facts["grey"] = "as RGB"
        self.labels = self._labels()
        self.label_names: list[str] | None = None

    def _labels(self) -> list[int] | None:
        with suppress(SettingError):
            array = ArrayMember(self.path, "arr_1")
            if array.shape == self.shape[:1] and array.dtype.kind in "iu":
                return array.read(0, self.shape[0]).tolist()
        return None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Batch:
        pixels = torch.from_numpy(self.array.read(start, stop))
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        return Batch(pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1))

    def identity(self, start: int, stop: int) -> str | None:
        return None

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


# ---- data sets


class SplitImages:
    """A split of a data set that is known by name."""

    cheap = True
    columns: tuple[str, ...] = ()

    def __init__(self, name: str, data_root: Path | None) -> None:
        known, _, split = name.partition(":")
        self.name = name
        self.warnings: list[str] = []
        size, channels = BUILT_IN[known].size, BUILT_IN[known].channels
        self.source = open_source(known, split, size, channels, data_root)
        self.labels: list[int] | None = self.source.labels.tolist()
        self.label_names: list[str] | None = self.source.class_names
        self.facts: dict[str, Any] = {"files": "data set", "size": _size((size, size))}
        if channels == 1:
            self.facts["grey"] = "as RGB"

    def __len__(self) -> int:
        return len(self.source.labels)

    def read(self, start: int, stop: int) -> Batch:
        return Batch(self.source.images(range(start, stop)).expand(-1, 3, -1, -1))

    def identity(self, start: int, stop: int) -> str | None:
        return None

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


def pixel_bytes(pixels: Tensor) -> bytes:
    """What hashes of images are taken of."""
    return pixels.contiguous().numpy().tobytes()


def image_digests(pixels: Tensor) -> Tensor:
    """64 bits of a hash of every image of (B, 3, H, W), as int64: equal for equal images."""
    found = [hashlib.blake2b(pixel_bytes(image), digest_size=8).digest() for image in pixels]
    return torch.tensor([int.from_bytes(value, "big", signed=True) for value in found])


def chunks(number: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0..number."""
    return ((start, min(start + size, number)) for start in range(0, number, size))
