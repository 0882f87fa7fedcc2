"""What the panels of the Inspect tab share: the run they look at, model work in the queue, and examples."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from functools import partial
from typing import Any, ClassVar

import gradio as gr

from vgen.app.core import Studio, titles
from vgen.app.forms import Ask
from vgen.app.jobs import Job
from vgen.app.parts import (
    WATCHING,
    describe_job,
    friendly,
    owner_of,
    run_of,
    status_html,
    watch,
)
from vgen.app.recording import Recording
from vgen.types import SettingError

NOTHING = "Nothing to look at yet: generate something first, or run the example."
Work = Generator[None, None, list[Any]]  # yields after every evaluation, returns what the page shows


class Panel:
    """A part of the Inspect tab.

    Subclasses build their components in `build`, where they set `inputs`, the controls whose values they read beside
    visitor and run, and `parts`, what they show; and answer in `view`.
    """

    name: ClassVar[str]
    example_words: ClassVar[str] = ""

    needs_run: ClassVar[bool] = True

    inputs: Sequence[Any] = ()
    parts: Sequence[Any] = ()

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor, self.current = studio, visitor, current
        self.status = gr.HTML(status_html(NOTHING), elem_id=f"{self.key}-status")
        words = f"Run an example: {self.example_words}"
        self.example = gr.Button(words, size="sm", visible=bool(self.example_words), elem_classes="vgen-example")
        with gr.Column(visible=not self.needs_run) as self.body:
            self.build()

    @property
    def shown(self) -> list[Any]:
        """All that `open` and `show` give a value to."""
        return [self.status, self.example, self.body, *self.parts]

    @property
    def key(self) -> str:
        return f"inspect-{self.name.lower().replace(' ', '-')}"

    # ---- what panels provide

    def build(self) -> None:
        raise NotImplementedError

    def lacking(self, recording: Recording) -> str | None:
        """Why there is nothing to see of a run, and what to run instead; None where there is."""
        return None

    def example_ask(self) -> Ask:
        """A run that this panel has something to say on. Raises SettingError where no model here can do it."""
        raise NotImplementedError

    def fit(self, recording: Recording, values: Sequence[Any]) -> list[Any]:
        """Controls' values that fit a run, where they were chosen for another one."""
        return list(values)

    def view(self, recording: Recording, *values: Any) -> Work:
        """The values of `parts`, for a run that does not lack anything."""
        raise NotImplementedError
        yield

    # ---- events

    def wire(self, page: gr.Blocks) -> None:
        given = [self.visitor, self.current, *self.inputs]
        if self.example_words:
            began = self.example.click(self.run_example, [self.visitor], [self.current, self.status], **WATCHING)
            began.success(self.open, given, self.shown, **WATCHING)
        changed = [control.release if isinstance(control, gr.Slider) else control.input for control in self.inputs]
        if changed:
            gr.on(changed, self.show, given, self.shown, **WATCHING, trigger_mode="always_last")

    @friendly
    async def open(self, visitor: Any, job_id: Any, request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        """Show the last run, with whatever controls fit it."""
        async for item in self._show(owner_of(visitor, request), job_id, values, fitting=True):
            yield item

    @friendly
    async def open_if_selected(
        self, selected: Any, visitor: Any, job_id: Any, request: gr.Request, *values: Any
    ) -> AsyncIterator[list[Any]]:
        """Show the last run where this is the panel in front."""
        if selected != self.name:
            yield [gr.skip()] * len(self.shown)
            return
        async for item in self._show(owner_of(visitor, request), job_id, values, fitting=True):
            yield item

    @friendly
    async def show(self, visitor: Any, job_id: Any, request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        """Show the last run as the controls say. Values out of range are refused."""
        async for item in self._show(owner_of(visitor, request), job_id, values, fitting=False):
            yield item

    async def _show(self, owner: str, job_id: Any, values: Sequence[Any], fitting: bool) -> AsyncIterator[list[Any]]:
        recording = self.recording(owner, job_id)
        line = NOTHING if recording is None else self.lacking(recording)
        if recording is None or line is not None:
            yield self.nothing(line or NOTHING)
            return
        chosen = self.fit(recording, values) if fitting else list(values)
        head = [gr.Button(visible=False), gr.Column(visible=True)]
        work, told = partial(self.view, recording, *chosen), describe_run(recording)
        async for status, *parts in self.answer(owner, work, len(self.parts) + 1, told):
            yield [status, *head, *parts]

    def nothing(self, line: str) -> list[Any]:
        """A line, the example's button, and nothing else."""
        blank = ["" if isinstance(part, gr.HTML) else gr.skip() for part in self.parts]
        return [status_html(line), gr.Button(visible=bool(self.example_words)), gr.Column(visible=False), *blank]

    async def answer(self, owner: str, work: Callable[[], Work], count: int, done: str) -> AsyncIterator[list[Any]]:
        """Do model work in the queue: lines on how it goes, at last `done` with what it returned; `count` values."""

        def steps(job: Job) -> Generator[None, None, None]:
            job.view = yield from work()

        job = self.studio.jobs.submit(owner, "inspect", self.name, steps)
        nothing = [gr.skip()] * (count - 1)
        try:
            async for last in watch(job):
                if not last:
                    before = self.studio.jobs.position(job)
                    runs = "run" if before == 1 else "runs"
                    text = f"Waiting: {before} {runs} before this." if before else "Computing…"
                    yield [status_html(text, "waiting"), *nothing]
            if job.state == "done":
                yield [status_html(done, "done"), *job.view]
            else:
                yield [status_html(f"Not done: {job.error or 'it was stopped'}", "failed"), *nothing]
        finally:  # a visitor who goes away ends it; what was computed is in the page
            self.studio.jobs.forget(job)

    @friendly
    async def run_example(self, visitor: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Run the panel's example as if the form had asked for it; its number and how it goes."""
        ask = await asyncio.to_thread(self.example_ask)
        job = await asyncio.to_thread(self.studio.sample, owner_of(visitor, request), ask)
        async for _ in watch(job):
            yield [job.id, status_html(*describe_job(self.studio, job, run_of(job)))]
        if job.state == "failed":
            raise SettingError(job.error or "the example failed")

    # ---- runs

    def recording(self, owner: str, job_id: Any) -> Recording | None:
        """The steps of an owner's run; None where there are none."""
        run = run_of(self.studio.jobs.get(owner, job_id if isinstance(job_id, str) else None))
        recording = run.recording if run is not None else None
        return recording if recording is not None and len(recording) else None


def describe_run(recording: Recording) -> str:
    """Which run is looked at, in one line."""
    request, rows = recording.request, recording.rows
    named = list(titles(recording.pipeline, request))
    more = f" and {rows - 2} more" if rows > 2 else ""
    return f"Last run: {request.model}, {request.sampler}, {'; '.join(named[:2])}{more}."


def fitted(value: Any, low: int, high: int, default: int) -> int:
    """A control's whole number where it lies within bounds, else the default."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and value == int(value):
        return int(value)
    return default


def slider(value: int, high: int) -> gr.Slider:
    """A slider from 1 that fits a run; it hides where there is nothing to choose."""
    return gr.Slider(value=value, maximum=max(2, high), visible=high > 1)
