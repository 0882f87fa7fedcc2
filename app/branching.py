"""Going on from a run with another seed: from one of its steps, or with some of its tokens kept.

What is kept becomes `tokens` and `known` of a new request, so that its files repeat it. Knows no Gradio.
"""

from collections.abc import Collection, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vgen.app.core import Run, Studio, titles
from vgen.app.editing import grid_side, seeds_from
from vgen.app.inspecting import Question, log_probabilities, measure, read_tokens
from vgen.app.jobs import Job
from vgen.app.recording import Recording
from vgen.pipelines.base import EDIT, GIVEN
from vgen.pipelines.editing import keep_masks
from vgen.types import SettingError, Step

KINDS = ("sample", "branch")  # of jobs that can be gone on from
WHOLE_STEPS = ("full_steps", "partial_steps")


@dataclass(frozen=True)
class Kept:
    """Tokens of one image that a new run begins with, in the form that a call takes them, and settings that follow."""

    tokens: Any
    known: Any
    words: str
    settings: dict[str, Any]


@dataclass(eq=False)
class Branch(Run):
    """A run that went on from another."""

    parent: str = ""  # its job


def parent_recording(job: Job | None) -> Recording:
    """What a run to go on from holds. Raises SettingError where it cannot be one."""
    run = job.view if job is not None and isinstance(job.view, Run) else None
    if job is None or run is None or job.kind not in KINDS:
        raise SettingError("there is no run to go on from: generate something first")
    if run.recording is None or not len(run.recording):
        raise SettingError("the run has no step yet: wait for its first one")
    grid_side(run.recording.pipeline)
    if run.recording.request.settings.get("more_smooth"):
        raise SettingError("more_smooth feeds back mixtures of codes, which tokens do not hold: generate without it")
    return run.recording


# ---- what is kept


def fork(recording: Recording, place: int, row: int) -> Kept:
    """All that image `row` knew at a recorded step, counted from 0.

    Scale by scale and in raster order the same seed then draws the same image; families that unmask begin their plan
    anew over what is left, in as many steps as were left.
    """
    step = recording.steps[place]
    words = f"branch at step {step.index + 1} of {recording.steps[-1].total}"
    if isinstance(step.tokens, list):
        tokens, known = _scales(step, row)
        return _checked(Kept(*_with_given(recording, row, tokens, known), words, {}))
    return _checked(Kept(step.tokens[row], step.known[row], words, _steps_left(recording, step)))


def keep_scales(recording: Recording, row: int, count: int, coarse: bool) -> Kept:
    """The first `count` scales: the layout; or the last ones, which only correct what coarser ones painted."""
    tokens, known = _scales(_finished(recording), row)
    if not isinstance(recording.steps[-1].tokens, list):
        raise SettingError("this model's tokens lie in one grid, it has no scales to keep: keep tokens instead")
    if not 1 <= count < len(tokens):
        raise SettingError(f"{count} scales were to be kept: it must be 1..{len(tokens) - 1} of {len(tokens)}")
    kept = [k < count if coarse else k >= len(tokens) - count for k in range(len(tokens))]
    known = [torch.full_like(scale, keep) for scale, keep in zip(known, kept, strict=True)]
    which = "first" if coarse else "last"
    return Kept(tokens, known, f"{which} {count} of {len(tokens)} scales kept", {})


def keep_tokens(recording: Recording, row: int, free: Collection[int]) -> Kept:
    """All but the tokens `free` of the finest grid; coarser scales keep a token as in-painting does."""
    pipeline, step = recording.pipeline, _finished(recording)
    side = grid_side(pipeline)
    if not free:
        raise SettingError("no token is marked: click those that are to be drawn anew")
    marked = torch.zeros(side * side, dtype=torch.bool)
    marked[sorted(free)] = True
    words = f"{side * side - len(free)} of {side * side} tokens kept"
    if not isinstance(step.tokens, list):
        return Kept(step.tokens[row], ~marked, words, {})
    pixels = pipeline.token_pixels
    painted = marked.view(side, side).repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    return Kept(_scales(step, row)[0], keep_masks(painted, pipeline.tokenizer.scales), words, {})


def uncertain(recording: Recording, row: int, count: int) -> Generator[None, None, list[int]]:
    """The `count` tokens of the finest grid that the model finds least probable, given all others or all before."""
    tokens = read_tokens(recording, row)
    side = grid_side(recording.pipeline)
    if tokens.sides[-1] != side:
        raise SettingError("the run was stopped before its finest scale: wait for one that is finished")
    found = yield from log_probabilities(recording, Question(row, others=True, guided=False))
    probability = measure(found[-1], tokens.codes[-1]).probability.nan_to_num(0.0)
    return probability.argsort(stable=True)[:count].tolist()


def _scales(step: Step, row: int) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(step.tokens, list):
        return [], []
    tokens = [scale[row] for scale in step.tokens]
    return tokens, [torch.ones_like(scale, dtype=torch.bool) for scale in tokens]


def _with_given(
    recording: Recording, row: int, tokens: list[Tensor], known: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Later scales as the run itself was given them, so that its branches keep what it kept."""
    there = len(tokens)
    given = [recording.request.settings.get(name) or [] for name in GIVEN]
    later = [[torch.as_tensor(scale) for scale in part[there:]] for part in given]
    return tokens + later[0], known + later[1]


def _finished(recording: Recording) -> Step:
    step = recording.steps[-1]
    if not bool(step.known.all()):
        raise SettingError("the run was stopped before its end: branch at one of its steps instead")
    return step


def _checked(kept: Kept) -> Kept:
    parts = kept.known if isinstance(kept.known, list) else [kept.known]
    if not any(bool(part.any()) for part in parts):
        raise SettingError("nothing is known at this step yet: a branch there is just a new run")
    return kept


def _steps_left(recording: Recording, step: Step) -> dict[str, Any]:
    """Of a plan with a number of steps, those that a branch has left, ReCAP's among them."""
    settings = recording.request.settings
    done, total = step.index + 1, recording.steps[-1].total
    if settings.get("steps") is None and recording.request.sampler == "first-hitting":
        return {}
    if "steps" not in settings:
        return {}
    left = max(1, total - done)
    full = max(0, int(settings.get("full_steps", 0)) - done)
    most = (min(full, left), min(int(settings.get("partial_steps", 0)), left - 1))
    return {"steps": left} | {name: value for name, value in zip(WHOLE_STEPS, most, strict=True) if name in settings}


# ---- going on


def submit_branch(
    studio: Studio, owner: str, parent: Job, row: int, kept: Kept, seed: Any, versions: Any, label: int | None
) -> Job:
    """Queue a run that begins with what is kept, of class `label`. Raises SettingError."""
    recording = parent_recording(parent)
    pipeline, before = recording.pipeline, recording.request
    seeds = seeds_from(seed, versions)
    given = {"tokens": kept.tokens, "known": kept.known}
    settings = {name: value for name, value in before.settings.items() if name != EDIT} | kept.settings | given
    request = pipeline.request(None if label is None else [label] * len(seeds), seeds, before.sampler, settings)
    pipeline.stream(request.class_labels, seeds=seeds, sampler=request.sampler, **request.settings).close()  # checks
    told = f"{kept.words} of {titles(pipeline, before)[row]}, run {parent.id}"
    run = Branch(title=before.model, request=replace(request, origin=told), note=kept.words, parent=parent.id)
    job = studio.jobs.submit(owner, "branch", before.model, lambda job: studio.carry_out(job, run))
    job.view = run
    return job


def row_of(recording: Recording, image: Any) -> int:
    """An image's number, counted from 1 on the page -> from 0. Raises SettingError."""
    last = recording.rows
    if isinstance(image, bool) or not isinstance(image, (int, float)) or image != int(image) or not 1 <= image <= last:
        raise SettingError(f"image {str(image)[:40]!r} is not there: the run has 1..{last}")
    return int(image) - 1


def label_of(recording: Recording, row: int) -> int | None:
    """The class of one image of a run."""
    labels = recording.request.class_labels
    return None if labels is None else labels[row]


@dataclass(frozen=True)
class Node:
    """A run in the tree of an owner's runs."""

    job: Job
    depth: int
    words: str


def tree(studio: Studio, owner: str) -> list[Node]:
    """An owner's runs that can be gone on from, branches below what they came from, the newest run first.

    A branch whose parent is forgotten stands for itself.
    """
    jobs = [job for job in studio.jobs.theirs(owner, *KINDS) if isinstance(job.view, Run) and _an_image(studio, job)]
    ids = {job.id for job in jobs}

    def below(parent: str, depth: int) -> list[Node]:
        nodes = []
        for job in jobs:
            if isinstance(job.view, Branch) and job.view.parent == parent:
                nodes += [Node(job, depth, _words(job)), *below(job.id, depth + 1)]
        return nodes

    roots = [job for job in jobs if not (isinstance(job.view, Branch) and job.view.parent in ids)]
    return [node for job in reversed(roots) for node in [Node(job, 0, _words(job)), *below(job.id, 1)]]


def _an_image(studio: Studio, job: Job) -> bool:
    recording = job.view.recording
    return recording is not None and len(recording) > 0 and not recording.pipeline.makes_videos


def _words(job: Job) -> str:
    run = job.view
    assert run.request is not None and run.recording is not None
    named = titles(run.recording.pipeline, run.request)
    number = f" and {len(named) - 1} more" if len(named) > 1 else ""
    what = run.note if isinstance(run, Branch) else run.request.model
    unfinished = "" if job.state == "done" else f" ({job.state})"
    return f"{what}: {named[0]}{number}{unfinished}"
