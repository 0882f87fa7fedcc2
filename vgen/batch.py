"""Many samples to files, images or videos, in a run that can be left alone: it goes on where it was stopped, in parts
on as many machines as there are, and gives the same files however it was done.

A thread writes while the next batch is sampled. A batch that does not fit in memory is halved.
"""

import dataclasses
import hashlib
import json
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from vgen.ledger import Ledger, Line, Shard
from vgen.media import contact_sheet, save_png, sheet_zoom
from vgen.memory import is_out_of_memory
from vgen.outputs import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    Archive,
    ArrayFile,
    ClipFiles,
    ImageFiles,
    Item,
    PictureFiles,
    Sink,
    VideoFiles,
    pixel_hash,
)
from vgen.progress import progress
from vgen.types import Request, SettingError
from vgen.videos import read_video, video_sheet

__all__ = ["IMAGE_FORMATS", "VIDEO_FORMATS", "ImageFiles", "Item", "Shard", "VideoFiles", "plan", "sample_to_files"]

FIRST_BATCH, LARGEST_BATCH = 16, 1024  # of "auto"
GAIN = 1.05  # what twice the batch must bring in speed to be worth it
WAITING = 2  # batches that may wait to be written


@dataclass(frozen=True)
class Made:
    """What a call has done: all files of its items in order, how many were made now, and in how many seconds."""

    paths: list[Path]
    made: int
    there: int  # before
    seconds: float


def plan(class_labels: Sequence[int] | None, per_class: int, seed: int) -> list[Item]:
    """Item i has seed `seed + i` and class `class_labels[i // per_class]`."""
    if per_class < 1:
        raise SettingError(f"per-class is {per_class}: it must be at least 1")
    labels: Sequence[int | None] = [None] if class_labels is None else class_labels
    return [Item(i, labels[i // per_class], seed + i) for i in range(len(labels) * per_class)]


def from_request(request: Request, seed: int | None = None) -> list[Item]:
    """The items that a request read from a file describes, with other seeds from `seed` on when given."""
    if seed is not None:
        request = dataclasses.replace(request, seeds=[seed + i for i in range(len(request.seeds))])
    labels: Sequence[int | None] = request.class_labels or [None] * len(request.seeds)
    return [Item(i, label, s) for i, (label, s) in enumerate(zip(labels, request.seeds, strict=True))]


def sample_to_files(
    pipeline: Any,
    items: Sequence[Item],
    out: Path,
    *,
    settings: dict[str, Any],
    sampler: str | None = None,
    batch_size: int | None = FIRST_BATCH,
    sheet_columns: int = 0,
    files: ImageFiles | VideoFiles | None = None,
    shard: Shard | None = None,
    overwrite: bool = False,
) -> Made:
    """Sample every item of a run, or of its `shard`, into `out`; what is there already is left.

    Each file is whole or absent. `run.json` and a manifest beside them say what the run is and what is done.

    Args:
        pipeline: of any family.
        items: all of the run; those of other shards are left to others.
        settings, sampler: of the pipeline's call.
        batch_size: sampled at once, which changes speed and not images; None grows it while that pays.
        sheet_columns: if not 0, a contact sheet of all items is written too: images with so many columns, a row for
            each video.
        files: which files images or videos become; PNG, or all kinds of video files.
        overwrite: replace another run in `out`.

    Raises SettingError where `out` holds another run, or a value is out of bounds.
    """
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"batch-size is {batch_size}: it must be at least 1")
    began, part = time.monotonic(), shard or Shard()
    files = files or usual_files(pipeline)
    check_sheet(sheet_columns, files, part)
    own = [item for item in items if part.takes(item.index)]
    facts = run_facts(pipeline, items, settings, sampler, files)
    ledger = Ledger(out, facts, part, overwrite)
    _sweep(out, own, part)
    sinks = make_sinks(out, own, files, part)
    done = {i: line for i, line in ledger.lines.items() if part.takes(i)}
    there = set.intersection(*(sink.resume(done) for sink in sinks)) if own else set()
    todo = [item for item in own if item.index not in there]
    with (
        terminating(),
        progress(len(own), "sample", _unit(pipeline), start=len(there)) as shown,
        Writer(sinks, ledger) as writer,
    ):
        for batch in sampled(pipeline, todo, settings, sampler, batch_size):
            writer.put(batch)
            shown.advance(len(batch))
    if own:
        for sink in sinks:
            sink.finish()
    if part.count == 1 and own:
        ledger.join()
    if sheet_columns:
        write_sheet(out, own, files, sheet_columns)
    return Made(written_files(out, own, files, part), len(todo), len(there), time.monotonic() - began)


def usual_files(pipeline: Any) -> ImageFiles | VideoFiles:
    """What a pipeline's samples become when nobody says."""
    return VideoFiles() if pipeline.makes_videos else ImageFiles()


def check_sheet(columns: int, files: ImageFiles | VideoFiles, shard: Shard) -> None:
    """Raise SettingError where a contact sheet is wanted of what is not there to look at."""
    if columns and isinstance(files, ImageFiles) and "png" not in files.formats:
        raise SettingError(f"a sheet is made of PNG files, and the formats are {', '.join(files.formats)}: add png")
    if columns and shard.count > 1:
        raise SettingError(f"a sheet is of a whole run, not of shard {shard.index}/{shard.count}: leave it out")


def run_facts(
    pipeline: Any,
    items: Sequence[Item],
    settings: dict[str, Any],
    sampler: str | None,
    files: ImageFiles | VideoFiles,
) -> dict[str, Any]:
    """What decides a run's files, as run.json keeps it: not the batch, nor who makes which part."""
    if not items:
        raise SettingError("a run without items makes nothing: name classes, or more images per class")
    labels = None if items[0].class_label is None else [items[0].class_label]
    facts = dataclasses.asdict(pipeline.request(labels, [items[0].seed], sampler, settings))
    del facts["class_labels"], facts["seeds"], facts["origin"]
    listed = json.dumps([[item.index, item.class_label, item.seed] for item in items])
    facts |= {"items": len(items), "first_seed": items[0].seed, "plan": hashlib.sha256(listed.encode()).hexdigest()}
    facts["classes"] = sorted({-1 if item.class_label is None else item.class_label for item in items})
    facts |= {"formats": sorted(files.formats)} | ({"fps": files.fps} if isinstance(files, VideoFiles) else {})
    return json.loads(json.dumps(facts))  # as it comes back from the file


def make_sinks(out: Path, items: Sequence[Item], files: ImageFiles | VideoFiles, shard: Shard) -> list[Sink]:
    """What takes a run's samples, in the order of its formats."""
    if isinstance(files, VideoFiles):
        return [ClipFiles(out, files)]
    kinds: dict[str, Sink] = {
        "png": PictureFiles(out),
        "npz": ArrayFile(out, items, shard.infix),
        "webdataset": Archive(out, items, shard.infix),
    }
    return [kinds[name] for name in dict.fromkeys(files.formats)]


def _sweep(out: Path, items: Sequence[Item], shard: Shard) -> None:
    """Remove what a process that was killed had begun to write: temporary files of this shard's items."""
    stems = {item.stem for item in items}
    large = {f"samples{shard.infix}", *(("manifest", "run", "samples", "sheet") if shard.count == 1 else ())}
    for path in out.glob(".*.tmp"):
        begun = path.name[1:].rsplit(".", 2)[0]  # .NAME.RANDOM.tmp
        if begun in stems or begun.rpartition(".")[0] in stems | large:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- sampling


@dataclass
class Sample:
    """An item, its image or frames (F, H, W, 3) uint8, and what they came of."""

    item: Item
    pixels: Any
    request: Request
    evaluations: int
    milliseconds: float


def sampled(
    pipeline: Any, items: Sequence[Item], settings: dict[str, Any], sampler: str | None, batch_size: int | None
) -> Iterator[list[Sample]]:
    """Batches of samples of all items in order."""
    size, place, best = batch_size or FIRST_BATCH, 0, 0.0
    growing = batch_size is None
    while place < len(items):
        chunk = items[place : place + size]
        began = time.monotonic()
        try:
            batch = _sample(pipeline, chunk, settings, sampler)
        except Exception as error:
            if len(chunk) == 1 or not is_out_of_memory(error):
                raise
            size, growing = max(1, len(chunk) // 2), False
            print(f"vgen: {len(chunk)} at a time do not fit in memory, going on with {size}", file=sys.stderr)
            continue
        yield batch
        place += len(chunk)
        if growing and len(chunk) == size:
            speed = len(chunk) / (time.monotonic() - began)
            if best and speed < GAIN * best:
                size, growing = (size if speed > best else size // 2), False
            elif size >= LARGEST_BATCH:
                growing = False
            else:
                size, best = 2 * size, speed


def _sample(pipeline: Any, items: Sequence[Item], settings: dict[str, Any], sampler: str | None) -> list[Sample]:
    """Each item with its sample and the request that makes it again."""
    labels = None if items[0].class_label is None else [item.class_label for item in items]
    seeds = [item.seed for item in items]
    began = time.monotonic()
    output = pipeline(class_labels=labels, seeds=seeds, sampler=sampler, **settings)
    each = 1000 * (time.monotonic() - began) / len(items)
    request = pipeline.request(labels, seeds, sampler, settings)
    samples: Sequence[Image.Image | np.ndarray]
    if pipeline.makes_videos:
        samples = [np.stack([np.asarray(frame) for frame in video]) for video in output.frames]
    else:
        samples = output.images
    return [
        Sample(item, sample, request.row(row), output.evaluations, each)
        for row, (item, sample) in enumerate(zip(items, samples, strict=True))
    ]


class Writer:
    """A thread that gives batches to all sinks and then to the ledger, a few batches behind.

    What goes wrong there is raised by the next `put`, or where the block ends; an interrupted block waits until all
    that was sampled is written.
    """

    def __init__(self, sinks: Sequence[Sink], ledger: Ledger) -> None:
        self.sinks, self.ledger = sinks, ledger
        self.waiting: queue.Queue[list[Sample] | None] = queue.Queue(WAITING)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="vgen-writer", daemon=True)

    def __enter__(self) -> "Writer":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> None:
        self.waiting.put(None)
        self.thread.join()
        if kind is None:
            self._check()

    def put(self, batch: list[Sample]) -> None:
        self._check()
        self.waiting.put(batch)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while (batch := self.waiting.get()) is not None:
            if self.error is None:
                try:
                    self._write(batch)
                except BaseException as error:  # for the thread that samples to raise
                    self.error = error

    def _write(self, batch: list[Sample]) -> None:
        lines: list[Line] = []
        self.ledger.begin()
        try:
            for sample in batch:
                line: Line = {
                    "index": sample.item.index,
                    "class": sample.item.class_label,
                    "seed": sample.item.seed,
                    "pixels": pixel_hash(sample.pixels),
                    "files": {},
                    "evaluations": sample.evaluations,
                    "ms": round(sample.milliseconds, 3),
                }
                for sink in self.sinks:
                    line |= sink.add(sample.item, sample.pixels, sample.request)
                lines.append(line)
        finally:
            if lines:
                self.ledger.add(lines)


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM stops the block as Ctrl-C does, with what was sampled being written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- afterwards


def _unit(pipeline: Any) -> str:
    return "videos" if pipeline.makes_videos else "images"


def written_files(
    out: Path, items: Sequence[Item], files: ImageFiles | VideoFiles, shard: Shard | None = None
) -> list[Path]:
    """All files of the items, in their order, those that hold many behind them."""
    if isinstance(files, VideoFiles):
        return [out / f"{item.stem}{VIDEO_FORMATS[name]}" for item in items for name in files.formats]
    infix = (shard or Shard()).infix
    paths = [out / item.name for item in items] if "png" in files.formats else []
    large = {"npz": f"samples{infix}.npz", "webdataset": f"samples{infix}.tar"}
    return paths + [out / name for form, name in large.items() if form in files.formats]


def write_sheet(out: Path, items: Sequence[Item], files: ImageFiles | VideoFiles, columns: int) -> None:
    """A contact sheet of the items, sheet.png, read back from their files."""
    if isinstance(files, VideoFiles):
        exact = next(name for name in ("npz", "png", "gif", "mp4") if name in files.formats)
        sheet = video_sheet([read_video(out / f"{item.stem}{VIDEO_FORMATS[exact]}")[0] for item in items])
    else:
        pictures = []
        for item in items:
            with Image.open(out / item.name) as picture:
                pictures.append(picture.convert("RGB"))
        sheet = contact_sheet(pictures, columns, sheet_zoom(pictures[0].width))
    save_png(sheet, out / "sheet.png")


# ---- beforehand


def estimate(
    pipeline: Any,
    items: Sequence[Item],
    *,
    settings: dict[str, Any],
    sampler: str | None = None,
    files: ImageFiles | VideoFiles | None = None,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """What a run would take, from one item that is sampled and thrown away: items, evaluations, seconds and bytes.

    Seconds are of one item at a time after another; larger batches are faster.
    """
    part, files = shard or Shard(), files or usual_files(pipeline)
    own = [item for item in items if part.takes(item.index)]
    if not own:
        raise SettingError(f"shard {part.index}/{part.count} has none of the {len(items)} items: use fewer shards")
    _sample(pipeline, own[:1], settings, sampler)  # to warm up
    (sample,) = _sample(pipeline, own[:1], settings, sampler)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for sink in make_sinks(Path(folder), own[:1], files, Shard()):
            sink.add(sample.item, sample.pixels, sample.request)
            sink.finish()
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    each = sample.milliseconds / 1000 + time.monotonic() - began
    return {
        "items": len(items),
        "items_of_this_shard": len(own),
        "items_by_shard": [sum(item.index % part.count == k for item in items) for k in range(part.count)],
        "evaluations_per_item": sample.evaluations,
        "seconds_per_item": each,
        "seconds": each * len(own),
        "bytes_per_item": written,
        "bytes": written * len(own),
        "run": run_facts(pipeline, items, settings, sampler, files),
    }
