"""The Compare tab: a race of samplers on one clock, and a grid of two settings whose cells are files."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from vgen.app import cells, race
from vgen.app.compare_view import differences_html, entrants_html, grid_html, order_html, status
from vgen.app.core import Studio
from vgen.app.forms import Ask, whole
from vgen.app.jobs import Job
from vgen.app.measured import Comparison, Summary, submit
from vgen.app.parts import PRIVATE, QUICK, WATCHING, friendly, note, note_html, owner_of, status_html, watch
from vgen.app.race import MAX_EACH, MAX_ENTRANTS

NO_CLASS = -1
RACE_NOTE = (
    "Entrants run one after another on one device, so that none slows another down. Before that comes a warm-up that "
    "does not count: the first entrant's first evaluations, and one of every other. The clock runs while the model "
    "evaluates and the sampler draws, and stands still while previews are drawn and files are written."
)
GRID_NOTE = (
    f"At most {cells.MAX_CELLS} cells. Every picture is a file that carries its request: click it to open it. Stop "
    "keeps the cells that are finished. Times are measured as in the race."
)
EMPTY_RACE = '<div class="vgen-empty">Nothing yet: press Start the race.</div>'
EMPTY_GRID = '<div class="vgen-empty">Nothing yet: press Fill the grid.</div>'


class Panel:
    """A comparison's buttons and what it shows: starting, following and stopping it.

    Args:
        kind: "race" or "grid", of jobs and of the page's names. A visitor's newest job of it is the one shown: what
            the browser keeps for a tab that is not open yet is not there when a page is loaded.
        prepare: the form's values -> what to compare. Raises SettingError.
        draw: a comparison, and whether its job has ended -> HTML for each of `pictures`.
    """

    def __init__(
        self,
        studio: Studio,
        kind: str,
        visitor: gr.BrowserState,
        prepare: Callable[..., Comparison],
        summarise: Summary,
        draw: Callable[[Any, bool], list[str]],
    ) -> None:
        self.studio, self.kind, self.visitor = studio, kind, visitor
        self.prepare, self.summarise, self.draw = prepare, summarise, draw

    def buttons(self, label: str) -> None:
        with gr.Row():
            self.go = gr.Button(label, variant="primary", elem_id=f"{self.kind}-go", min_width=140)
            self.halt = gr.Button("Stop", variant="stop", elem_id=f"{self.kind}-stop", interactive=False, min_width=80)

    def canvas(self, empty: Sequence[str]) -> None:
        self.status = gr.HTML(status_html("Ready."), elem_id=f"{self.kind}-status")
        self.pictures = [gr.HTML(text, elem_id=f"{self.kind}-part-{i}") for i, text in enumerate(empty)]
        self.files = gr.File(
            label="Files of all runs together", file_count="multiple", visible=False, interactive=False
        )

    @property
    def shown(self) -> list[Any]:
        return [self.status, *self.pictures, self.files, self.go, self.halt]

    def wire(self, page: gr.Blocks, form: Sequence[Any]) -> None:
        who = [self.visitor]
        begun = self.go.click(self.start, [*who, *form], [self.status, self.go, self.halt], **QUICK)
        begun.success(self.follow, who, self.shown, **WATCHING)
        self.halt.click(self.end, who, [self.status], **QUICK)
        page.load(self.follow, who, self.shown, **WATCHING)

    @friendly
    def start(self, visitor: Any, request: gr.Request, *form: Any) -> list[Any]:
        """Queue the comparison that the form asks for."""
        job = submit(self.studio, owner_of(visitor, request), self.kind, self.prepare(*form), self.summarise)
        waiting = status_html("Waiting for its turn…" if self.studio.jobs.position(job) else "Starting…", "waiting")
        return [waiting, gr.Button(interactive=False), gr.Button(interactive=True)]

    def job(self, visitor: Any, request: gr.Request) -> Job | None:
        """The visitor's newest comparison of this kind."""
        return self.studio.jobs.latest(owner_of(visitor, request), self.kind)

    async def follow(self, visitor: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show a comparison as it goes on, until it ends; a page that was loaded anew comes back to it here."""
        job = self.job(visitor, request)
        if job is None or job.view is None:
            yield [gr.skip()] * len(self.shown)
            return
        async for last in watch(job):
            yield await asyncio.to_thread(self.view, job, last)

    def view(self, job: Job, last: bool) -> list[Any]:
        """What the page shows of a job now."""
        text, kind = status(self.studio, job, job.view)
        files = [str(path) for path in job.view.files]
        listed = gr.File(files or None, visible=bool(files), interactive=False) if last else gr.skip()
        buttons = [gr.Button(interactive=last), gr.Button(interactive=not last)]
        return [status_html(text, kind), *self.draw(job.view, last), listed, *buttons]

    def end(self, visitor: Any, request: gr.Request) -> Any:
        """Stop the comparison, also one that waits; what is finished stays."""
        job = self.job(visitor, request)
        stopped = job is not None and self.studio.jobs.stop(job.owner, job.id)
        return status_html("Stopping…", "stopped") if stopped else gr.skip()


class CompareTab:
    """Builds the tab's components and wires them to the studio."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio = studio
        self.race = Panel(studio, "race", visitor, self.prepare_race, race.summarise, self.draw_race)
        self.grid = Panel(studio, "grid", visitor, self.prepare_grid, cells.summarise, self.draw_grid)
        names = studio.models.names()
        first = studio.models.usual("fashion-maskgit")
        pipeline = studio.models.get(first)
        self._common(names, first, pipeline)
        with gr.Tabs():
            with gr.Tab("Sampler race", id="race"), gr.Row(equal_height=False, elem_classes="vgen-main"):
                self._race(pipeline)
            with gr.Tab("Grid of two settings", id="grid"), gr.Row(equal_height=False, elem_classes="vgen-main"):
                self._grid(pipeline)

    # ---- layout

    def _common(self, names: list[str], first: str, pipeline: Any) -> None:
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown(names, value=first, label="Model", min_width=180, elem_id="compare-model")
            self.label = gr.Dropdown(
                _class_choices(pipeline),
                value=0 if pipeline.null_class else NO_CLASS,
                label="Class",
                min_width=180,
                elem_id="compare-class",
            )
            self.each = gr.Slider(
                1, MAX_EACH, value=4, step=1, label="Samples in each run", min_width=180, elem_id="compare-each"
            )
            self.seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", min_width=120, elem_id="compare-seed")

    def _race(self, pipeline: Any) -> None:
        with gr.Column(scale=2, min_width=300):
            self.entrants = gr.Textbox(
                "\n".join(race.suggest(pipeline)),
                label="Entrants",
                lines=6,
                max_lines=MAX_ENTRANTS,
                info=f"One a line, 2 to {MAX_ENTRANTS}: a sampler, settings as name=value, or both.",
                placeholder="halton steps=8",
                elem_id="entrants",
            )
            self.samplers = gr.HTML(_samplers(pipeline))
            self.race.buttons("Start the race")
            self.suggest = gr.Button("Suggest entrants", size="sm")
            note(RACE_NOTE)
        with gr.Column(scale=4, min_width=320):
            self.race.canvas([EMPTY_RACE, "", ""])

    def _grid(self, pipeline: Any) -> None:
        names = cells.axis_names(pipeline)
        first, second = ("guidance_scale" if "guidance_scale" in names else names[-1]), "seed"
        with gr.Column(scale=2, min_width=300):
            self.across = gr.Dropdown(names, value=first, label="Columns", elem_id="grid-columns")
            self.across_values = gr.Textbox(
                cells.suggest_values(pipeline, first), label="Values of the columns", info="By commas."
            )
            self.down = gr.Dropdown([cells.NONE, *names], value=second, label="Rows", elem_id="grid-rows")
            self.down_values = gr.Textbox(
                cells.suggest_values(pipeline, second), label="Values of the rows", info="By commas."
            )
            self.fixed = gr.Textbox(
                label="Settings of all cells",
                info="A sampler, settings as name=value, or both. Empty is the model's own.",
                placeholder="temperature=0.9",
                elem_id="grid-fixed",
            )
            self.grid.buttons("Fill the grid")
            note(GRID_NOTE)
        with gr.Column(scale=4, min_width=320):
            self.grid.canvas([EMPTY_GRID])

    # ---- wiring

    def wire(self, page: gr.Blocks) -> None:
        common = [self.model, self.label, self.each, self.seed]
        axes = [self.across, self.across_values, self.down, self.down_values]
        self.race.wire(page, [*common, self.entrants])
        self.grid.wire(page, [*common, self.fixed, *axes])
        self.model.input(self.choose_model, [self.model], [self.label, self.entrants, self.samplers, *axes], **PRIVATE)
        self.suggest.click(self.suggest_entrants, [self.model], [self.entrants], **PRIVATE)
        for name, values in ((self.across, self.across_values), (self.down, self.down_values)):
            name.input(self.suggest_values, [self.model, name], [values], **PRIVATE)

    @friendly
    def choose_model(self, model: str) -> list[Any]:
        """Fit the form to a model, loading it."""
        pipeline = self.studio.models.get(model)
        names = cells.axis_names(pipeline)
        across = "guidance_scale" if "guidance_scale" in names else names[-1]
        return [
            gr.Dropdown(choices=_class_choices(pipeline), value=0 if pipeline.null_class else NO_CLASS),
            "\n".join(race.suggest(pipeline)),
            _samplers(pipeline),
            gr.Dropdown(choices=names, value=across),
            cells.suggest_values(pipeline, across),
            gr.Dropdown(choices=[cells.NONE, *names], value="seed"),
            cells.suggest_values(pipeline, "seed"),
        ]

    @friendly
    def suggest_entrants(self, model: str) -> str:
        """Entrants worth a race of this model."""
        return "\n".join(race.suggest(self.studio.models.get(model)))

    @friendly
    def suggest_values(self, model: str, name: str) -> str:
        """Values to begin with, of the setting that was chosen for an axis."""
        return cells.suggest_values(self.studio.models.get(model), name)

    # ---- what to compare

    def base(self, model: Any, label: Any, each: Any, seed: Any) -> Ask:
        """What all runs have in common."""
        number = whole("samples in each run", each, 1, MAX_EACH)
        classes = [] if label in (None, NO_CLASS) else [label]
        return Ask(model=str(model), classes=classes, per_class=number, seed=seed)

    def prepare_race(self, model: Any, label: Any, each: Any, seed: Any, entrants: Any) -> Comparison:
        return race.entrants(self.studio, self.base(model, label, each, seed), str(entrants or ""))

    def prepare_grid(self, model: Any, label: Any, each: Any, seed: Any, fixed: Any, *axes: Any) -> Comparison:
        across, across_values, down, down_values = (str(value or "") for value in axes)
        base = self.base(model, label, each, seed)
        return cells.cells(self.studio, base, str(fixed or ""), (across, across_values), (down, down_values))

    # ---- what is shown

    def draw_race(self, comparison: Comparison, last: bool) -> list[str]:
        difference = differences_html(comparison) if last else ""
        return [entrants_html(comparison), order_html(comparison), difference]

    def draw_grid(self, grid: cells.Grid, last: bool) -> list[str]:
        return [grid_html(grid)]


def _class_choices(pipeline: Any) -> list[tuple[str, int]]:
    return [("no class", NO_CLASS), *((f"{name} ({index})", index) for index, name in enumerate(pipeline.class_names))]


def _samplers(pipeline: Any) -> str:
    settings = ", ".join(pipeline.resolve_settings({}))
    return note_html(f"Samplers: {', '.join(pipeline.samplers)}. Settings: {settings}.")
