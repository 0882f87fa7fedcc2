"""The studio without its page: models, jobs, the library, and what a run of samples does.

Everything here can be called from a test; the tabs only show it.
"""

import errno
import hashlib
import logging
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from vgen import batch
from vgen.app.forms import Ask, to_request
from vgen.app.jobs import Job, Jobs
from vgen.app.library import Library
from vgen.app.recording import Recording, Show
from vgen.app.shelf import Models
from vgen.media import save_png, to_pil
from vgen.memory import is_out_of_memory
from vgen.pipelines.base import GIVEN
from vgen.types import CheckpointError, Request, SettingError, Step
from vgen.videos import save_video

log = logging.getLogger(__name__)

FPS = 10.0
VIDEO_FILES = (".mp4", ".gif")
OWN = "studio-0000000000000000"  # owner of what the studio makes for itself
MOST_THUMBNAILS = 20
THUMBNAIL = 112  # pixels a side, about
THUMBNAIL_SECONDS = 20.0


@dataclass
class Run:
    """What a job of samples shows: its steps so far, and its files once it is done."""

    title: str
    request: Request | None = None
    recording: Recording | None = None
    files: list[Path] = field(default_factory=list)
    seconds: float | None = None  # of sampling, decoding and writing not counted
    note: str = ""


class Studio:
    """One server's state.

    Args:
        folder: where files go, each visitor's into a folder of their own.
        models: of more models beside the bundled ones.
        device, dtype: as in vgen.load.
    """

    def __init__(
        self,
        folder: Path,
        models: Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        allow_upload: bool = False,
    ) -> None:
        self.models = Models(models, device, dtype)
        self.library = Library(folder)
        self.folder = self.library.folder
        self.allow_upload = allow_upload
        self.jobs = Jobs(explain)
        # Seconds per sample and evaluations of the last run, by model and sampler.
        self.pace: dict[tuple[str, str], tuple[float, int]] = {}
        self.glances: dict[tuple[str, int], float] = {}  # seconds of a preview, by model and number of samples

    def close(self) -> None:
        self.jobs.close()
        self.library.close()

    # ---- runs

    def request(self, ask: Ask, context: np.ndarray | None = None) -> Request:
        """What an Ask means, the model being loaded for it. Raises SettingError."""
        return to_request(self.models.get(ask.model), ask, context)

    def sample(self, owner: str, ask: Ask, context: np.ndarray | None = None, lease: float | None = None) -> Job:
        """Queue a run of samples, with a lease one that goes on only while it is watched (see jobs.Job).

        What is wrong shows at once where the model is in memory, otherwise when it runs.
        """
        request = self.request(ask, context) if ask.model in self.models.loaded() else None
        run = Run(title=ask.model)

        def work(job: Job) -> Iterator[None]:
            run.request = request or self.request(ask, context)
            yield from self.carry_out(job, run, context)

        job = self.jobs.submit(owner, "sample", run.title, work, lease)
        job.view = run
        return job

    def carry_out(
        self,
        job: Job,
        run: Run,
        context: np.ndarray | None = None,
        begin: Callable[[Any, Request], Iterator[Step]] | None = None,
        show: Show | None = None,
    ) -> Iterator[None]:
        """Sample a request step by step, then write its files; the pipeline's iterator is closed however this ends.

        Args:
            begin: gives the steps of a run that its request alone does not describe, such as an edit.
            show: what such a step looks like; the pipeline's `decode` for None.
        """
        request = run.request
        assert request is not None
        pipeline = self.models.get(request.model)
        kind = request.model, len(request.seeds)
        run.recording = Recording(pipeline, request, show, self.glances.get(kind, 0.0))
        began = time.monotonic()
        with closing(begin(pipeline, request) if begin else stream(pipeline, request, context)) as steps:  # type: ignore
            for step in steps:
                run.recording.add(step)
                job.show()
                yield
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        run.seconds = time.monotonic() - began
        self.glances[kind] = run.recording.glance
        if begin is None and not set(GIVEN) & set(request.settings):  # what is given costs nothing
            pace = run.seconds / run.recording.rows, run.recording.steps[-1].evaluations
            self.pace[request.model, str(request.sampler)] = pace
        run.files = self.write(job.owner, job.id, run.recording)
        job.show()

    def run_folder(self, owner: str, name: str) -> Path:
        """A folder for the files of a run that begins or ends now."""
        return self.owner_folder(owner) / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"

    def write(self, owner: str, name: str, recording: Recording, folder: Path | None = None) -> list[Path]:
        """Write a finished run's files, into a folder named after it unless one is given, and enter them in the
        library."""
        pipeline, request = recording.pipeline, recording.request
        folder = folder or self.run_folder(owner, name)
        pixels, files = recording.pixels(-1), []
        labels = request.class_labels or [None] * recording.rows  # type: ignore[list-item]
        for index, (label, seed) in enumerate(zip(labels, request.seeds, strict=True)):
            item, row = batch.Item(index, label, seed), request.row(index)
            words = [] if label is None else [pipeline.class_names[label]]
            if pipeline.makes_videos:
                frames = pixels[index].movedim(1, -1).numpy()
                for suffix in VIDEO_FILES:
                    save_video(frames, path := folder / f"{item.stem}{suffix}", FPS, row)
                    self.library.add(owner, path, "video", row, [*words, suffix[1:]])
                    files.append(path)
            else:
                save_png(to_pil(pixels[index : index + 1])[0], path := folder / item.name, row)
                self.library.add(owner, path, "image", row, words)
                files.append(path)
        return files

    def thumbnails(self, model: str) -> list[tuple[bytes, str]]:
        """A PNG of each class with its name, sampled once per checkpoint; none of models with very many classes,
        of videos, and where there is no time now."""
        pipeline = self.models.get(model)
        number = pipeline.null_class
        if pipeline.makes_videos or pipeline.tokenizer is None or not 0 < number <= MOST_THUMBNAILS:
            return []
        folder = self.folder / "thumbnails" / pipeline.checkpoint()[:16]
        paths = [folder / f"{index}.png" for index in range(number)]
        if not all(path.is_file() for path in paths):
            job = self.jobs.submit(OWN, "thumbnails", model, lambda job: self._draw_thumbnails(pipeline, paths))
            job.wait_until_ended(THUMBNAIL_SECONDS)
            if job.state != "done":
                self.jobs.forget(job)
                return []
        return [(path.read_bytes(), name) for path, name in zip(paths, pipeline.class_names, strict=True)]

    def _draw_thumbnails(self, pipeline: Any, paths: list[Path]) -> Iterator[None]:
        labels = list(range(len(paths)))
        with closing(pipeline.stream(labels, seeds=[0] * len(labels))) as steps:
            for step in steps:
                last = step
                yield
        for image, path in zip(to_pil(pipeline.decode(last)), paths, strict=True):
            side = max(1, THUMBNAIL // image.width)
            save_png(image.resize((image.width * side, image.height * side), Image.Resampling.NEAREST), path)

    def owner_folder(self, owner: str) -> Path:
        """Where an owner's files go. Owners are made by `owner_name`, so this is no path of anybody's choice."""
        if not re.fullmatch(r"[a-z]+-[0-9a-f]{16}", owner):
            raise ValueError(f"{owner!r} is no owner's name")
        return self.library.files / owner

    def estimate(self, model: str, sampler: str, number: int, steps: int | None = None) -> tuple[float, int] | None:
        """Seconds that so many samples will take and evaluations of each, from the last run of model and sampler, which
        may have had other `steps`; None before the first."""
        if (model, sampler) not in self.pace:
            return None
        seconds, evaluations = self.pace[model, sampler]
        wanted = steps or evaluations
        return number * seconds * wanted / evaluations, wanted


def stream(pipeline: Any, request: Request, context: np.ndarray | None = None, **more: Any) -> Any:
    """The steps of a request; nothing is computed yet."""
    settings = {name: value for name, value in request.settings.items() if name != "context"}
    if context is not None:
        settings["context"] = context
    return pipeline.stream(request.class_labels, seeds=request.seeds, sampler=request.sampler, **settings, **more)


def owner_name(user: str | None, token: str) -> str:
    """Who owns what a visitor makes: the user's name where there is a login, otherwise the browser's secret token.

    Hashed: it becomes a folder's name, and neither may be read off it.
    """
    kind, text = ("user", user) if user else ("visitor", token)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def explain(error: BaseException) -> str | None:
    """One line that says what, why and what to do, for errors that are the user's or the machine's; else None."""
    if isinstance(error, (SettingError, CheckpointError)):
        return " ".join(str(error).split())
    if is_out_of_memory(error):
        return "memory ran out: take fewer images at once, or unload models that are not needed"
    if _disk_is_full(error):
        return "the disk is full: what was being written is gone, the rest is whole; free space and repeat"
    if isinstance(error, OSError) and error.strerror:
        return f"a file could not be written or read: {error.strerror}"
    return None


def _disk_is_full(error: BaseException) -> bool:
    """Libraries below Python have errors of their own for it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    codes = [f"os error {code})" for code in (errno.ENOSPC, errno.EDQUOT)]
    return (isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error)) or (
        isinstance(error, SafetensorError) and any(code in str(error) for code in codes)
    )


def line_for(error: Exception, what: str) -> str:
    """The line that explains an error; one that is our own mistake is logged, as the failure of `what`. To be called
    where it is handled."""
    line = explain(error)
    if line is None:
        log.exception("%s failed", what)
        line = f"something went wrong inside vgen ({type(error).__name__}): the server's log says where"
    return line


def told(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call gives, or the line that explains why it gives nothing."""
    try:
        return call(), None
    except Exception as error:
        return None, line_for(error, "a handler")


def titles(pipeline: Any, request: Request) -> Sequence[str]:
    """Of each sample: its class and seed, as alternative text and caption."""
    names = pipeline.class_names
    labels = request.class_labels or [None] * len(request.seeds)  # type: ignore[list-item]
    return [
        f"{'no class' if label is None else names[label]}, seed {seed}"
        for label, seed in zip(labels, request.seeds, strict=True)
    ]
