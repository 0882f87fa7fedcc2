"""Pieces of the page that several tabs use: pictures and status lines as HTML, watching a job, errors as one line."""

import asyncio
import base64
import functools
import html
import inspect
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from vgen.app.core import Run, Studio, line_for, owner_name, titles
from vgen.app.jobs import Job

FRAME_SECONDS = 0.1  # between two previews, at least
SHARE = 7.0  # and so many times what the last one took: previews must not hold up the run
LONGEST_PAUSE = 1.0
POLL_SECONDS = 0.03
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = PRIVATE | {"queue": False}  # for what takes no model evaluation
# One after the other, none left out: for clicks that each build on what the one before it did.
ORDERED: dict[str, Any] = PRIVATE | {"concurrency_limit": 1, "trigger_mode": "multiple"}
WATCHING: dict[str, Any] = PRIVATE | {"concurrency_limit": None}  # watching costs nothing: as many as there are pages


def owner_of(visitor: Any, request: gr.Request | None) -> str:
    """Whose runs and files these are. `visitor` is the secret that the browser keeps, which may be anything."""
    return owner_name(getattr(request, "username", None), visitor_token(visitor, request))


def visitor_token(visitor: Any, request: gr.Request | None) -> str:
    """The secret that a browser keeps. At its first visit it is made of the page's own, so that whoever clicks before
    it has arrived is the same person afterwards."""
    if isinstance(visitor, str) and visitor:
        return visitor
    return f"session {getattr(request, 'session_hash', None)}"


def friendly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors reach the page as one line; what is our own mistake is logged."""

    def translate(error: Exception) -> gr.Error:
        line = line_for(error, handler.__qualname__)
        return gr.Error(html.escape(line), print_exception=False, title="That did not work")

    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def watched(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            try:
                async for item in handler(*args, **kwargs):
                    yield item
            except gr.Error:
                raise
            except Exception as error:
                raise translate(error) from error

        return watched

    @functools.wraps(handler)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise translate(error) from error

    return called


def picture_html(png: bytes | None, alternative: str, name: str = "picture", empty: str = "") -> str:
    """A picture as HTML, nothing of it written to the disk; `empty` is said where there is none."""
    if png is None:
        return f'<div class="vgen-empty" id="{name}">{html.escape(empty)}</div>'
    data = base64.b64encode(png).decode()
    words = html.escape(alternative, quote=True)
    return f'<img id="{name}" class="vgen-pixels" alt="{words}" src="data:image/png;base64,{data}">'


def text_to_copy(label: str, lines: int = 2, most: int = 16) -> gr.Textbox:
    """Text in fixed pitch with a button that copies it: a tenth of the script that Gradio's Code component needs."""
    return gr.Textbox(
        label=label, interactive=False, lines=lines, max_lines=most, buttons=["copy"], elem_classes="vgen-code"
    )


def note(text: str) -> gr.HTML:
    """A paragraph in small print."""
    return gr.HTML(note_html(text))


def note_html(text: str) -> str:
    return f'<p class="vgen-note">{html.escape(text)}</p>'


def tab_named(tabs: gr.Tabs, name: str) -> gr.Tab:
    """The tab with an id."""
    return next(tab for tab in tabs.children if isinstance(tab, gr.Tab) and tab.id == name)


def status_html(text: str, kind: str = "") -> str:
    """A line that screen readers announce."""
    return f'<div role="status" aria-live="polite" class="vgen-status {kind}">{html.escape(text)}</div>'


def step_html(text: str) -> str:
    """What is said under a picture."""
    return f'<div class="vgen-step">{html.escape(text)}</div>'


def describe_job(studio: Studio, job: Job, run: Run | None) -> tuple[str, str]:
    """How far a job is, and its kind for the style sheet."""
    if job.state == "queued":
        before = studio.jobs.position(job)
        return f"Waiting: {before} {'run' if before == 1 else 'runs'} before this one. Stop works here too.", "waiting"
    if job.state == "failed":
        return f"Not done: {job.error}", "failed"
    recording = run.recording if run is not None else None
    if recording is None or not len(recording):
        return ("Loading the model…" if job.state == "running" else job.state.capitalize()), job.state
    last = recording.steps[-1]
    text = f"{recording.label(-1)}, {last.evaluations} evaluations"
    if job.state == "running":
        return text[0].upper() + text[1:], "running"
    if job.state == "stopped":
        return f"Stopped at {text}. What was done stays.", "stopped"
    seconds = run.seconds if run is not None else None
    each = "" if seconds is None else f" in {short(seconds)}"
    return f"Done: {recording.rows} in {last.evaluations} evaluations{each}.", "done"


def short(seconds: float) -> str:
    """A time as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def pause_after(seconds: float) -> float:
    """How long to wait until the next preview, the last one having taken so many seconds."""
    return min(max(FRAME_SECONDS, SHARE * seconds), LONGEST_PAUSE)


def too_early(job: Job) -> bool:
    """Whether a first preview now would hold up a run that has only begun by more than its share."""
    run = run_of(job)
    glance = run.recording.glance if run is not None and run.recording is not None else 0.0
    return bool(glance) and job.began is not None and time.time() - job.began < pause_after(glance)


async def watch(job: Job) -> AsyncIterator[bool]:
    """Wake whenever there is something new to show of a job, ten times a second at most: True at the last time.

    Leaving off watching does not stop the job.
    """
    seen, due = -1, 0.0
    while True:
        job.seen = now = time.monotonic()
        version, ended = job.version, job.ended
        if ended or (version != seen and now >= due and not too_early(job)):
            seen = version
            yield ended
            if ended:
                return
            due = time.monotonic() + pause_after(time.monotonic() - now)
        await asyncio.sleep(POLL_SECONDS)


def run_of(job: Job | None) -> Run | None:
    return job.view if job is not None and isinstance(job.view, Run) else None


def alternative(run: Run | None, step: str = "") -> str:
    """What a run's picture shows, in words."""
    if run is None or run.recording is None or run.request is None:
        return ""
    named = list(titles(run.recording.pipeline, run.request))
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return f"{run.request.model}: {'; '.join(named[:4])}{more}{', ' + step if step else ''}"
