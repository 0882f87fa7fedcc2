"""Runs measured one after another on one device, for the races and grids of the Compare tab.

A clock runs while a model evaluates and a sampler draws, and at no other time: previews wait for the end of an
evaluation, and files are written once a run's clock has stopped. Knows no Gradio.
"""

import csv
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vgen.app.core import Studio, stream
from vgen.app.jobs import Job
from vgen.app.recording import Recording
from vgen.files import atomic_file
from vgen.types import Request, SettingError, Step

WARM_UP = 16  # evaluations at most of the first run, and one of every other, before any is timed
MAX_SAMPLES = 256  # images of all runs together
MAX_CLIPS = 64  # videos likewise


class Turns:
    """Lets evaluations and previews have the device in the order in which they ask for it, one at a time.

    A lock alone would not do: the thread that samples would take it again before anybody who waits wakes up.
    """

    def __init__(self) -> None:
        self._next, self._device = threading.Lock(), threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._next:
            self._device.acquire()
        try:
            yield
        finally:
            self._device.release()


@dataclass(eq=False)
class Measured:
    """One run: what it samples, how far it is, and the seconds that this has taken."""

    label: str
    request: Request
    state: str = "waiting"  # then "running", and "done" or "stopped"
    seconds: float = 0.0
    newest: Recording | None = None  # of its newest step alone
    files: list[Path] = field(default_factory=list)

    @property
    def step(self) -> Step | None:
        return None if self.newest is None else self.newest.steps[-1]

    @property
    def evaluations(self) -> int:
        return 0 if self.step is None else self.step.evaluations

    @property
    def milliseconds(self) -> float:
        return 1000 * self.seconds

    @property
    def known(self) -> float:
        """Share of its tokens that are known."""
        return 0.0 if self.step is None else float(self.step.known.float().mean())


@dataclass(eq=False)
class Comparison:
    """Runs of one model, in the order in which they are measured."""

    model: str
    runs: list[Measured]
    phase: str = ""  # what it is at, before the first run
    place: str = ""  # what it was measured on
    files: list[Path] = field(default_factory=list)  # of all runs together
    turns: Turns = field(default_factory=Turns)

    @property
    def done(self) -> list[Measured]:
        return [run for run in self.runs if run.state == "done"]

    @property
    def running(self) -> Measured | None:
        return next((run for run in self.runs if run.state == "running"), None)


Summary = Callable[[Comparison, Path], Sequence[Path]]


def submit(studio: Studio, owner: str, kind: str, comparison: Comparison, summarise: Summary) -> Job:
    """Queue a comparison; `summarise` writes the files that are of all finished runs, into a folder."""
    videos = studio.models.get(comparison.model).makes_videos
    number, most = sum(len(run.request.seeds) for run in comparison.runs), MAX_CLIPS if videos else MAX_SAMPLES
    if number > most:
        raise SettingError(
            f"{len(comparison.runs)} runs make {number} samples together, the limit is {most}: take fewer of each"
        )
    job = studio.jobs.submit(owner, kind, comparison.model, lambda job: carry_out(studio, job, comparison, summarise))
    job.view = comparison
    return job


def carry_out(studio: Studio, job: Job, comparison: Comparison, summarise: Summary) -> Iterator[None]:
    """Warm up, then measure every run and write its files; what is finished stays, however this ends."""
    pipeline = studio.models.get(comparison.model)
    comparison.place = describe_place(pipeline)
    folder = studio.run_folder(job.owner, job.id)
    try:
        yield from warm_up(job, pipeline, comparison)
        for index, run in enumerate(comparison.runs):
            yield from measure(job, pipeline, run, comparison.turns)
            assert run.newest is not None
            with comparison.turns.taken():
                run.files = studio.write(job.owner, "", run.newest, folder / f"{index + 1:02d}")
            run.state = "done"
            job.show()
    finally:
        if (unfinished := comparison.running) is not None:
            unfinished.state = "stopped"
        if comparison.done:
            comparison.files = list(summarise(comparison, folder))


def warm_up(job: Job, pipeline: Any, comparison: Comparison) -> Iterator[None]:
    """The first run's first evaluations and one of every other's: what is slow only at first is not to count."""
    total = 0
    for index, run in enumerate(comparison.runs):
        with closing(stream(pipeline, run.request)) as steps:
            for number, _ in enumerate(steps, start=1):
                total += 1
                comparison.phase = f"Warming up, which does not count: {total} evaluations…"
                job.show()
                yield
                if index or number == WARM_UP:
                    break
    comparison.phase = ""


def measure(job: Job, pipeline: Any, run: Measured, turns: Turns) -> Iterator[None]:
    """Carry out one run step by step with the clock running in evaluations alone."""
    run.state = "running"
    with _timed(run, pipeline, turns):
        steps = stream(pipeline, run.request)
    with closing(steps):
        while True:
            with _timed(run, pipeline, turns):
                step = next(steps, None)
            if step is None:
                return
            newest = Recording(pipeline, run.request)
            newest.add(step)
            run.newest = newest
            job.show()
            yield


@contextmanager
def _timed(run: Measured, pipeline: Any, turns: Turns) -> Iterator[None]:
    with turns.taken():
        began = time.perf_counter()
        yield
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        run.seconds += time.perf_counter() - began


def describe_place(pipeline: Any) -> str:
    """The device that a pipeline runs on, and its precision."""
    dtype = str(pipeline.dtype).removeprefix("torch.")
    if pipeline.device.type == "cuda":
        return f"{torch.cuda.get_device_name(pipeline.device)}, {dtype}"
    threads = torch.get_num_threads()
    return f"{pipeline.device.type}, {threads} {'thread' if threads == 1 else 'threads'}, {dtype}"


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Rows as CSV, whole or not at all."""
    with atomic_file(path) as partial, partial.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def names_below(files: Sequence[Path], folder: Path) -> str:
    """Files by their paths below a folder, for a table."""
    return ";".join(path.relative_to(folder).as_posix() for path in files)
