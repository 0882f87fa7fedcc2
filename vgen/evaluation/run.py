"""From the options of `vgen evaluate` to printed figures and written files."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vgen import hub
from vgen.batch import plan
from vgen.evaluation import video
from vgen.evaluation.curves import evaluate_grid, grid_points, parse_grid
from vgen.evaluation.evaluate import (
    Evaluator,
    Reference,
    build_extractors,
    make_statistics,
    open_reference,
)
from vgen.evaluation.extractors import ExtractorOptions
from vgen.evaluation.features import processes
from vgen.evaluation.images import ImageSet, open_images
from vgen.evaluation.inception import RESIZES, cache_root
from vgen.evaluation.judges import VIDEO_METRICS, Asked, Options, parse_metrics
from vgen.evaluation.report import Report
from vgen.evaluation.sampled import ReconstructedImages, SampledImages
from vgen.files import sha256, weight_files
from vgen.media import contact_sheet, save_png, sheet_zoom, to_pil
from vgen.types import SettingError

DEFAULT_PER_CLASS = 50
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
    classes: str | None = None
    per_class: int | None = None
    seed: int | None = None
    sampler: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    data_root: Path | None = None

    def open(self, text: str) -> ImageSet:
        """The images that `text` names, as `open_images` does with these options."""
        return open_images(text, skip_broken=self.skip_broken, data_root=self.data_root)

    def of_sampling(self) -> list[str]:
        """The options in use that decide what a model samples."""
        known = {"classes": self.classes, "per-class": self.per_class, "seed": self.seed, "sampler": self.sampler}
        return [name for name, value in known.items() if value is not None] + list(self.settings)

    def number_per_class(self) -> int:
        return DEFAULT_PER_CLASS if self.per_class is None else self.per_class

    def options(self) -> Options:
        device = str(hub.place(self.device, None)[0])
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


Classes = Callable[[Any], list[int] | None]  # the class ids to sample from a pipeline


def run(task: Task, classes: Classes) -> bool:
    """Carry out a task and print its figures; returns whether broken files were left out.

    Raises SettingError for a task that makes no sense.
    """
    if task.json_file is not None and task.json_file.is_dir():
        raise SettingError(f"--json {task.json_file} is a folder: name a file")
    if task.resize not in RESIZES:
        raise SettingError(f"resize is {task.resize!r}: use one of {', '.join(RESIZES)}")
    if task.metrics and {name.strip() for name in task.metrics.split(",")} & set(VIDEO_METRICS):
        _videos(task)
        return False
    names = task.metrics or (DEFAULT_OF_TOKENIZERS if task.tokenizer else DEFAULT_METRICS)
    asked = parse_metrics(names, reconstructed=task.tokenizer is not None)
    if (task.images is None) == (task.tokenizer is None):
        raise SettingError("name the images or a model to evaluate, or a --tokenizer, and not both")
    folder = hub.find_local(task.images) if task.images else None
    if task.grid and folder is None:
        raise SettingError("--grid samples from a model: name one, bundled or a folder")
    if folder is None and (given := task.of_sampling()):
        raise SettingError(f"{given[0]} is for sampling: name a model, not images")
    _check_outputs(task, asked)
    options = task.options()
    extractors = build_extractors(asked, options.extractors)  # before files are checked: that may take long
    if task.save_statistics is not None:
        images = _images(task, folder, classes)
        make_statistics(images, asked, extractors, task.save_statistics, options)
        _warn(*images.warnings)
        _print(task.save_statistics)
        return _broken(images)
    points = _points(task, classes) if task.grid else []
    reference = _reference(task)
    train = task.open(task.train) if task.train else None
    broken = _broken(train, reference.images if reference else None)
    if task.grid:
        _curve(task, points, Evaluator(asked, extractors, reference, train, options))
        return broken
    images = _reconstructed(task, reference) if task.tokenizer else _images(task, folder, classes)
    report = Evaluator(asked, extractors, reference, train, options).run(images)
    if report is not None:
        _save(report, task)
        _show(report)
        if task.nearest_sheet is not None and train is not None:
            save_nearest(report, images, train, task.nearest_sheet)
    return broken or _broken(images)


def _broken(*sets: ImageSet | None) -> bool:
    return any("broken" in images.facts for images in sets if images is not None)


def _reference(task: Task) -> Reference | None:
    if task.reference is None:
        return None
    return open_reference(task.reference, skip_broken=task.skip_broken, data_root=task.data_root)


def _points(task: Task, classes: Classes) -> list[tuple[dict[str, Any], SampledImages]]:
    grid = parse_grid(task.grid)
    pipeline = _pipeline(task, str(task.images))
    items = plan(classes(pipeline), task.number_per_class(), task.seed or 0)
    return grid_points(pipeline, items, task.settings, task.sampler, grid)


def _curve(task: Task, points: list[tuple[dict[str, Any], SampledImages]], evaluator: Evaluator) -> None:
    for point, report in evaluate_grid(points, evaluator, task.out):
        _show(report, " ".join(f"{name}={value}" for name, value in point.items()))
    _print(task.out / "curve.png")


def _check_outputs(task: Task, asked: list[Asked]) -> None:
    """Raise SettingError for options that would be passed over."""
    if task.save_statistics is not None:
        given: dict[str, Any] = {"--reference": task.reference, "--tokenizer": task.tokenizer, "--json": task.json_file}
        given |= {"--grid": task.grid, "--train": task.train, "--nearest-sheet": task.nearest_sheet}
        if named := [flag for flag, value in given.items() if value]:
            raise SettingError(f"--save-statistics writes the images' statistics and judges nothing: drop {named[0]}")
    if task.grid and task.json_file is not None:
        raise SettingError("--json is of one evaluation: a --grid writes curve.json into --out")
    if all(item.name != "memorization" for item in asked):
        for flag, value in (("--train", task.train), ("--nearest-sheet", task.nearest_sheet)):
            if value:
                raise SettingError(f"{flag} is for the metric memorization: add it to --metrics")
    if task.nearest_sheet is not None and task.grid:
        raise SettingError("--nearest-sheet is of one evaluation, not of a --grid")


def _images(task: Task, folder: Path | None, classes: Classes) -> ImageSet:
    """Samples where a model was named, else images that are there."""
    if folder is None:
        return task.open(str(task.images))
    pipeline = _pipeline(task, str(task.images))
    items = plan(classes(pipeline), task.number_per_class(), task.seed or 0)
    return SampledImages(pipeline, items, task.settings, task.sampler)


def _pipeline(task: Task, name: str) -> Any:
    pipeline = hub.load(name, device=task.device, dtype=task.dtype)
    pipeline.resolve_settings(task.settings, task.sampler)
    pipeline.check_tokenizer()
    return pipeline


def _reconstructed(task: Task, reference: Reference | None) -> ReconstructedImages:
    if reference is None or reference.images is None:
        raise SettingError("--tokenizer reconstructs images: name them with --reference")
    name = str(task.tokenizer)
    tokenizer, folder = hub.load_tokenizer(name, device=task.device, dtype=task.dtype)
    return ReconstructedImages(tokenizer, name, sha256(*weight_files(folder)), reference.images)


def _videos(task: Task) -> None:
    if task.images is None or task.reference is None:
        raise SettingError("metrics of videos compare videos with a --reference: name both")
    given = {"--tokenizer": task.tokenizer, "--grid": task.grid, "--train": task.train, "--weights": task.weights}
    given |= {"--save-statistics": task.save_statistics, "--nearest-sheet": task.nearest_sheet}
    if named := [flag for flag, value in given.items() if value] + task.of_sampling():
        raise SettingError(f"{named[0]} means nothing for videos: leave it out")
    if not processes().is_main_process:
        return
    videos, reference = video.open_videos(task.images), video.open_videos(task.reference)
    names = [name.strip() for name in str(task.metrics).split(",")]
    report = video.evaluate_videos(
        videos, reference, names, i3d=task.fvd_weights, device=task.options().extractors.device
    )
    _save(report, task)
    _show(report)


def _save(report: Report, task: Task) -> None:
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
    _warn(*report.warnings)
    if sys.stdout.isatty():
        print(*([f"\n{point}"] if point else []), *report.table(), sep="\n", flush=True)
        return
    for line in report.lines():
        print(f"{point}\t{line}" if point else line, flush=True)


def _warn(*warnings: str) -> None:
    if processes().is_main_process:
        for warning in warnings:
            print(f"vgen: {warning}", file=sys.stderr)


def _print(path: Path) -> None:
    if processes().is_main_process:
        print(path)
