"""Parts of a run put together: checked for what is missing, twice there or damaged, and written as one run's files."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vgen.files import atomic_file, sha256
from vgen.ledger import RUN_FILE, Line, check_same, manifests, read_facts, read_manifest, write_manifest
from vgen.outputs import end_archive, pixel_hash, write_npz
from vgen.progress import progress
from vgen.types import SettingError

MAX_NAMED = 5  # items in a message


@dataclass(frozen=True)
class Part:
    """Where an item is: its line, the folder, and what its shard's files have in their names."""

    line: Line
    folder: Path
    infix: str

    @property
    def name(self) -> str:
        return f"item {self.line['index']} in {self.folder}"


def merge(folders: Sequence[Path], out: Path | None = None, verify: bool = True) -> list[Path]:
    """Join the parts of one run; returns what was written.

    Args:
        folders: that 'vgen sample' wrote, with any of the run's shards.
        out: a folder for all of a single run's files, or an .npz of all images as ADM's evaluator reads it (`arr_0`
            (N, H, W, 3) uint8, labels as `arr_1`), written image by image. None: into the folder, where there is one.
        verify: read every file and compare it with its hash.

    Raises SettingError where the folders are of different runs, items are missing or in two folders, or files are gone
    or damaged. Nothing is changed then.
    """
    if out is None and len(folders) > 1:
        raise SettingError(f"{len(folders)} folders are to be merged: say where to, with --out")
    facts = read_facts(folders[0])
    for folder in folders[1:]:
        read_facts(folder)
        check_same(folder, facts)
    parts = _collect(folders, facts["items"])
    if verify:
        _verify(parts)
    if out is not None and out.suffix == ".npz":
        _write_array(parts, out, facts)
        return [out]
    target = folders[0] if out is None else out
    if target not in folders:
        check_same(target, facts)
        target.mkdir(parents=True, exist_ok=True)
    written = _join_large_files(parts, target, facts)
    for part in parts:
        for name in part.line["files"]:
            if part.folder != target:
                _copy(part.folder / name, target / name)
            written.append(target / name)
    _write_records(parts, folders, target)
    return written


def _collect(folders: Sequence[Path], items: int) -> list[Part]:
    """All items in order, each once."""
    found: dict[int, Part] = {}
    for folder in folders:
        own: dict[int, Part] = {}
        for path in manifests(folder):
            infix = path.name.removeprefix("manifest").removesuffix(".jsonl")
            own |= {line["index"]: Part(line, folder, infix) for line in read_manifest(path)}
        if twice := sorted(own.keys() & found.keys()):
            raise SettingError(f"{_named(twice)} in both {found[twice[0]].folder} and {folder}: leave one of them out")
        found |= own
    if missing := sorted(set(range(items)) - found.keys()):
        raise SettingError(f"{_named(missing)} missing of {items}: finish the shards they belong to, then merge")
    if strange := sorted(found.keys() - set(range(items))):
        raise SettingError(f"{_named(strange)} not part of this run of {items}: its folder was tampered with")
    return [found[index] for index in range(items)]


def _named(indices: Sequence[int]) -> str:
    listed = ", ".join(str(index) for index in indices[:MAX_NAMED])
    more = f" and {len(indices) - MAX_NAMED} more" if len(indices) > MAX_NAMED else ""
    return f"item{'s' if len(indices) > 1 else ''} {listed}{more} {'are' if len(indices) > 1 else 'is'}"


def _verify(parts: Sequence[Part]) -> None:
    with progress(len(parts), "verify", "items") as shown:
        for part in parts:
            for name, wanted in part.line["files"].items():
                path = part.folder / name
                if not path.exists():
                    raise SettingError(f"{path} is gone: sample that shard again, which makes what is missing")
                found = sha256(*sorted(path.iterdir())) if path.is_dir() else sha256(path)
                if found != wanted:
                    raise SettingError(f"{path} is not what was written: remove it and sample that shard again")
            shown.advance()


# ---- the files that hold many items


def _join_large_files(parts: Sequence[Part], target: Path, facts: dict[str, Any]) -> list[Path]:
    """samples.npz and samples.tar of all shards, where the run has them."""
    written: list[Path] = []
    sharded = {(part.folder, part.infix) for part in parts} != {(target, "")}
    for form, suffix in (("npz", ".npz"), ("webdataset", ".tar")):
        if form not in facts["formats"] or "fps" in facts:  # a video's npz is a file of its own
            continue
        path = target / f"samples{suffix}"
        written.append(path)
        if sharded:
            (_write_array if form == "npz" else _write_archive)(parts, path, facts)
            for part in {(part.folder, part.infix) for part in parts if part.folder == target and part.infix}:
                (target / f"samples{part[1]}{suffix}").unlink(missing_ok=True)
    return written


def _write_array(parts: Sequence[Part], path: Path, facts: dict[str, Any]) -> None:
    """All images as one npz, whichever form they have."""
    if "fps" in facts:
        raise SettingError(f"{path.name} is for images, and this run is of videos: merge into a folder")
    with ExitStack() as stack:
        if "npz" in facts["formats"]:
            rows = _array_rows(parts, stack)
        elif "png" in facts["formats"]:
            rows = _picture_rows(parts)
        else:
            raise SettingError("this run has its images in a tar alone: sample with --format npz or png for an npz")
        first = next(rows)
        labels = [part.line["class"] for part in parts]
        write_npz(path, _pixels(parts, first, rows), (len(parts), *first.shape), labels)


def _pixels(parts: Sequence[Part], first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[bytes]:
    """The bytes of all images, each checked against its hash."""
    image: np.ndarray | None = first
    for part in parts:
        if image is None:
            image = next(rest)
        if image.shape != first.shape:
            raise SettingError(f"{part.name} has the shape {image.shape}, others {first.shape}: an npz needs one size")
        if pixel_hash(image) != part.line.get("pixels"):
            raise SettingError(f"{part.name} is not what was written: sample that shard again with --overwrite")
        yield image.tobytes()
        image = None


def _picture_rows(parts: Sequence[Part]) -> Iterator[np.ndarray]:
    for part in parts:
        name = next(name for name in part.line["files"] if name.endswith(".png"))
        with Image.open(part.folder / name) as picture:
            yield np.asarray(picture.convert("RGB"))


def _array_rows(parts: Sequence[Part], stack: ExitStack) -> Iterator[np.ndarray]:
    """Rows of the shards' arrays, each read from front to back."""
    members: dict[Path, Any] = {}
    for part in parts:
        path = _large_file(part, ".npz")
        if path not in members:
            archive = stack.enter_context(zipfile.ZipFile(path))
            member = stack.enter_context(archive.open("arr_0.npy"))
            np.lib.format.read_magic(member)
            shape, _, _ = np.lib.format.read_array_header_1_0(member)
            members[path] = (member, shape[1:])
        member, shape = members[path]
        raw = member.read(int(np.prod(shape)))
        if len(raw) != np.prod(shape):
            raise SettingError(f"{path} is cut short: sample that shard again with --overwrite")
        yield np.frombuffer(raw, np.uint8).reshape(shape)


def _write_archive(parts: Sequence[Part], path: Path, facts: dict[str, Any]) -> None:
    """The members of the shards' archives in the order of all items."""
    with ExitStack() as stack, atomic_file(path) as partial, partial.open("wb") as file:
        opened: dict[Path, Any] = {}
        for part in parts:
            source = _large_file(part, ".tar")
            if source not in opened:
                opened[source] = stack.enter_context(source.open("rb"))
            content = opened[source].read(part.line["tar_end"] - opened[source].tell())
            if not content or len(content) % tarfile.BLOCKSIZE:
                raise SettingError(f"{source} is cut short: sample that shard again with --overwrite")
            file.write(content)
        end_archive(file)


def _large_file(part: Part, suffix: str) -> Path:
    path = part.folder / f"samples{part.infix}{suffix}"
    if not path.is_file():
        raise SettingError(f"{path} is missing: run that shard's command again, which finishes it")
    return path


# ---- the others


def _copy(source: Path, target: Path) -> None:
    """A file or a folder of frames, by a link where the file system has them."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for inside in source.iterdir():
            _copy(inside, target / inside.name)
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_records(parts: Sequence[Part], folders: Sequence[Path], target: Path) -> None:
    """run.json and the manifest of a single run, whose archive ends where its own members do."""
    if target not in folders:
        _copy(folders[0] / RUN_FILE, target / RUN_FILE)
    end, lines = 0, []
    before: dict[tuple[Path, str], int] = {}
    for part in parts:
        line = dict(part.line)
        if stop := line.get("tar_end"):
            shard = (part.folder, part.infix)
            end += stop - before.get(shard, 0)
            before[shard] = stop
            line["tar_end"] = end
        lines.append(line)
    write_manifest(target, lines)
