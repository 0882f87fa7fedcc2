"""In-painting, out-painting and a change of class, on a picture of the visitor's own or one that is handed in."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from vgen.app.core import Studio, titles
from vgen.app.editing import (
    MAX_VERSIONS,
    Marks,
    Repaint,
    count_tokens,
    grid_side,
    mask_of,
    names_of,
    snap,
    submit_edit,
)
from vgen.app.forms import parse_settings, setting_names, whole
from vgen.app.generate import RANDOM_SEEDS
from vgen.app.parts import ORDERED, PRIVATE, QUICK, WATCHING, friendly, note, owner_of, run_of, status_html
from vgen.app.pictures import EDITOR, FITS, Canvas, Placement, enlarge, place, read_paint, read_working, zoom_of
from vgen.app.run_panel import RunPanel
from vgen.app.token_marks import MARKS_JS, marks_html
from vgen.media import png_bytes
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import SettingError

UPLOAD = "upload"
LISTED = 60  # pictures of the library that are offered
BRUSH = "rgb(255, 64, 160)"
EMPTY = "Choose a picture, mark what is to change, then press Repaint."
NO_PICTURE = "Choose a picture first: its tokens appear here."
HINT = (
    "Click a token, or move with the arrow keys and press Space, to draw it anew or keep it; a click wins over paint."
)
FIT_NAMES = {"crop": "Fill the canvas", "pad": "Whole, with space around", "stretch": "Stretch to a square"}


class RepaintPanel:
    """Components, and what they do."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor, self.current = studio, visitor, current
        self.job = gr.BrowserState(None, storage_key="vgen-edit", secret=current.secret)
        self.marks = gr.State(Marks())
        names = studio.models.names()
        first = studio.models.usual()
        with gr.Row(equal_height=False, elem_classes="vgen-main"):
            with gr.Column(scale=1, min_width=300):
                self._pick(names, first)
                self._form(first)
            with gr.Column(scale=1, min_width=320):
                self._canvas(first)
            with gr.Column(scale=1, min_width=300):
                self.panel = RunPanel(studio, "edit", EMPTY)

    # ---- layout

    def _pick(self, names: Sequence[str], first: str) -> None:
        self.source = gr.Dropdown([], label="Picture", info="The last run's and your library's.", elem_id="edit-source")
        self.upload = gr.File(
            label="Or hand one in (PNG, JPEG, WebP, BMP, GIF)",
            type="filepath",
            file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"],
            height=160,
            elem_id="edit-upload",
        )
        self.model = gr.Dropdown(list(names), value=first, label="Model that paints", elem_id="edit-model")
        with gr.Accordion("Place it: out-painting", open=False, elem_id="edit-place"):
            note("What lies outside the picture is painted by the model.")
            self.fit = gr.Radio([(FIT_NAMES[name], name) for name in FITS], value="crop", label="Fit")
            self.percent = gr.Slider(10, 200, value=100, step=5, label="Size on the canvas, %")
            with gr.Row():
                self.right = gr.Number(value=0, precision=0, label="Move right, pixels", min_width=90)
                self.down = gr.Number(value=0, precision=0, label="Move down, pixels", min_width=90)

    def _form(self, first: str) -> None:
        pipeline = self.studio.models.get(first)
        own = setting_names(pipeline, None)
        self.label = gr.Dropdown(
            names_of(pipeline), value=-1, label="Class to paint", info="Another one changes it.", elem_id="edit-class"
        )
        with gr.Row():
            self.versions = gr.Slider(1, MAX_VERSIONS, value=4, step=1, label="Versions", elem_id="edit-versions")
            self.seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="edit-seed", min_width=90)
        self.randomly = gr.Checkbox(value=True, label="New random seed for every run")
        with gr.Accordion("Sampler and guidance", open=False):
            self.sampler = gr.Dropdown(list(pipeline.samplers), value=pipeline.samplers[0], label="Sampler")
            self.guidance = gr.Slider(
                0, 20, value=own.get("guidance_scale", 1), step=0.1, label="Guidance scale", info="1 is off."
            )
            self.others = gr.Textbox(label="Other settings", lines=2, placeholder="name=value, one a line")
        with gr.Row():
            self.go = gr.Button("Repaint", variant="primary", elem_id="edit-go", min_width=110)
            self.stop = gr.Button("Stop", variant="stop", elem_id="edit-stop", min_width=80)

    def _canvas(self, first: str) -> None:
        size = _canvas_size(self.studio.models.get(first))
        self.editor = gr.ImageEditor(
            label="Paint over what is to change",
            type="numpy",
            image_mode="RGBA",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=size // 10, colors=[BRUSH], default_color=BRUSH, color_mode="fixed"),
            eraser=gr.Eraser(default_size=size // 10),
            canvas_size=(size, size),
            fixed_canvas=True,
            buttons=[],
            height=EDITOR + 32,
            elem_id="edit-canvas",
            visible=False,  # until there is a picture: its script is a third of the page's
        )
        self.grid = gr.HTML(marks_html(None, None, "", NO_PICTURE), js_on_load=MARKS_JS, elem_id="edit-tokens")
        with gr.Row():
            self.all = gr.Button("Mark all tokens", size="sm", min_width=100)
            self.none = gr.Button("Clear clicks", size="sm", min_width=100)

    # ---- wiring

    def wire(self, page: gr.Blocks) -> None:
        who = [self.visitor, self.current]
        place_of = [*who, self.model, self.source, self.upload, self.fit, self.percent, self.right, self.down]
        opened = [self.editor, self.grid, self.marks, self.panel.status]
        chosen = self.source.input(self.choose, [*who, self.source], [self.model, *self.fields], **PRIVATE)
        chosen.success(self.open, place_of, opened, **QUICK)
        handed = self.upload.upload(lambda: UPLOAD, None, [self.source], **QUICK)
        handed.success(self.open, place_of, opened, **QUICK)
        fitted = self.model.input(self.choose_model, [self.model], self.fields, **PRIVATE)
        fitted.success(self.open, place_of, opened, **QUICK)
        places = [control.change for control in (self.fit, self.percent, self.right, self.down)]
        gr.on(places, self.open, place_of, opened, **QUICK, trigger_mode="always_last")
        painting = [*place_of, self.editor, self.marks]
        self.editor.change(self.draw, painting, [self.grid], **QUICK, trigger_mode="always_last")
        self.grid.click(self.click, painting, [self.grid, self.marks], **ORDERED)
        self.all.click(self.mark_all, painting, [self.grid, self.marks], **QUICK)
        self.none.click(self.clear, painting, [self.grid, self.marks], **QUICK)
        form = [self.label, self.seed, self.randomly, self.versions, self.sampler, self.guidance, self.others]
        begun = self.go.click(self.start, [*painting, *form], [self.job, self.seed, self.panel.status], **QUICK)
        follow = ([self.visitor, self.job], self.panel.shown)
        begun.success(self.panel.follow, *follow, **WATCHING)
        page.load(self.panel.follow, *follow, **WATCHING)
        self.stop.click(self.panel.stop, [self.visitor, self.job], [self.panel.status], **QUICK)
        self.panel.wire(self.visitor, self.job)

    @property
    def fields(self) -> list[Any]:
        """What depends on the model."""
        return [self.label, self.sampler, self.guidance]

    # ---- which picture

    def list_sources(self, visitor: Any, current: Any, request: gr.Request) -> Any:
        """The pictures that may be edited."""
        return gr.Dropdown(choices=self._sources(owner_of(visitor, request), current))

    def _sources(self, owner: str, current: Any) -> list[tuple[str, str]]:
        found = []
        run = run_of(self.studio.jobs.get(owner, current))
        recording = run.recording if run is not None else None
        if recording is not None and len(recording) and not recording.pipeline.makes_videos:
            named = titles(recording.pipeline, recording.request)
            found = [(f"Last run, image {i + 1}: {words}", f"run:{i}") for i, words in enumerate(named)]
        for entry in self.studio.library.search(owner, limit=LISTED):
            if entry.kind == "image":
                found.append((f"Library: {entry.path.stem}, {entry.request.model}", f"file:{entry.id}"))
        return [*found, ("The picture handed in", UPLOAD)]

    @friendly
    def choose(self, visitor: Any, current: Any, source: Any, request: gr.Request) -> list[Any]:
        """The model and class that a picture of one's own was made with, where that model can edit."""
        owner = owner_of(visitor, request)
        kind, _, number = str(source).partition(":")
        run = run_of(self.studio.jobs.get(owner, current))
        row, made = 0, None
        if kind == "run" and run is not None:
            row, made = int(number) if number.isdigit() else 0, run.request
        elif kind == "file" and number.isdigit():
            entry = self.studio.library.get(owner, int(number))
            made = None if entry is None else entry.request
        if made is None or made.model not in self.studio.models.names():
            return [gr.skip()] * 4
        label = None if made.class_labels is None else made.class_labels[min(row, len(made.class_labels) - 1)]
        return [made.model, *self._model_fields(made.model, label, made.sampler)]

    @friendly
    def choose_model(self, model: str) -> list[Any]:
        """Fit the form to a model, loading it."""
        return self._model_fields(model)

    def _model_fields(self, model: str, label: int | None = None, sampler: str | None = None) -> list[Any]:
        pipeline = self.studio.models.get(model)
        grid_side(pipeline)
        own = setting_names(pipeline, sampler)
        return [
            gr.Dropdown(choices=names_of(pipeline), value=-1 if label is None else label),
            gr.Dropdown(choices=list(pipeline.samplers), value=pipeline.resolve_sampler(sampler)),
            gr.Slider(value=own.get("guidance_scale", 1), visible="guidance_scale" in own),
        ]

    def picture(self, owner: str, current: Any, source: Any, upload: Any) -> Image.Image:
        """A source by its name. Raises SettingError for what is not there, or not this owner's."""
        kind, _, number = str(source or "").partition(":")
        if kind == UPLOAD and isinstance(upload, str) and upload:
            return read_working(Path(upload))
        if kind == "run":
            run = run_of(self.studio.jobs.get(owner, current))
            recording = run.recording if run is not None else None
            if recording is not None and len(recording) and number.isdigit() and int(number) < recording.rows:
                return Image.fromarray(np.asarray(recording.pixels(-1)[int(number)].permute(1, 2, 0).contiguous()))
        if kind == "file" and number.isdigit():
            entry = self.studio.library.get(owner, int(number[:18]))
            if entry is not None and entry.kind == "image":
                return read_working(entry.path)
        raise SettingError("there is no such picture: choose one, or hand one in")

    def canvas(self, owner: str, current: Any, model: str, source: Any, upload: Any, *placing: Any) -> Canvas:
        """The chosen picture as the chosen model takes it. Raises SettingError."""
        pipeline = self.studio.models.get(model)
        grid_side(pipeline)
        fit, percent, right, down = placing
        if fit not in FITS:
            raise SettingError(f"fit is {str(fit)[:40]!r}: use one of {', '.join(FITS)}")
        size = pipeline.tokenizer.image_size
        placement = Placement(
            fit=fit,
            percent=whole("size on the canvas", percent, 10, 200),
            right=whole("move right", right or 0, -size, size),
            down=whole("move down", down or 0, -size, size),
        )
        return place(self.picture(owner, current, source, upload), size, placement)

    # ---- marking

    @friendly
    def open(self, visitor: Any, request: gr.Request, current: Any, *chosen: Any) -> list[Any]:
        """Put the chosen picture on the editor and under the tokens, with nothing marked."""
        if chosen[1] is None:
            return [gr.skip()] * 4
        canvas = self.canvas(owner_of(visitor, request), current, *chosen)
        picture = enlarge(canvas.pixels)
        value: Any = {"background": picture, "layers": [], "composite": picture}
        drawn = self.drawn(chosen[0], canvas, canvas.outside, Marks())
        return [gr.ImageEditor(value, canvas_size=picture.size, visible=True), drawn, Marks(), status_html("Ready.")]

    def drawn(self, model: str, canvas: Canvas, painted: Tensor, marks: Marks) -> str:
        """The tokens over the canvas, and how many of them an edit would draw."""
        pipeline = self.studio.models.get(model)
        mask = mask_of(pipeline, painted, marks)
        marked = snap(pipeline, painted, marks)
        caption = count_tokens(pipeline, mask) if bool(mask.any()) else "Nothing is marked yet"
        notes = [HINT]
        if bool(marked.all()) and isinstance(pipeline, NextScalePipeline):
            notes.append("The first scale is always kept: it carries the mean colours over.")
        return marks_html(png_bytes(enlarge(canvas.pixels)), marked, f"{caption}.", NO_PICTURE, notes)

    def marked(self, owner: str, current: Any, chosen: Sequence[Any], paint: Any) -> tuple[Canvas, Tensor]:
        """The canvas, and what of it is painted over or empty, (S, S) bool."""
        canvas = self.canvas(owner, current, *chosen)
        return canvas, canvas.outside | read_paint(paint, len(canvas.outside))

    @friendly
    def draw(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> Any:
        """The tokens anew, after a stroke."""
        *chosen, paint, marks = values
        if chosen[1] is None:
            return gr.skip()
        return self._redrawn(owner_of(visitor, request), current, chosen, paint, marks)[0]

    def _redrawn(self, owner: str, current: Any, chosen: Sequence[Any], paint: Any, marks: Marks) -> list[Any]:
        canvas, painted = self.marked(owner, current, chosen, paint)
        return [self.drawn(chosen[0], canvas, painted, marks), marks]

    @friendly
    def click(self, visitor: Any, request: gr.Request, event: gr.EventData, current: Any, *values: Any) -> list[Any]:
        """Mark a token that is kept, or keep one that is marked."""
        *chosen, paint, marks = values
        pipeline = self.studio.models.get(chosen[0])
        number = whole("token", getattr(event, "token", None), 0, grid_side(pipeline) ** 2 - 1)
        canvas, painted = self.marked(owner_of(visitor, request), current, chosen, paint)
        marks = marks.toggle(number, bool(snap(pipeline, painted, marks).flatten()[number]))
        return [self.drawn(chosen[0], canvas, painted, marks), marks]

    @friendly
    def mark_all(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> list[Any]:
        """Every token drawn anew."""
        *chosen, paint, _ = values
        number = grid_side(self.studio.models.get(chosen[0])) ** 2
        everything = Marks(frozenset(range(number)))
        return self._redrawn(owner_of(visitor, request), current, chosen, paint, everything)

    @friendly
    def clear(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> list[Any]:
        """Forget clicks; what is painted stays."""
        *chosen, paint, _ = values
        if chosen[1] is None:
            return [gr.skip(), Marks()]
        return self._redrawn(owner_of(visitor, request), current, chosen, paint, Marks())

    # ---- running

    @friendly
    def start(self, visitor: Any, request: gr.Request, current: Any, *values: Any) -> list[Any]:
        """Queue the edit; its job, the seed that is used, and a line."""
        owner = owner_of(visitor, request)
        (*chosen, paint, marks), form = values[:-7], values[-7:]
        label, seed, randomly, versions, sampler, guidance, others = form
        pipeline = self.studio.models.get(chosen[0])
        canvas, painted = self.marked(owner, current, chosen, paint)
        seed = random.randrange(RANDOM_SEEDS) if randomly else seed
        settings = parse_settings(str(others or ""))
        if "guidance_scale" in settings:
            raise SettingError("guidance_scale has a control of its own: set it there")
        if guidance is not None and "guidance_scale" in setting_names(pipeline, sampler):
            settings["guidance_scale"] = guidance
        edit = Repaint(
            model=chosen[0],
            canvas=canvas,
            mask=mask_of(pipeline, painted, marks),
            label=_label(pipeline, label),
            seed=seed,
            versions=versions,
            sampler=sampler,
            settings=settings,
        )
        job = submit_edit(self.studio, owner, edit)
        return [job.id, seed, status_html("Starting…", "waiting")]


def _label(pipeline: Any, value: Any) -> int | None:
    """The form's class, -1 being none. Raises SettingError."""
    number = whole("class", value, -1, max(-1, pipeline.null_class - 1))
    return None if number < 0 else number


def _canvas_size(pipeline: Any) -> int:
    """Pixels a side of the editor."""
    size = EDITOR if pipeline.makes_videos or pipeline.tokenizer is None else pipeline.tokenizer.image_size
    return size * zoom_of(size)
