"""The Generate tab: images and videos, every step of which can be watched, and scrubbed through afterwards."""

import asyncio
import random
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from vgen.app.core import Run, Studio, titles
from vgen.app.forms import copy_as
from vgen.app.generate_form import GenerateForm
from vgen.app.jobs import Job
from vgen.app.parts import (
    PRIVATE,
    QUICK,
    WATCHING,
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
from vgen.app.recording import export_gif
from vgen.types import SettingError

RANDOM_SEEDS = 1 << 32
EMPTY = "Nothing yet: press Generate, or Ctrl+Enter."
COPIES = ("Command line", "Python", "curl")


class GenerateTab(GenerateForm):
    """Builds the tab's components and wires them to the studio."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor, self.current = studio, visitor, current
        with gr.Row(equal_height=False, elem_classes="vgen-main"):
            with gr.Column(scale=2, min_width=300):
                self._form(studio.models.names(), studio.models.usual())
            with gr.Column(scale=3, min_width=320):
                self._canvas()

    # ---- layout

    def _canvas(self) -> None:
        self.status = gr.HTML(status_html("Ready."), elem_id="status")
        self.picture = gr.HTML(picture_html(None, "", empty=EMPTY), elem_id="preview")
        with gr.Row(elem_classes="vgen-scrub"):
            self.play = gr.Button("Play", size="sm", min_width=60, elem_id="play", scale=0)
            self.scrub = gr.Slider(1, 2, value=1, step=1, label="Step", elem_id="scrub", interactive=True, scale=4)
        self.step_label = gr.HTML("", elem_id="step-label")
        self.gallery = gr.Gallery(
            label="Files of the last run",
            columns=6,
            height=220,
            object_fit="contain",
            interactive=False,
            elem_id="results",
            visible=False,
        )
        self.video = gr.Video(
            label="Video", visible=False, autoplay=True, loop=True, elem_id="video", interactive=False
        )
        self.files = gr.File(
            label="Files", file_count="multiple", visible=False, interactive=False, elem_id="files", height=150
        )
        with gr.Accordion("Copy as", open=False):
            self.copies = [
                gr.Code(label=name, language="python" if name == "Python" else "shell", interactive=False, lines=2)
                for name in COPIES
            ]
            self.link = gr.Textbox(label="Link to this form", interactive=False, buttons=["copy"], elem_id="link")
            self.gif_button = gr.Button("Make a GIF of all steps", size="sm")
            self.gif = gr.File(label="Steps as a GIF", visible=False, interactive=False)

    # ---- wiring

    @property
    def shown(self) -> list[Any]:
        return [
            self.status,
            self.picture,
            self.scrub,
            self.step_label,
            self.gallery,
            self.video,
            self.files,
            *self.copies,
            self.link,
            self.go,
            self.stop,
        ]

    def wire(self, page: gr.Blocks) -> None:
        who, now = self.visitor, self.current
        starting = [now, self.seed, self.status, self.go, self.stop]
        begun = self.go.click(self.start, [who, self.randomly, *self.form], starting, **QUICK)
        followed = begun.success(self.follow, [who, now], self.shown, **WATCHING)
        followed.then(friendly(self.tell_cost), self.costing, [self.cost], **QUICK)
        rolled = self.again.click(self.start_again, [who, now, *self.form], starting, **QUICK)
        rolled.success(self.follow, [who, now], self.shown, **WATCHING)
        self.stop.click(self.end, [who, now], [self.status], **QUICK)
        self.scrub.input(
            self.look, [who, now, self.scrub], [self.picture, self.step_label], **QUICK, trigger_mode="always_last"
        )
        self.gif_button.click(self.make_gif, [who, now], [self.gif], **PRIVATE)
        self.wire_form(page)

    # ---- running

    def start(self, visitor: Any, request: gr.Request, randomly: bool, *form: Any) -> list[Any]:
        """Queue a run of the form; its number, the seed that is used, and what the buttons become."""
        return self._start(owner_of(visitor, request), randomly, form)

    def start_again(self, visitor: Any, request: gr.Request, job_id: Any, *form: Any) -> list[Any]:
        """End the present run and queue another one with a new seed."""
        owner = owner_of(visitor, request)
        self.studio.jobs.stop(owner, job_id)
        return self._start(owner, True, form)

    def _start(self, owner: str, randomly: bool, form: Sequence[Any]) -> list[Any]:
        return friendly(self._submit)(owner, randomly, list(form))

    def _submit(self, owner: str, randomly: bool, form: list[Any]) -> list[Any]:
        if randomly:
            form[3] = random.randrange(RANDOM_SEEDS)
        ask, clip = self.ask(*form)
        job = self.studio.sample(owner, ask, clip)
        waiting = status_html("Waiting for its turn…" if self.studio.jobs.position(job) else "Starting…", "waiting")
        return [job.id, form[3], waiting, gr.Button(interactive=True), gr.Button(interactive=True)]

    async def follow(self, visitor: Any, job_id: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show a run as it goes on, until it ends; a page that was loaded anew comes back to it here."""
        job = self.studio.jobs.get(owner_of(visitor, request), job_id)
        if job is None:
            yield [gr.skip()] * len(self.shown)  # a page that was never here, or whose run is long gone
            return
        async for last in watch(job):
            yield await asyncio.to_thread(self.view, job, last)

    def view(self, job: Job, last: bool) -> list[Any]:
        """What the page shows of a job now."""
        run = run_of(job)
        recording = run.recording if run is not None else None
        text, kind = describe_job(self.studio, job, run)
        if run is None or recording is None or not len(recording):
            empty = picture_html(None, "", empty="" if job.state == "running" else EMPTY)
            rest = [gr.skip()] * (len(self.shown) - 4)
            return [status_html(text, kind), empty, *rest, gr.Button(interactive=True), gr.Button(interactive=not last)]
        count = len(recording)
        label = recording.label(count - 1)
        shown = picture_html(recording.picture(count - 1), alternative(run, label))
        scrub = gr.Slider(maximum=max(2, count), value=count)
        done = self._results(run) if last and run.files else [gr.skip()] * 7
        stop = gr.Button(interactive=not last)
        return [status_html(text, kind), shown, scrub, step_html(label), *done, gr.Button(interactive=True), stop]

    def _results(self, run: Run) -> list[Any]:
        """Gallery, video, files, commands and link of a finished run."""
        assert run.recording is not None and run.request is not None
        pipeline = run.recording.pipeline
        copies = copy_as(pipeline, run.request)
        link = f"?run={urllib.parse.quote(run.request.to_json())}"
        files = [str(path) for path in run.files]
        if pipeline.makes_videos:
            films = [name for name in files if name.endswith(".mp4")]
            shown = [gr.Gallery(visible=False), gr.Video(films[0], visible=True)]
        else:
            captioned = list(zip(files, titles(pipeline, run.request), strict=True))
            shown = [gr.Gallery(captioned, visible=True), gr.Video(visible=False)]
        return [*shown, gr.File(files, visible=True), *copies.values(), link]

    def end(self, visitor: Any, job_id: Any, request: gr.Request) -> Any:
        """Stop the run, also one that waits."""
        owner = owner_of(visitor, request)
        if not self.studio.jobs.stop(owner, job_id):
            return gr.skip()
        return status_html("Stopping…", "stopped")

    def look(self, visitor: Any, job_id: Any, step: Any, request: gr.Request) -> list[Any]:
        """The picture of a step, counted from 1, and what it is."""
        run = run_of(self.studio.jobs.get(owner_of(visitor, request), job_id))
        recording = run.recording if run is not None else None
        if recording is None or not len(recording):
            return [gr.skip(), step_html("")]
        index = min(max(int(step), 1), len(recording)) - 1
        label = recording.label(index)
        return [picture_html(recording.picture(index), alternative(run, label)), step_html(label)]

    def make_gif(self, visitor: Any, job_id: Any, request: gr.Request) -> Any:
        """All steps of the last run as a file."""
        return friendly(self._make_gif)(owner_of(visitor, request), job_id)

    def _make_gif(self, owner: str, job_id: Any) -> Any:
        job = self.studio.jobs.get(owner, job_id)
        run = run_of(job)
        if job is None or run is None or run.recording is None or not len(run.recording):
            raise SettingError("there are no steps yet: generate something first")
        path = self.studio.owner_folder(owner) / f"steps-{job.id}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(export_gif(run.recording))
        return gr.File(str(path), visible=True)
