"""Quality against one setting: samples of a model at several values of it, judged point by point as they come.

Knows no page. One batch is timed after another on one device, the first one run once more before, to warm up.
"""

import dataclasses
import json
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vgen import __version__
from vgen.app.cells import SUGGESTED
from vgen.app.core import Studio, stream
from vgen.app.forms import MAX_SEED, MAX_TEXT, Ask, parse_settings, setting_names, to_request, whole
from vgen.app.jobs import Job
from vgen.app.judging import FIGURES, Judge
from vgen.app.measured import write_table
from vgen.evaluation.curves import parse_grid
from vgen.files import atomic_file
from vgen.media import contact_sheet, png_bytes, to_pil
from vgen.types import Request, SettingError

MAX_POINTS = 12
MIN_NUMBER, MAX_NUMBER = 10, 2000  # images a point
MAX_IMAGES = 10_000  # of all points
BATCH_PIXELS = 50 * 64 * 64  # images of a batch have about so many pixels together
LARGEST_BATCH = 50
SHOWN = 10  # samples of a point that the table shows
WITHIN = 0.05  # of the best figure: what is as good as it for a cheaper setting


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to evaluate: one setting at several values, everything else the same."""

    model: str
    setting: str  # a setting's name, or "sampler"
    values: Sequence[Any]
    number: int = 100  # images a point
    seed: int = 0
    sampler: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one value of the setting gave."""

    value: Any
    figures: dict[str, float]
    seconds: float  # per image, decoding included
    evaluations: float  # of the model, per image
    picture: bytes = b""  # PNG of the first samples


@dataclass
class Curve:
    """What a job shows: its points so far, and its files."""

    sweep: Sweep
    requests: list[Request] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    of_reference: dict[str, float] = field(default_factory=dict)
    missing: str = ""  # why some figures are not there
    phase: str = "Beginning"  # before the first point
    done: int = 0  # images of the present point
    files: list[Path] = field(default_factory=list)

    @property
    def figures(self) -> list[str]:
        """Names of the figures that there are."""
        return [name for name in FIGURES if any(name in point.figures for point in self.points)]


class Evaluations:
    """Evaluates models of a studio; judges are kept, as reading real images takes longer than a point."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._judges: dict[tuple[Any, ...], Judge] = {}

    def submit(self, owner: str, sweep: Sweep) -> Job:
        """Queue an evaluation. Raises SettingError at once for what is wrong with it."""
        curve = Curve(sweep, plan(self.studio.models.get(sweep.model), sweep))
        job = self.studio.jobs.submit(owner, "evaluate", sweep.model, lambda job: self._carry_out(job, curve))
        job.view = curve
        return job

    def judge(self, pipeline: Any) -> Judge:
        key = (*pipeline.class_names, pipeline.tokenizer.image_size)
        if key not in self._judges:
            self._judges[key] = Judge(pipeline.class_names, pipeline.tokenizer.image_size, pipeline.device.type)
        return self._judges[key]

    def _carry_out(self, job: Job, curve: Curve) -> Iterator[None]:
        pipeline = self.studio.models.get(curve.sweep.model)
        judge = self.judge(pipeline)
        for curve.phase in judge.prepare():
            job.show()
            yield
        curve.of_reference, curve.missing = judge.of_reference(), judge.missing
        curve.protocol = protocol(curve, judge)
        curve.phase = "Warming up, which does not count"
        job.show()
        size = batch_size(pipeline)
        yield from _sampled(pipeline, _part(curve.requests[0], 0, size))
        for value, request in zip(curve.sweep.values, curve.requests, strict=True):
            curve.phase, curve.done = "", 0
            yield from self._measure(job, curve, pipeline, judge, value, request)
            curve.files = save(self.studio.owner_folder(job.owner) / f"evaluation-{job.id}", curve)
            job.show()

    def _measure(
        self, job: Job, curve: Curve, pipeline: Any, judge: Judge, value: Any, request: Request
    ) -> Iterator[None]:
        """One point: sample batch by batch, judge, and enter it into the curve."""
        gathered, seconds, evaluations, picture = judge.gather(), 0.0, 0, b""
        number, size = len(request.seeds), batch_size(pipeline)
        for start in range(0, number, size):
            part, began = _part(request, start, size), time.monotonic()
            pixels, count = yield from _sampled(pipeline, part)
            seconds += time.monotonic() - began
            evaluations += count * len(pixels)
            picture = picture or _strip(to_pil(pixels[:SHOWN]))
            gathered.add(pixels, part.class_labels or [-1] * len(pixels))
            curve.done += len(pixels)
            job.show()
            yield
        figures = judge.figures(gathered)
        curve.points.append(
            Point(
                value=value,
                figures=figures,
                seconds=seconds / number,
                evaluations=evaluations / number,
                picture=picture,
            )
        )


def _sampled(pipeline: Any, request: Request) -> Generator[None, None, tuple[Tensor, int]]:
    """Sample, yielding after every evaluation; returns images (B, 3, H, W) uint8 and how many evaluations they took."""
    with closing(stream(pipeline, request)) as steps:
        for step in steps:
            last = step
            yield
    with torch.no_grad():
        return pipeline.decode(last).cpu(), last.evaluations


def _part(request: Request, start: int, size: int) -> Request:
    labels = request.class_labels
    return dataclasses.replace(
        request,
        seeds=request.seeds[start : start + size],
        class_labels=None if labels is None else labels[start : start + size],
    )


def _strip(images: list[Image.Image]) -> bytes:
    return png_bytes(contact_sheet(images, SHOWN, max(1, 28 // images[0].width), 1))


def batch_size(pipeline: Any) -> int:
    """Images sampled at a time: fewer of larger ones."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // pipeline.tokenizer.image_size**2))


# ---- what is asked for


def settings_of(pipeline: Any, sampler: str | None) -> list[str]:
    """Settings whose influence can be measured."""
    own = setting_names(pipeline, sampler)
    plain = [name for name, value in own.items() if value is None or isinstance(value, (bool, int, float, str))]
    usual = sorted(plain, key=lambda name: name not in SUGGESTED)  # those with values to begin with come first
    return usual + ["sampler"] * (len(pipeline.samplers) > 1)


def parse_values(setting: str, text: str) -> list[Any]:
    """ "1, 2, 3" -> values, each once. Raises SettingError."""
    if len(text) > MAX_TEXT:
        raise SettingError(f"the values of {setting} have {len(text)} characters, the limit is {MAX_TEXT}")
    values = parse_grid([f"{setting}={text}"], "values")[setting]
    if len(values) > MAX_POINTS:
        raise SettingError(f"{setting} has {len(values)} values, the limit is {MAX_POINTS}: take fewer")
    return values


def to_sweep(pipeline: Any, setting: Any, values: Any, number: Any, seed: Any, sampler: Any, others: Any) -> Sweep:
    """What the form says, checked. Raises SettingError."""
    if setting not in settings_of(pipeline, sampler or None):
        raise SettingError(f"there is no setting {str(setting)[:40]!r} here: choose one of the list")
    fixed = parse_settings(str(others or ""))
    if setting in fixed:
        raise SettingError(f"{setting} has a value among the other settings: take it out there")
    return Sweep(
        model=pipeline.source,
        setting=setting,
        values=parse_values(setting, str(values or "")),
        number=whole("images a point", number, MIN_NUMBER, MAX_NUMBER),
        seed=whole("seed", seed, 0, MAX_SEED - MAX_NUMBER),
        sampler=None if setting == "sampler" else sampler or None,
        settings=fixed,
    )


def plan(pipeline: Any, sweep: Sweep) -> list[Request]:
    """The samples of each point: image i has seed + i, and classes take turns. Raises SettingError."""
    if pipeline.makes_videos:
        raise SettingError(
            f"{sweep.model} makes videos, which are not judged here: use 'vgen evaluate' with --metrics fvd"
        )
    pipeline.check_tokenizer()
    if (total := sweep.number * len(sweep.values)) > MAX_IMAGES:
        raise SettingError(f"{total} images in all, the limit is {MAX_IMAGES}: take fewer values, or fewer images")
    seeds = [sweep.seed + i for i in range(sweep.number)]
    classes = pipeline.null_class
    labels = [i % classes for i in range(sweep.number)] if classes else None
    requests = []
    for value in sweep.values:
        by_sampler = sweep.setting == "sampler"
        settings = dict(sweep.settings) | ({} if by_sampler else {sweep.setting: value})
        sampler = value if by_sampler else sweep.sampler
        ask = Ask(
            model=sweep.model, classes=[0] if classes else [], seed=sweep.seed, sampler=sampler, settings=settings
        )
        requests.append(dataclasses.replace(to_request(pipeline, ask), seeds=seeds, class_labels=labels))
    return requests


# ---- what is found


def best(points: Sequence[Point], figure: str) -> Point | None:
    """The point with the best figure; None where neither more nor less of it is better."""
    known = [point for point in points if _known(point.figures.get(figure)) is not None]
    better = FIGURES[figure].better
    if not known or not better:
        return None
    return (max if better == "higher" else min)(known, key=lambda point: point.figures[figure])


def cheapest(points: Sequence[Point], figure: str, within: float = WITHIN) -> Point | None:
    """The point that takes the least time among those whose figure is within a share of the best one's."""
    top = best(points, figure)
    if top is None:
        return None
    limit = within * abs(top.figures[figure])
    near = [p for p in points if abs(p.figures.get(figure, float("inf")) - top.figures[figure]) <= limit]
    return min(near, key=lambda point: point.seconds)


def protocol(curve: Curve, judge: Judge) -> dict[str, Any]:
    """All that decides the figures."""
    first, sweep = curve.requests[0], curve.sweep
    labels = first.class_labels
    settings = {name: value for name, value in first.settings.items() if name != sweep.setting}
    return {
        "model": sweep.model,
        "checkpoint": first.checkpoint,
        "sampler": None if sweep.setting == "sampler" else first.sampler,
        "settings": settings,
        "setting": sweep.setting,
        "n": sweep.number,
        "classes": 0 if labels is None else len(set(labels)),
        "seeds": [first.seeds[0], first.seeds[-1]],
        "device": first.device,
        "dtype": first.dtype,
        "vgen": __version__,
        **judge.protocol(),
    }


def rows(curve: Curve) -> list[dict[str, Any]]:
    """The points as a table."""
    return [
        {
            curve.sweep.setting: point.value,
            **{name: _known(point.figures.get(name)) for name in curve.figures},
            "seconds_per_image": point.seconds,
            "evaluations_per_image": point.evaluations,
            "n": curve.sweep.number,
        }
        for point in curve.points
    ]


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def save(folder: Path, curve: Curve) -> list[Path]:
    """The points as CSV, and with their protocol as JSON, each written whole or not at all."""
    table = rows(curve)
    with atomic_file(folder / "curve.json") as partial:
        partial.write_text(json.dumps({"protocol": curve.protocol, "points": table}, indent=2) + "\n")
    return [write_table(table, folder / "curve.csv"), folder / "curve.json"]
