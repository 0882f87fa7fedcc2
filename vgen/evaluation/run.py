"""From the options of `vgen evaluate` to printed figures and written files."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vgen import hub
from vgen.batch import plan
from vgen.evaluation import video
from vgen.evaluation.curves import evaluate_grid, parse_grid
from vgen.evaluation.evaluate import (
    Evaluator,
    Options,
    build_extractors,
    make_statistics,
    open_reference,
    parse_metrics,
)
from vgen.evaluation.extractors import ExtractorOptions
from vgen.evaluation.features import processes
from vgen.evaluation.images import ImageSet, open_images
from vgen.evaluation.inception import cache_root
from vgen.evaluation.report import Report
from vgen.evaluation.sampled import ReconstructedImages, SampledImages
from vgen.files import sha256, weight_files
from vgen.media import contact_sheet, save_png, sheet_zoom, to_pil
from vgen.types import SettingError

DEFAULT_METRICS, DEFAULT_OF_TOKENIZERS = "fid,kid,prc", "rfid,psnr,ssim"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `vgen evaluate` was asked to do; see its help."""

    images: str | None = None
    reference: str | None = None
    metrics: str | None = None
    tokenizer: str | None = None
    train: str | None = None
    json_file: Path | None = None
    save_statistics: Path | None = None
    nearest_sheet: Path | None = None
    grid: list[str] = field(default_factory=list)
    out: Path = Path("curve")
    weights: Path | None = None
    fvd_weights: Path | None = None
    resize: str = "legacy"
    extractor_dtype: str = "float32"
    neighbours: int = 3
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    splits: int = 10
    skip_broken: bool = False
    cache: Path | None = None
    batch_size: int = 64
    per_class: int = 50
    seed: int = 0
    sampler: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    data_root: Path | None = None

    def open(self, text: str) -> ImageSet:
        return open_images(text, skip_broken=self.skip_broken, data_root=self.data_root)

    def options(self) -> Options:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = hub.parse_dtype(self.extractor_dtype)
        return Options(
            extractors=ExtractorOptions(weights=self.weights, resize=self.resize, device=device, dtype=kind),
            neighbours=self.neighbours,
            subsets=self.kid_subsets,
            subset_size=self.kid_subset_size,
            splits=self.splits,
            batch_size=self.batch_size,
            cache=self.cache or cache_root() / "features",
        )


def run(task: Task, classes: Callable[[Any], list[int] | None]) -> bool:
    """Carry out a task and print its figures; returns whether broken files were left out.

    `classes` gives the class ids to sample from a pipeline. Raises SettingError for a task that makes no sense.
    """
    if task.metrics and set(task.metrics.split(",")) & set(video.METRICS):
        _videos(task)
        return False
    names = task.metrics or (DEFAULT_OF_TOKENIZERS if task.tokenizer else DEFAULT_METRICS)
    asked = parse_metrics(names, reconstructed=task.tokenizer is not None)
    if (task.images is None) == (task.tokenizer is None):
        raise SettingError("name the images or a model to evaluate, or a --tokenizer, and not both")
    folder = hub.find_local(task.images) if task.images else None
    if task.grid and folder is None:
        raise SettingError("--grid samples from a model: name one, bundled or a folder")
    if folder is None and (task.settings or task.sampler):
        raise SettingError(f"{next(iter(task.settings), 'sampler')} is for sampling: name a model, not images")
    options = task.options()
    extractors = build_extractors(asked, options.extractors)  # before files are checked: that may take long
    if task.save_statistics is not None and task.reference is None:
        make_statistics(_images(task, folder, classes), asked, extractors, task.save_statistics, options)
        _print(task.save_statistics)
        return False
    reference = (
        open_reference(task.reference, skip_broken=task.skip_broken, data_root=task.data_root)
        if (task.reference)
        else None
    )
    if task.tokenizer is not None:
        if reference is None or reference.images is None:
            raise SettingError("--tokenizer reconstructs images: name them with --reference")
        images: ImageSet = _reconstructed(task, reference.images)
    elif not task.grid:
        images = _images(task, folder, classes)
    train = task.open(task.train) if task.train else None
    evaluator = Evaluator(asked, extractors, reference, train, options)
    if task.grid:
        pipeline = _pipeline(task, str(task.images))
        items = plan(classes(pipeline), task.per_class, task.seed)
        for point, report in evaluate_grid(
            pipeline, items, task.settings, task.sampler, parse_grid(task.grid), evaluator, task.out
        ):
            _show(report, " ".join(f"{name}={value}" for name, value in point.items()))
        _print(task.out / "curve.png")
        return False
    report = evaluator.run(images)
    if report is not None:
        _show(report)
        if task.json_file is not None:
            report.save(task.json_file)
        if task.nearest_sheet is not None and train is not None:
            save_nearest(report, images, train, task.nearest_sheet)
    sources = [images, train, reference.images if reference else None]
    return any("broken" in source.facts for source in sources if source is not None)


def _images(task: Task, folder: Path | None, classes: Callable[[Any], list[int] | None]) -> ImageSet:
    """Samples where a model was named, else images that are there."""
    if folder is None:
        return task.open(str(task.images))
    pipeline = _pipeline(task, str(task.images))
    items = plan(classes(pipeline), task.per_class, task.seed)
    return SampledImages(pipeline, items, task.settings, task.sampler)


def _pipeline(task: Task, name: str) -> Any:
    pipeline = hub.load(name, device=task.device, dtype=task.dtype)
    pipeline.resolve_settings(task.settings)
    pipeline.check_tokenizer()
    return pipeline


def _reconstructed(task: Task, originals: ImageSet) -> ReconstructedImages:
    name = str(task.tokenizer)
    tokenizer, folder = hub.load_tokenizer(name, device=task.device, dtype=task.dtype)
    return ReconstructedImages(tokenizer, name, sha256(*weight_files(folder)), originals)


def _videos(task: Task) -> None:
    if task.images is None or task.reference is None:
        raise SettingError("metrics of videos compare videos with a --reference: name both")
    videos, reference = video.open_videos(task.images), video.open_videos(task.reference)
    names = [name.strip() for name in str(task.metrics).split(",")]
    report = video.evaluate_videos(
        videos, reference, names, i3d=task.fvd_weights, device=task.options().extractors.device
    )
    _show(report)
    if task.json_file is not None:
        report.save(task.json_file)


def save_nearest(report: Report, images: ImageSet, train: ImageSet, path: Path) -> None:
    """Pairs of an image and its nearest training image, the closest first, eight columns of pairs."""
    tiles: list[Image.Image] = []
    for pair in report.details.get("nearest", []):
        for source, index in ((images, pair["image"]), (train, pair["train"])):
            tiles += to_pil(source.read(index, index + 1).pixels)
    if tiles:
        save_png(contact_sheet(tiles, 8, sheet_zoom(tiles[0].width)), path)


def _show(report: Report | None, point: str = "") -> None:
    """Warnings on stderr, figures on stdout, in the main process."""
    if report is None:
        return
    for warning in report.warnings:
        print(f"vgen: {warning}", file=sys.stderr)
    if sys.stdout.isatty():
        print(*([f"\n{point}"] if point else []), *report.table(), sep="\n", flush=True)
        return
    for line in report.lines():
        print(f"{point}\t{line}" if point else line, flush=True)


def _print(path: Path) -> None:
    if processes().is_main_process:
        print(path)
