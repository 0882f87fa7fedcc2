"""The Generate tab: images and videos, every step of which can be watched, and scrubbed through afterwards."""

import random
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from vgen.app.core import Studio
from vgen.app.forms import copy_as
from vgen.app.generate_form import GenerateForm
from vgen.app.jobs import Job
from vgen.app.parts import (
    PRIVATE,
    QUICK,
    WATCHING,
    friendly,
    owner_of,
    run_of,
    status_html,
    text_to_copy,
)
from vgen.app.recording import export_gif
from vgen.app.run_panel import RunPanel
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
        self.panel = RunPanel(self.studio, "run", EMPTY)
        with gr.Accordion("Copy as", open=False):
            self.copies = [text_to_copy(name) for name in COPIES]
            self.link = gr.Textbox(label="Link to this form", interactive=False, buttons=["copy"], elem_id="link")
            self.gif_button = gr.Button("Make a GIF of all steps", size="sm")
            self.gif = gr.File(label="Steps as a GIF", visible=False, interactive=False)

    # ---- wiring

    @property
    def shown(self) -> list[Any]:
        return [*self.panel.shown, *self.copies, self.link, self.go, self.stop]

    def wire(self, page: gr.Blocks) -> None:
        who, now = self.visitor, self.current
        starting = [now, self.seed, self.panel.status, self.go, self.stop]
        begun = self.go.click(self.start, [who, self.randomly, *self.form], starting, **QUICK)
        followed = begun.success(self.follow, [who, now], self.shown, **WATCHING)
        followed.then(friendly(self.tell_cost), self.costing, [self.cost], **QUICK)
        rolled = self.again.click(self.start_again, [who, now, *self.form], starting, **QUICK)
        rolled.success(self.follow, [who, now], self.shown, **WATCHING)
        self.stop.click(self.panel.stop, [who, now], [self.panel.status], **QUICK)
        self.panel.wire(who, now)
        self.gif_button.click(self.make_gif, [who, now], [self.gif], **PRIVATE)
        self.wire_form(page)

    # ---- running

    @friendly
    def start(self, visitor: Any, request: gr.Request, randomly: bool, *form: Any) -> list[Any]:
        """Queue a run of the form; its number, the seed that is used, and what the buttons become."""
        return self._start(owner_of(visitor, request), randomly, list(form))

    @friendly
    def start_again(self, visitor: Any, request: gr.Request, job_id: Any, *form: Any) -> list[Any]:
        """End the present run and queue another one with a new seed."""
        owner = owner_of(visitor, request)
        self.studio.jobs.stop(owner, job_id)
        return self._start(owner, True, list(form))

    def _start(self, owner: str, randomly: bool, form: list[Any]) -> list[Any]:
        if randomly:
            form[3] = random.randrange(RANDOM_SEEDS)
        ask, clip = self.ask(*form)
        job = self.studio.sample(owner, ask, clip)
        waiting = status_html("Waiting for its turn…" if self.studio.jobs.position(job) else "Starting…", "waiting")
        return [job.id, form[3], waiting, gr.Button(interactive=True), gr.Button(interactive=True)]

    async def follow(self, visitor: Any, job_id: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show a run as it goes on, until it ends; a page that was loaded anew comes back to it here."""
        job = self.studio.jobs.get(owner_of(visitor, request), job_id)
        async for shown in self.panel.follow(visitor, job_id, request):
            yield shown + (self._around(job) if job is not None else [gr.skip()] * 6)

    def _around(self, job: Job) -> list[Any]:
        """What goes with a run's panel: commands, link and buttons."""
        run, buttons = run_of(job), [gr.Button(interactive=True), gr.Button(interactive=not job.ended)]
        if run is None or run.recording is None or run.request is None or not (job.ended and run.files):
            return [gr.skip()] * 4 + buttons
        copies = copy_as(run.recording.pipeline, run.request)
        return [*copies.values(), f"?run={urllib.parse.quote(run.request.to_json())}", *buttons]

    @friendly
    def make_gif(self, visitor: Any, job_id: Any, request: gr.Request) -> Any:
        """All steps of the last run as a file."""
        owner = owner_of(visitor, request)
        job = self.studio.jobs.get(owner, job_id)
        run = run_of(job)
        if job is None or run is None or run.recording is None or not len(run.recording):
            raise SettingError("there are no steps yet: generate something first")
        path = self.studio.owner_folder(owner) / f"steps-{job.id}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(export_gif(run.recording))
        return gr.File(str(path), visible=True)
