"""Many samples to files: what is drawn, under which names, with the request inside each."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vgen.media import contact_sheet, save_png, sheet_zoom
from vgen.progress import progress
from vgen.types import Request, SettingError


@dataclass(frozen=True)
class Item:
    """One image of a run. Its seed and class follow from its index alone."""

    index: int
    class_label: int | None
    seed: int

    @property
    def name(self) -> str:
        """File name: sortable, class and seed visible."""
        label = "none" if self.class_label is None else f"{self.class_label:04}"
        return f"{self.index:06}_c{label}_s{self.seed}.png"


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
) -> list[Path]:
    """Sample every item into `out` as a PNG that carries its request; returns the files in order.

    Each file is whole or absent. With `sheet_columns` a contact sheet of all images is written beside them.
    """
    if batch_size < 1:
        raise SettingError(f"batch-size is {batch_size}: it must be at least 1")
    paths: list[Path] = []
    tiles: list[Image.Image] = []
    with progress(len(items), "sample", "images") as shown:
        for start in range(0, len(items), batch_size):
            chunk = items[start : start + batch_size]
            for item, image, request in _sample(pipeline, chunk, settings, sampler):
                paths.append(out / item.name)
                save_png(image, paths[-1], request)
                tiles += [image] if sheet_columns else []
            shown.advance(len(chunk))
    if sheet_columns:
        save_png(contact_sheet(tiles, sheet_columns, sheet_zoom(tiles[0].width)), out / "sheet.png")
    return paths


def _sample(
    pipeline: Any, items: Sequence[Item], settings: dict[str, Any], sampler: str | None
) -> Iterator[tuple[Item, Image.Image, Request]]:
    labels = None if items[0].class_label is None else [item.class_label for item in items]
    seeds = [item.seed for item in items]
    images = pipeline(class_labels=labels, seeds=seeds, sampler=sampler, **settings).images
    request = pipeline.request(labels, seeds, sampler, settings)
    for row, (item, image) in enumerate(zip(items, images, strict=True)):
        yield item, image, request.row(row)


def from_request(request: Request, seed: int | None = None) -> list[Item]:
    """The items that a request read from a file describes, with other seeds from `seed` on when given."""
    if seed is not None:
        request = dataclasses.replace(request, seeds=[seed + i for i in range(len(request.seeds))])
    labels: Sequence[int | None] = request.class_labels or [None] * len(request.seeds)
    return [Item(i, label, s) for i, (label, s) in enumerate(zip(labels, request.seeds, strict=True))]
