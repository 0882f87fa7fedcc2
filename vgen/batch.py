"""Many samples to files, images or videos: what is drawn, under which names, with the request inside each."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vgen.media import contact_sheet, save_png, sheet_zoom
from vgen.progress import progress
from vgen.types import Request, SettingError
from vgen.videos import MAX_FPS, MAX_GIF_FPS, MIN_FPS, save_video, video_sheet

VIDEO_FORMATS = {"mp4": ".mp4", "gif": ".gif", "png": "", "npz": ".npz"}  # and their suffixes; "png" is a folder


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
        if unknown := [name for name in self.formats if name not in VIDEO_FORMATS]:
            raise SettingError(f"unknown format {unknown[0]!r}: use one or more of {', '.join(VIDEO_FORMATS)}")
        if not self.formats:
            raise SettingError(f"no format was named: use one or more of {', '.join(VIDEO_FORMATS)}")
        limit = MAX_GIF_FPS if "gif" in self.formats else MAX_FPS
        if not MIN_FPS <= self.fps <= limit:
            what = "a GIF shows" if "gif" in self.formats else "there are"
            remedy = "; leave gif out of the formats for more" if limit < self.fps <= MAX_FPS else ""
            bounds = f"it must be at least {MIN_FPS:g}, and {what} at most {limit:g}"
            raise SettingError(f"fps is {self.fps:g}: {bounds}{remedy}")


def plan(class_labels: Sequence[int] | None, per_class: int, seed: int) -> list[Item]:
    """Item i has seed `seed + i` and class `class_labels[i // per_class]`."""
    if per_class < 1:
        raise SettingError(f"per-class is {per_class}: it must be at least 1")
    labels: Sequence[int | None] = [None] if class_labels is None else class_labels
    return [Item(i, labels[i // per_class], seed + i) for i in range(len(labels) * per_class)]


def sample_to_files(
    pipeline: Any,
    items: Sequence[Item],
    out: Path,
    *,
    settings: dict[str, Any],
    sampler: str | None = None,
    batch_size: int = 16,
    sheet_columns: int = 0,
    videos: VideoFiles | None = None,
) -> list[Path]:
    """Sample every item into `out`, images as PNG, videos as `videos` says, with their requests; the files in order.

    Each file is whole or absent. With `sheet_columns` a contact sheet is written beside them: of images with so many
    columns, of videos with a row each.
    """
    if batch_size < 1:
        raise SettingError(f"batch-size is {batch_size}: it must be at least 1")
    paths: list[Path] = []
    made: list[Any] = []  # for the sheet: images, or clips (F, H, W, 3)
    films = (videos or VideoFiles()) if pipeline.makes_videos else None
    with progress(len(items), "sample", "videos" if films else "images") as shown:
        for start in range(0, len(items), batch_size):
            chunk = items[start : start + batch_size]
            for item, sample, request in _sample(pipeline, chunk, settings, sampler):
                paths += _write(sample, out / item.stem, request, films)
                made += [sample] if sheet_columns else []
            shown.advance(len(chunk))
    if sheet_columns:
        sheet = (
            video_sheet(made) if films is not None else contact_sheet(made, sheet_columns, sheet_zoom(made[0].width))
        )
        save_png(sheet, out / "sheet.png")
    return paths


def _write(sample: Any, stem: Path, request: Request, films: VideoFiles | None) -> list[Path]:
    """The files of one image, or of one video (F, H, W, 3)."""
    if films is None:
        save_png(sample, path := stem.with_name(f"{stem.name}.png"), request)
        return [path]
    paths = [stem.with_name(stem.name + VIDEO_FORMATS[name]) for name in films.formats]
    for path in paths:
        save_video(sample, path, films.fps, request)
    return paths


def _sample(
    pipeline: Any, items: Sequence[Item], settings: dict[str, Any], sampler: str | None
) -> Iterator[tuple[Item, Any, Request]]:
    """Each item with its image, or its frames (F, H, W, 3) uint8, and the request that makes it again."""
    labels = None if items[0].class_label is None else [item.class_label for item in items]
    seeds = [item.seed for item in items]
    output = pipeline(class_labels=labels, seeds=seeds, sampler=sampler, **settings)
    request = pipeline.request(labels, seeds, sampler, settings)
    samples: Sequence[Image.Image | np.ndarray] = output.images
    if pipeline.makes_videos:
        samples = [np.stack([np.asarray(frame) for frame in video]) for video in output.frames]
    for row, (item, sample) in enumerate(zip(items, samples, strict=True)):
        yield item, sample, request.row(row)


def from_request(request: Request, seed: int | None = None) -> list[Item]:
    """The items that a request read from a file describes, with other seeds from `seed` on when given."""
    if seed is not None:
        request = dataclasses.replace(request, seeds=[seed + i for i in range(len(request.seeds))])
    labels: Sequence[int | None] = request.class_labels or [None] * len(request.seeds)
    return [Item(i, label, s) for i, (label, s) in enumerate(zip(labels, request.seeds, strict=True))]
