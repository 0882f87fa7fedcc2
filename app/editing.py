"""Editing a picture in the studio: which tokens a mask stands for, and the job that repaints them.

Knows no Gradio.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vgen.app.core import Run, Studio
from vgen.app.forms import MAX_IMAGES, MAX_SEED, check_bounds, whole
from vgen.app.jobs import Job
from vgen.app.pictures import Canvas
from vgen.pipelines.base import EDIT
from vgen.pipelines.clips import fingerprint
from vgen.pipelines.editing import keep_masks, touched_tokens
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import Request, SettingError, Step

MAX_VERSIONS = 16


@dataclass(frozen=True)
class Marks:
    """Tokens that were clicked: to repaint whatever is painted, and to keep likewise."""

    on: frozenset[int] = frozenset()
    off: frozenset[int] = frozenset()

    def toggle(self, token: int, marked: bool) -> "Marks":
        """The marks after a click on a token that is, or is not, to be repainted now."""
        return Marks(self.on - {token}, self.off | {token}) if marked else Marks(self.on | {token}, self.off - {token})


def grid_side(pipeline: Any) -> int:
    """Tokens along a side of the finest grid. Raises SettingError where a model's pictures cannot be edited."""
    pipeline.check_tokenizer()
    if pipeline.makes_videos:
        raise SettingError("this model makes videos, which cannot be repainted: choose an image model")
    return pipeline.tokenizer.image_size // pipeline.token_pixels


def snap(pipeline: Any, painted: Tensor, marks: Marks) -> Tensor:
    """Tokens (h, h) bool of the finest grid that are drawn anew: those painted on, and the marked ones."""
    touched = touched_tokens(painted, pipeline.token_pixels)
    flat = touched.flatten()
    for tokens, value in ((marks.on, True), (marks.off, False)):
        for token in tokens:
            flat[token] = value
    return flat.view_as(touched)


def mask_of(pipeline: Any, painted: Tensor, marks: Marks) -> Tensor:
    """The pixels (S, S) bool that an edit replaces: those painted and those of marked tokens, but none of kept ones."""
    pixels = pipeline.token_pixels
    allowed = snap(pipeline, painted, marks)
    whole_tokens = snap(pipeline, torch.zeros_like(painted), marks)

    def enlarged(tokens: Tensor) -> Tensor:
        return tokens.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)

    return (painted & enlarged(allowed)) | enlarged(whole_tokens)


def count_tokens(pipeline: Any, mask: Tensor) -> str:
    """How many tokens an edit with this mask (S, S) draws anew, in words."""
    touched = touched_tokens(mask, pipeline.token_pixels)
    fine, number = int(touched.sum()), touched.numel()
    if not isinstance(pipeline, NextScalePipeline):
        return f"{fine} of {number} tokens will be drawn anew"
    masks = keep_masks(mask, pipeline.tokenizer.scales)
    free, total = sum(int((~kept).sum()) for kept in masks), sum(kept.numel() for kept in masks)
    return f"{fine} of {number} tokens of the finest scale will be drawn anew, {free} of {total} over all scales"


@dataclass(frozen=True, kw_only=True)
class Repaint:
    """An edit that was asked for."""

    model: str
    canvas: Canvas
    mask: Tensor  # (S, S) bool
    label: int | None  # None: without a class
    seed: int
    versions: int
    sampler: str | None
    settings: dict[str, Any]


def edit_request(pipeline: Any, edit: Repaint) -> Request:
    """What an edit's files carry: all of its settings, and the hashes of image and mask, which are not inside.

    Raises SettingError.
    """
    grid_side(pipeline)
    if not bool(edit.mask.any()):
        raise SettingError("nothing is marked: paint over what is to change, or click its tokens")
    seeds = seeds_from(edit.seed, edit.versions)
    labels = None if edit.label is None else [edit.label] * len(seeds)
    check_bounds(pipeline, edit.settings, edit.sampler)
    request = pipeline.request(labels, seeds, edit.sampler, edit.settings)
    hashes = {"image": fingerprint(edit.canvas.pixels), "mask": fingerprint(edit.mask.to(torch.uint8))}
    share = f"{100 * float(edit.mask.float().mean()):.0f}% of the pixels"
    return replace(
        request, settings=request.settings | {EDIT: hashes}, origin=f"an edit: {share} of an image repainted"
    )


def seeds_from(seed: Any, versions: Any) -> list[int]:
    """As many seeds as there are versions. Raises SettingError."""
    number = whole("versions", versions, 1, MAX_VERSIONS)
    first = whole("seed", seed, 0, MAX_SEED - MAX_IMAGES)
    return [first + i for i in range(number)]


def submit_edit(studio: Studio, owner: str, edit: Repaint, lease: float | None = None) -> Job:
    """Queue an edit, with a lease one that goes on only while it is watched; its steps are shown as they will be
    composited. Raises SettingError."""
    run = Run(title=edit.model, request=edit_request(studio.models.get(edit.model), edit))

    def begin(pipeline: Any, request: Request) -> Iterator[Step]:
        settings = {name: value for name, value in request.settings.items() if name != EDIT}
        given = {"seeds": request.seeds, "sampler": request.sampler, **settings}
        return pipeline.stream_edit(edit.canvas.pixels, edit.mask, request.class_labels, **given)

    def show(pipeline: Any, step: Step) -> Tensor:
        return pipeline.blend_edit(edit.canvas.pixels, edit.mask, step)

    def work(job: Job) -> Iterator[None]:
        return studio.carry_out(job, run, begin=begin, show=show)

    job = studio.jobs.submit(owner, "edit", edit.model, work, lease)
    job.view = run
    return job


def names_of(pipeline: Any) -> Sequence[tuple[str, int]]:
    """Classes to paint, and -1 for none."""
    return [("no class", -1), *((f"{name} ({index})", index) for index, name in enumerate(pipeline.class_names))]
