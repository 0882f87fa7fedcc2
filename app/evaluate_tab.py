"""The Evaluate tab: quality against one setting, point by point, with what each point costs."""

import asyncio
import base64
import html
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from vgen.app.cells import suggest_values
from vgen.app.charts import Dot, chart, legend
from vgen.app.core import Studio
from vgen.app.evaluating import (
    MAX_NUMBER,
    MAX_POINTS,
    MIN_NUMBER,
    Curve,
    Evaluations,
    best,
    cheapest,
    settings_of,
    to_sweep,
)
from vgen.app.jobs import Job
from vgen.app.judging import FIGURES
from vgen.app.parts import PRIVATE, QUICK, WATCHING, friendly, owner_of, status_html, watch

EMPTY = "Nothing yet: press Evaluate. Every point appears as soon as it is measured."
NOTE = (
    "Not FID: quick figures of small samples, to choose settings by. Distances, precision and recall depend on N: "
    "compare them at equal N only. 'vgen evaluate' computes FID and KID."
)
KIND = "evaluate"
LABELS = [(figure.label, name) for name, figure in FIGURES.items()]


class EvaluateTab:
    """Builds the tab's components and wires them to the studio."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor = studio, visitor
        self.evaluations = Evaluations(studio)
        self.job = gr.State("")
        with gr.Row(equal_height=False, elem_classes="vgen-main"):
            with gr.Column(scale=2, min_width=300):
                self._form()
            with gr.Column(scale=3, min_width=320):
                self._results()

    # ---- layout

    def _form(self) -> None:
        names = self.studio.models.names()
        first = self.studio.models.usual()
        pipeline = self.studio.models.get(first)
        settings = settings_of(pipeline, None)
        self.model = gr.Dropdown(names, value=first, label="Model", elem_id="evaluate-model")
        self.sampler = gr.Dropdown(list(pipeline.samplers), value=pipeline.samplers[0], label="Sampler")
        with gr.Row():
            self.setting = gr.Dropdown(settings, value=settings[0], label="Setting to vary", elem_id="evaluate-setting")
            self.values = gr.Textbox(
                suggest_values(pipeline, settings[0]),
                label="Its values",
                info=f"With commas between; at most {MAX_POINTS}.",
                elem_id="evaluate-values",
            )
        with gr.Row():
            self.number = gr.Slider(
                MIN_NUMBER, MAX_NUMBER, value=100, step=10, label="Images a point (N)", info="Classes take turns."
            )
            self.seed = gr.Number(
                value=0, precision=0, minimum=0, label="Seed", info="Image i has seed + i, at every point."
            )
        self.others = gr.Textbox(
            label="Other settings", lines=2, info="The same at every point.", placeholder="name=value, one a line"
        )
        with gr.Row():
            self.go = gr.Button("Evaluate", variant="primary", elem_id="evaluate-go", min_width=120)
            self.stop = gr.Button(
                "Stop evaluation", variant="stop", interactive=False, elem_id="evaluate-stop", min_width=80
            )
        gr.HTML(figures_html())

    def _results(self) -> None:
        self.status = gr.HTML(status_html("Ready."), elem_id="evaluate-status")
        self.figure = gr.Dropdown(LABELS, value=LABELS[0][1], label="Figure to plot", elem_id="evaluate-figure")
        self.plots = gr.HTML(f'<div class="vgen-empty">{EMPTY}</div>', elem_id="evaluate-plots")
        self.table = gr.HTML("", elem_id="evaluate-table")
        self.protocol = gr.HTML("", elem_id="evaluate-protocol")
        self.files = gr.File(
            label="Points as CSV, with protocol as JSON",
            file_count="multiple",
            visible=False,
            interactive=False,
            elem_id="evaluate-files",
        )

    # ---- wiring

    @property
    def form(self) -> list[Any]:
        return [self.model, self.setting, self.values, self.number, self.seed, self.sampler, self.others]

    @property
    def shown(self) -> list[Any]:
        return [self.status, self.plots, self.table, self.protocol, self.files, self.go, self.stop]

    def wire(self, page: gr.Blocks) -> None:
        who = self.visitor
        starting = [self.job, self.status, self.go, self.stop]
        following = [who, self.job, self.figure]
        begun = self.go.click(self.start, [who, *self.form], starting, **PRIVATE)
        begun.success(self.follow, following, self.shown, **WATCHING)
        self.stop.click(self.end, [who, self.job], [self.status], **QUICK)
        self.figure.input(self.draw, following, [self.plots, self.table], **QUICK)
        self.model.input(self.choose_model, [self.model], [self.sampler, self.setting, self.values], **PRIVATE)
        changed = [self.model, self.sampler, self.setting]
        self.sampler.input(self.choose_sampler, changed, [self.setting, self.values], **PRIVATE)
        self.setting.input(self.choose_setting, changed, [self.values], **PRIVATE)
        found = page.load(self.attach, [who], [self.job], **QUICK)
        found.then(self.follow, following, self.shown, **WATCHING)

    # ---- running

    @friendly
    def start(self, visitor: Any, request: gr.Request, model: Any, *form: Any) -> list[Any]:
        """Queue an evaluation of the form: its job, a first status, and what the buttons become."""
        pipeline = self.studio.models.get(model)
        job = self.evaluations.submit(owner_of(visitor, request), to_sweep(pipeline, *form))
        return [job.id, status_html("Starting…", "waiting"), gr.Button(interactive=False), gr.Button(interactive=True)]

    def attach(self, visitor: Any, request: gr.Request) -> Any:
        """The visitor's last evaluation, for a page that was loaded anew."""
        job = self.studio.jobs.latest(owner_of(visitor, request), KIND)
        return gr.skip() if job is None else job.id

    async def follow(self, visitor: Any, job_id: Any, figure: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show an evaluation as it goes on, until it ends."""
        job = self.studio.jobs.get(owner_of(visitor, request), job_id)
        if job is None:
            yield [gr.skip()] * len(self.shown)
            return
        points = -1
        async for last in watch(job):
            fresh = last or len(job.view.points) != points
            points = len(job.view.points)
            yield await asyncio.to_thread(self.view, job, figure, last, fresh)

    def view(self, job: Job, figure: Any, last: bool, fresh: bool = True) -> list[Any]:
        """What the page shows of a job now; plots and table where there is something new in them."""
        curve: Curve = job.view
        text, kind = describe(self.studio, job, curve)
        drawn = [*results_html(curve, figure), protocol_html(curve)] if fresh else [gr.skip()] * 3
        files = gr.File([str(path) for path in curve.files], visible=True) if last and curve.files else gr.skip()
        buttons = [gr.Button(interactive=last), gr.Button(interactive=not last)]
        return [status_html(text, kind), *drawn, files, *buttons]

    def end(self, visitor: Any, job_id: Any, request: gr.Request) -> Any:
        """Stop the evaluation, also one that waits."""
        stopped = self.studio.jobs.stop(owner_of(visitor, request), job_id)
        return status_html("Stopping…", "stopped") if stopped else gr.skip()

    def draw(self, visitor: Any, job_id: Any, figure: Any, request: gr.Request) -> list[Any]:
        """Plots and table of another figure."""
        job = self.studio.jobs.get(owner_of(visitor, request), job_id)
        return [gr.skip()] * 2 if job is None else results_html(job.view, figure)

    # ---- the form

    @friendly
    def choose_model(self, model: Any) -> list[Any]:
        """Fit the form to a model, loading it."""
        pipeline = self.studio.models.get(model)
        settings = settings_of(pipeline, None)
        sampler = gr.Dropdown(choices=list(pipeline.samplers), value=pipeline.samplers[0])
        chosen = gr.Dropdown(choices=settings, value=settings[0])
        return [sampler, chosen, suggest_values(pipeline, settings[0])]

    @friendly
    def choose_sampler(self, model: Any, sampler: Any, setting: Any) -> list[Any]:
        """The settings that a sampler reads."""
        pipeline = self.studio.models.get(model)
        settings = settings_of(pipeline, sampler)
        if setting in settings:
            return [gr.Dropdown(choices=settings), gr.skip()]
        return [gr.Dropdown(choices=settings, value=settings[0]), suggest_values(pipeline, settings[0])]

    @friendly
    def choose_setting(self, model: Any, sampler: Any, setting: Any) -> Any:
        """Values to begin with."""
        return suggest_values(self.studio.models.get(model), str(setting))


# ---- what is shown


def describe(studio: Studio, job: Job, curve: Curve) -> tuple[str, str]:
    """How far an evaluation is, and its kind for the style sheet."""
    of, made = len(curve.requests), len(curve.points)
    if job.state == "queued":
        return f"Waiting: {studio.jobs.position(job)} before this one. Stop works here too.", "waiting"
    if job.state == "failed":
        return f"Not done: {job.error} {made} of {of} points stay.", "failed"
    if job.state == "stopped":
        return f"Stopped after {made} of {of} points, which stay.", "stopped"
    if job.state == "done":
        return f"Done: {of} points of {curve.sweep.number} images in {job.seconds or 0:.0f} s.", "done"
    if curve.phase:
        return f"{curve.phase}.", "running"
    place = min(made, of - 1)
    value = f"{curve.sweep.setting} = {curve.sweep.values[place]}"
    return f"Point {place + 1} of {of}, {value}: {curve.done} of {curve.sweep.number} images.", "running"


def results_html(curve: Curve, figure: Any) -> list[str]:
    """Plots and table; `figure` may be anything, and is replaced where this curve does not have it."""
    names = curve.figures
    if not names:
        return [f'<div class="vgen-empty">{EMPTY}</div>', ""]
    chosen = figure if figure in names else names[0]
    said = "" if figure in names or figure not in FIGURES else f"{FIGURES[figure].label} cannot be had here. "
    return [plots_html(curve, chosen, said), table_html(curve, chosen)]


def plots_html(curve: Curve, figure: str, said: str = "") -> str:
    """The figure against the setting, and against seconds."""
    points = [point for point in curve.points if point.figures.get(figure) == point.figures.get(figure, "")]
    top, cheap = best(curve.points, figure), cheapest(curve.points, figure)
    words = [str(point.value) for point in points]
    numeric = all(isinstance(p.value, (int, float)) and not isinstance(p.value, bool) for p in points)
    kind, real = FIGURES[figure], curve.of_reference.get(figure)
    dots, costs = [], []
    for index, point in enumerate(points):
        marks = tuple(mark for mark, marked in (("best", top), ("cheapest", cheap)) if marked is point)
        x = float(point.value) if numeric else float(index)
        dots.append(Dot(x, point.figures[figure], words[index], marks))
        costs.append(Dot(1000 * point.seconds, point.figures[figure], words[index], marks))
    if not dots:
        return f'<div class="vgen-empty">{html.escape(kind.label)} needs more images of each class.</div>'
    if numeric:
        dots.sort(key=lambda dot: dot.x)
    level = None if real is None else (real, "real images")
    axis = curve.sweep.setting.replace("_", " ")
    first = chart(
        dots, axis, kind.label, names=None if numeric else words, level=level, per_cent=kind.share, line=numeric
    )
    second = chart(costs, "milliseconds per image", kind.label, line=False, zero=True, level=level, per_cent=kind.share)
    better = f"{kind.better} is better" if kind.better else "neither more nor less is better: real images are the aim"
    told = html.escape(f"{said}{kind.label}: {kind.what}; {better}.")
    marked = legend() if kind.better else ""
    return f'<p class="vgen-note">{told}</p><div class="vgen-charts">{first}{second}</div>{marked}'


def table_html(curve: Curve, figure: str) -> str:
    """Every point with all its figures and costs, the best ones by the chosen figure marked in words."""
    names = curve.figures
    top, cheap = best(curve.points, figure), cheapest(curve.points, figure)
    heads = [curve.sweep.setting.replace("_", " "), *(FIGURES[name].label for name in names)]
    heads += ["ms per image", "Evaluations per image", "First samples"]
    lines = []
    for point in curve.points:
        marks = [word for word, marked in (("best", top), ("cheapest within 5%", cheap)) if marked is point]
        cells = [_error(point.figures.get(name), name, curve.sweep.number) for name in names]
        cells += [f"{1000 * point.seconds:.1f}", f"{point.evaluations:g}"]
        value = html.escape(str(point.value))
        mark = "".join(f'<br><span class="vgen-badge">{word}</span>' for word in marks)
        picture = base64.b64encode(point.picture).decode()
        alternative = html.escape(f"samples at {curve.sweep.setting} = {point.value}", quote=True)
        image = f'<img class="vgen-strip" alt="{alternative}" src="data:image/png;base64,{picture}">'
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{value}{mark}</th>{row}<td>{image}</td></tr>')
    if curve.of_reference:
        cells = [
            FIGURES[name].text(curve.of_reference.get(name)) if name in curve.of_reference else "" for name in names
        ]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in [*cells, "", "", ""])
        lines.append(f'<tr><th scope="row">real images</th>{row}</tr>')
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    return (
        f'<div class="vgen-wide"><table class="vgen-table vgen-points"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _error(value: float | None, name: str, number: int) -> str:
    """A figure as text; shares of independent images with their standard error, which is not 0 where none is wrong."""
    text = FIGURES[name].text(value)
    if name != "class_accuracy" or value is None:
        return text
    share = (value * number + 1) / (number + 2)
    return f"{text} ± {100 * (share * (1 - share) / (number + 2)) ** 0.5:.1f}"


def protocol_html(curve: Curve) -> str:
    """N, the reference and everything else that decides the figures; and what is missing."""
    told = curve.protocol
    if not told:
        return ""
    judge, reference = told["judge"], told["reference"]
    real = (
        "none"
        if reference is None
        else (f"{reference['name']}, N = {reference['n']}, sha256 {reference['sha256'][:12]}")
    )
    classes = f", {told['classes']} classes in turn" if told["classes"] else ", no classes"
    lines = {
        "Samples": f"N = {told['n']} a point{classes}, seeds {told['seeds'][0]} to {told['seeds'][1]}",
        "Reference": real,
        "Judge": f"{judge['name']}, sha256 {judge['sha256'][:12]}",
        "Model": f"{told['model']}, sha256 {told['checkpoint'][:12]}",
        "Sampler": f"{told['sampler'] or 'varied'}; "
        + ", ".join(f"{name}={value}" for name, value in told["settings"].items() if value is not None),
        "Machine": f"{told['device']}, {told['dtype']}, vgen {told['vgen']}",
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(str(text))}</dd>" for name, text in lines.items())
    missing = f'<p class="vgen-note" role="note">{html.escape(curve.missing)}</p>' if curve.missing else ""
    return f'{missing}<dl class="vgen-facts">{items}</dl><p class="vgen-note">{html.escape(NOTE)}</p>'


def figures_html() -> str:
    """What each figure is, folded."""
    items = "".join(f"<dt>{html.escape(f.label)}</dt><dd>{html.escape(f.what)}</dd>" for f in FIGURES.values())
    return f'<details class="vgen-details"><summary>What the figures are</summary><dl>{items}</dl></details>'
