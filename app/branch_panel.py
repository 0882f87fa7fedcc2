"""Going on from a run: tokens or scales locked and the rest drawn anew, or a branch at one of its steps."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
import torch

from vgen.app.branching import (
    Kept,
    fork,
    keep_scales,
    keep_tokens,
    label_of,
    parent_recording,
    row_of,
    submit_branch,
    tree,
    uncertain,
)
from vgen.app.core import Studio
from vgen.app.editing import MAX_VERSIONS, grid_side
from vgen.app.forms import whole
from vgen.app.generate import RANDOM_SEEDS
from vgen.app.jobs import Job
from vgen.app.parts import ORDERED, QUICK, WATCHING, friendly, owner_of, status_html, watch
from vgen.app.pictures import enlarge
from vgen.app.recording import Recording
from vgen.app.run_panel import MOST_STEPS, RunPanel
from vgen.app.token_marks import MARKS_JS, marks_html
from vgen.media import png_bytes
from vgen.types import SettingError

WAYS = {
    "step": "Branch at a step: keep all it knew",
    "coarse": "Keep the layout: lock the first scales",
    "fine": "Keep the detail: lock the last scales",
    "tokens": "Lock tokens: draw the marked ones anew",
}
EXPLAINED = {
    "step": (
        "With the run's own seed, scale-by-scale and raster models draw the same picture again; models that unmask "
        "make a new plan for what is left."
    ),
    "coarse": "Coarse scales hold what is where. They stay; finer ones are drawn anew.",
    "fine": (
        "For curiosity: codes of the last scales only correct what coarser ones painted, so over a new layout they "
        "mean little."
    ),
    "tokens": (
        "Marked tokens are drawn anew. Scale by scale, a coarser token stays where most of its area does, so kept "
        "pixels may still change a little; Repaint keeps them exactly."
    ),
}
NO_RUN = "There is no run yet: press Generate in the Generate tab."
EMPTY = "Choose a run and what to keep, then press Go on."
INDENT = "\u2003\u2003"


class BranchPanel:
    """Components, and what they do."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor, self.current = studio, visitor, current
        self.job = gr.BrowserState(None, storage_key="vgen-branch", secret=current.secret)
        self.marked = gr.State(frozenset())
        with gr.Row(equal_height=False, elem_classes="vgen-main"):
            with gr.Column(scale=1, min_width=300):
                self.runs = gr.Radio(
                    [], label="Go on from", info="Branches stand below what they came from.", elem_id="branch-runs"
                )
                self.image = gr.Number(
                    value=1, precision=0, minimum=1, label="Image of the run", elem_id="branch-image"
                )
                self.way = gr.Radio(
                    [(words, way) for way, words in WAYS.items()],
                    value="step",
                    label="What stays",
                    elem_id="branch-way",
                )
                self.explained = gr.HTML(_note(EXPLAINED["step"]))
                self.amount = gr.Slider(1, 2, value=1, step=1, label="Step", elem_id="branch-amount")
            with gr.Column(scale=1, min_width=300):
                self.grid = gr.HTML(marks_html(None, None, "", NO_RUN), js_on_load=MARKS_JS, elem_id="branch-tokens")
                with gr.Row(visible=False, elem_classes="vgen-toolbar") as self.marking:
                    self.count = gr.Number(value=8, precision=0, minimum=1, label="How many", min_width=80)
                    self.least = gr.Button("Mark the least certain", size="sm", min_width=150, elem_id="branch-least")
                    self.clear = gr.Button("Clear", size="sm", min_width=70)
                with gr.Row():
                    self.versions = gr.Slider(1, MAX_VERSIONS, value=4, step=1, label="Versions", min_width=120)
                    self.seed = gr.Number(
                        value=0, precision=0, minimum=0, label="Seed", min_width=90, elem_id="branch-seed"
                    )
                self.randomly = gr.Checkbox(value=True, label="New random seed for every run", elem_id="branch-random")
                with gr.Row():
                    self.go = gr.Button("Go on", variant="primary", elem_id="branch-go", min_width=110)
                    self.stop = gr.Button("Stop", variant="stop", elem_id="branch-stop", min_width=80)
            with gr.Column(scale=1, min_width=300):
                self.panel = RunPanel(studio, "branch", EMPTY)

    # ---- wiring

    @property
    def who(self) -> list[Any]:
        return [self.visitor, self.current, self.runs, self.image, self.way]

    @property
    def chosen(self) -> list[Any]:
        """What depends on the run and on what stays."""
        return [self.runs, self.image, self.amount, self.explained, self.marking, self.grid, self.marked]

    def wire(self, page: gr.Blocks) -> None:
        choices = [control.input for control in (self.runs, self.image, self.way)]
        gr.on(choices, self.list_runs, self.who, self.chosen, **QUICK, trigger_mode="always_last")
        self.amount.input(
            self.look, [*self.who, self.amount, self.marked], [self.grid], **QUICK, trigger_mode="always_last"
        )
        marking = [*self.who, self.amount, self.marked]
        self.grid.click(self.click, marking, [self.grid, self.marked], **ORDERED)
        self.clear.click(self.unmark, marking, [self.grid, self.marked], **QUICK)
        self.least.click(
            self.mark_least, [*marking, self.count], [self.grid, self.marked, self.panel.status], **WATCHING
        )
        form = [self.seed, self.randomly, self.versions]
        begun = self.go.click(self.start, [*marking, *form], [self.job, self.seed, self.panel.status], **QUICK)
        follow = ([self.visitor, self.job], self.panel.shown)
        ended = begun.success(self.panel.follow, *follow, **WATCHING)
        ended.then(self.list_runs, self.who, self.chosen, **QUICK)
        page.load(self.panel.follow, *follow, **WATCHING)
        self.stop.click(self.panel.stop, [self.visitor, self.job], [self.panel.status], **QUICK)
        self.panel.wire(self.visitor, self.job)

    # ---- which run, and what stays

    def parent(self, owner: str, run: Any) -> tuple[Job, Recording]:
        """The chosen run. Raises SettingError."""
        job = self.studio.jobs.get(owner, run if isinstance(run, str) else None)
        recording = parent_recording(job)
        assert job is not None
        return job, recording

    @friendly
    def list_runs(self, visitor: Any, request: gr.Request, current: Any, run: Any, image: Any, way: Any) -> list[Any]:
        """The runs as they are now, one of them chosen, and the controls as that one has it."""
        owner = owner_of(visitor, request)
        nodes = tree(self.studio, owner)
        choices = [(f"{INDENT * node.depth}{'↳ ' if node.depth else ''}{node.words}", node.job.id) for node in nodes]
        ids = [node.job.id for node in nodes]
        run = next((wanted for wanted in (run, current, *ids) if wanted in ids), None)
        runs = gr.Radio(choices=choices, value=run)
        try:
            _, recording = self.parent(owner, run)
        except SettingError as error:
            reason = NO_RUN if run is None else f"{str(error)[0].upper()}{str(error)[1:]}."
            empty = marks_html(None, None, "", reason)
            return [runs, gr.skip(), gr.skip(), gr.skip(), gr.Row(visible=False), empty, frozenset()]
        way = way if way in WAYS else "step"
        row = min(image - 1, recording.rows - 1) if isinstance(image, int) and image > 0 else 0
        amount, value = self._amount(recording, way)
        grid = self._drawn(recording, row, way, value, frozenset())
        explained, marking = _note(EXPLAINED[way]), gr.Row(visible=way == "tokens")
        return [runs, gr.Number(row + 1, maximum=recording.rows), amount, explained, marking, grid, frozenset()]

    def _amount(self, recording: Recording, way: str) -> tuple[Any, int]:
        """The slider that says how much stays, and its value."""
        scales = len(recording.steps[-1].tokens) if isinstance(recording.steps[-1].tokens, list) else 0
        if way == "step":
            last = max(1, len(recording) - 1)
            value = max(1, last // 2)
            return gr.Slider(1, max(2, last), value=value, label="Step to branch at", visible=last > 1), value
        most = max(1, scales - 1)
        value = max(1, most // 2)
        label = f"Scales that stay, of {scales}"
        return gr.Slider(1, max(2, most), value=value, label=label, visible=way != "tokens" and most > 1), value

    def _drawn(self, recording: Recording, row: int, way: str, amount: int, free: frozenset[int]) -> str:
        """The image as what stays has it, and under "tokens" the tokens to click."""
        place = len(recording) - 1
        if way in ("step", "coarse"):
            place = min(amount, len(recording)) - 1
        png = png_bytes(enlarge(recording.pixels(place)[row]))
        if way != "tokens":
            return marks_html(png, torch.zeros(0), f"Image {row + 1}, {recording.label(place)}.", NO_RUN)
        side = grid_side(recording.pipeline)
        marked = torch.zeros(side * side, dtype=torch.bool)
        marked[sorted(free)] = True
        caption = f"{len(free)} of {side * side} tokens are drawn anew."
        return marks_html(png, marked.view(side, side), caption, NO_RUN)

    @friendly
    def look(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> Any:
        """The image at another step or scale."""
        run, image, way, amount, free = values
        return self._look(owner_of(visitor, request), run, image, way, amount, free)[0]

    def _look(self, owner: str, run: Any, image: Any, way: Any, amount: Any, free: Any) -> list[Any]:
        _, recording = self.parent(owner, run)
        number = whole("step", amount, 1, MOST_STEPS)
        return [self._drawn(recording, row_of(recording, image), str(way), number, free), free]

    @friendly
    def click(self, visitor: Any, request: gr.Request, event: gr.EventData, current: Any, *values: Any) -> list[Any]:
        """Mark a token, or take its mark away."""
        run, image, way, amount, free = values
        owner = owner_of(visitor, request)
        _, recording = self.parent(owner, run)
        number = whole("token", getattr(event, "token", None), 0, grid_side(recording.pipeline) ** 2 - 1)
        return self._look(owner, run, image, way, amount, free ^ {number})

    @friendly
    def unmark(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> list[Any]:
        """Take all marks away."""
        run, image, way, amount, _ = values
        return self._look(owner_of(visitor, request), run, image, way, amount, frozenset())

    @friendly
    async def mark_least(
        self, visitor: Any, request: gr.Request, current: Any, *values: Any
    ) -> AsyncIterator[list[Any]]:
        """Mark the tokens that the model finds least probable, which takes evaluations."""
        owner = owner_of(visitor, request)
        job = await asyncio.to_thread(self._submit_least, owner, *values)
        yield [gr.skip(), gr.skip(), status_html("Asking the model…", "running")]
        async for last in watch(job):
            if last:
                yield self._show_least(owner, job, values)

    def _submit_least(self, owner: str, run: Any, image: Any, way: Any, amount: Any, free: Any, count: Any) -> Job:
        _, recording = self.parent(owner, run)
        row = row_of(recording, image)
        number = whole("how many", count, 1, grid_side(recording.pipeline) ** 2)

        def work(job: Job) -> Any:
            job.show((yield from uncertain(recording, row, number)))

        return self.studio.jobs.submit(owner, "certainty", recording.request.model, work)

    def _show_least(self, owner: str, job: Job, values: Sequence[Any]) -> list[Any]:
        run, image, way, amount, _, _ = values
        if job.state == "failed":
            raise SettingError(job.error or "failed")
        found = frozenset(job.view or ())
        grid, marks = self._look(owner, run, image, way, amount, found)
        return [grid, marks, status_html(f"{len(found)} tokens marked.", "done")]

    # ---- running

    @friendly
    def start(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> list[Any]:
        """Queue the branch; its job, the seed that is used, and a line."""
        run, image, way, amount, free, seed, randomly, versions = values
        owner = owner_of(visitor, request)
        job, recording = self.parent(owner, run)
        row = row_of(recording, image)
        seed = random.randrange(RANDOM_SEEDS) if randomly else seed
        kept = self._kept(recording, row, way, amount, free)
        made = submit_branch(self.studio, owner, job, row, kept, seed, versions, label_of(recording, row))
        return [made.id, seed, status_html("Starting…", "waiting")]

    @staticmethod
    def _kept(recording: Recording, row: int, way: Any, amount: Any, free: Any) -> Kept:
        if way == "tokens":
            return keep_tokens(recording, row, free)
        if way in ("coarse", "fine"):
            return keep_scales(recording, row, whole("scales", amount, 1, MOST_STEPS), coarse=way == "coarse")
        if way != "step":
            raise SettingError(f"there is no {str(way)[:40]!r} to keep: use one of {', '.join(WAYS)}")
        return fork(recording, whole("step", amount, 1, len(recording)) - 1, row)


def _note(text: str) -> str:
    return f'<p class="vgen-note">{text}</p>'
