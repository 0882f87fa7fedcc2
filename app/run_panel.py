"""A run as several tabs show it: a status line, the picture of any of its steps, and its files."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from vgen.app.core import Run, Studio, titles
from vgen.app.forms import whole
from vgen.app.jobs import Job
from vgen.app.parts import (
    QUICK,
    alternative,
    describe_job,
    friendly,
    owner_of,
    picture_html,
    run_of,
    status_html,
    step_html,
    watch,
)

MOST_STEPS = 1 << 20  # that a scrubber may name


class RunPanel:
    """Components that follow a job. `name` begins their ids; page.js knows the class of the row that scrubs."""

    def __init__(self, studio: Studio, name: str, empty: str) -> None:
        self.studio, self.name, self.empty = studio, name, empty
        self.status = gr.HTML(status_html("Ready."), elem_id=f"{name}-status")
        self.picture = gr.HTML(picture_html(None, "", f"{name}-picture", empty))
        with gr.Row(elem_classes="vgen-scrub"):
            gr.Button("Play", size="sm", min_width=60, elem_classes="vgen-play", scale=0)
            self.scrub = gr.Slider(
                1, 2, value=1, step=1, label="Step", elem_id=f"{name}-scrub", interactive=True, scale=4
            )
        self.label = gr.HTML("", elem_id=f"{name}-step")
        self.gallery = gr.Gallery(
            label="Pictures", columns=6, height=220, object_fit="contain", interactive=False, visible=False,
            elem_classes="vgen-results", elem_id=f"{name}-results",
        )  # fmt: skip
        self.video = gr.Video(
            label="Video", visible=False, autoplay=True, loop=True, interactive=False, elem_id=f"{name}-video"
        )
        self.files = gr.File(label="Files", file_count="multiple", visible=False, interactive=False, height=150)

    def wire(self, visitor: gr.BrowserState, job_id: gr.BrowserState) -> None:
        looked = [self.picture, self.label]
        self.scrub.input(self.look, [visitor, job_id, self.scrub], looked, **QUICK, trigger_mode="always_last")

    @property
    def shown(self) -> list[Any]:
        return [self.status, self.picture, self.scrub, self.label, self.gallery, self.video, self.files]

    async def follow(self, visitor: Any, job_id: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show a run as it goes on, until it ends."""
        job = self.studio.jobs.get(owner_of(visitor, request), job_id)
        if job is None:
            yield [gr.skip()] * len(self.shown)
            return
        async for last in watch(job):
            yield await asyncio.to_thread(self.view, job, last)

    def view(self, job: Job, last: bool) -> list[Any]:
        """What the page shows of a job now."""
        run = run_of(job)
        text, kind = describe_job(self.studio, job, run)
        status = status_html(text, kind)
        if run is None or run.recording is None or not len(run.recording):
            empty = picture_html(None, "", f"{self.name}-picture", "" if job.state == "running" else self.empty)
            return [status, empty, *[gr.skip()] * 5]
        count = len(run.recording)
        scrub = gr.Slider(maximum=max(2, count), value=count)
        return [status, *self._step(run, count - 1, scrub), *(_results(run) if last else [gr.skip()] * 3)]

    @friendly
    def look(self, visitor: Any, job_id: Any, step: Any, request: gr.Request) -> list[Any]:
        """The picture of a step, counted from 1, and what it is."""
        run = run_of(self.studio.jobs.get(owner_of(visitor, request), job_id))
        if run is None or run.recording is None or not len(run.recording):
            return [gr.skip(), ""]
        index = min(whole("step", step, 1, MOST_STEPS), len(run.recording)) - 1
        picture, _, label = self._step(run, index, None)
        return [picture, label]

    def _step(self, run: Run, index: int, scrub: Any) -> list[Any]:
        assert run.recording is not None
        words = run.recording.label(index)
        shown = picture_html(run.recording.picture(index), alternative(run, words), f"{self.name}-picture")
        return [shown, scrub, step_html(words)]

    def stop(self, visitor: Any, job_id: Any, request: gr.Request) -> Any:
        """End the run, also one that waits."""
        stopped = self.studio.jobs.stop(owner_of(visitor, request), job_id)
        return status_html("Stopping…", "stopped") if stopped else gr.skip()


def _results(run: Run) -> list[Any]:
    """Gallery, video and files of a finished run."""
    if not run.files or run.recording is None or run.request is None:
        return [gr.skip()] * 3
    paths = [str(path) for path in run.files]
    if run.recording.pipeline.makes_videos:
        films = [name for name in paths if name.endswith(".mp4")]
        return [gr.Gallery(visible=False), gr.Video(films[0], visible=True), gr.File(paths, visible=True)]
    captioned = list(zip(paths, titles(run.recording.pipeline, run.request), strict=True))
    return [gr.Gallery(captioned, visible=True), gr.Video(visible=False), gr.File(paths, visible=True)]
