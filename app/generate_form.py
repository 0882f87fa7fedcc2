"""The form of the Generate tab: what is to be made, fitted to the model, and filled in from a request."""

import base64
import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from vgen import __version__
from vgen.app.core import Studio
from vgen.app.forms import (
    MAX_FRAMES,
    MAX_IMAGES,
    MAX_STEPS,
    NAMED,
    VIDEO_NAMED,
    Ask,
    other_settings,
    parse_settings,
    setting_names,
    whole,
)
from vgen.app.guidance_curve import curve_properties, curve_surroundings, guidance_curve
from vgen.app.parts import PRIVATE, QUICK, friendly, short, status_html, step_html
from vgen.media import read_request
from vgen.pipelines.base import EDIT
from vgen.types import Request, SettingError
from vgen.videos import read_video

MAX_CONTEXT = 64  # frames of a clip that is handed in
NOT_IN_FORM = {  # what a request may have and the form has no place for, and what to say of it
    "context": "It went on from a clip that is not part of it: hand that in again.",
    "actions": "",
    "tokens": "It is a branch or had tokens locked, which this form leaves out: 'vgen sample --from' repeats it.",
    "known": "",
    EDIT: "It is an edit of an image that is not part of it: open the image in the Edit tab and paint again.",
}
PICKER_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-class]');
  if (button) trigger('click', {index: Number(button.dataset.class)});
});
"""


class GenerateForm:
    """The components that say what is to be made. The tab adds what shows it."""

    studio: Studio

    # ---- layout

    def _form(self, names: list[str], first: str) -> None:
        pipeline = self.studio.models.get(first)
        own = setting_names(pipeline, None)
        self.model = gr.Dropdown(names, value=first, label="Model", elem_id="model")
        self.classes = gr.Dropdown(
            _choices(pipeline),
            value=[0] if pipeline.null_class else [],
            multiselect=True,
            label="Classes",
            info="Type to search; none is unconditional.",
            elem_id="classes",
        )
        self.thumbnails = gr.HTML("", js_on_load=PICKER_JS, elem_id="thumbnails", visible=False)
        with gr.Row():
            self.per_class = gr.Slider(1, 16, value=4, step=1, label="Images per class", elem_id="per-class")
            self.seed = gr.Number(
                value=0, precision=0, minimum=0, label="Seed", info="Image i has seed + i.", elem_id="seed"
            )
        self.randomly = gr.Checkbox(value=True, label="New random seed for every run", elem_id="random-seed")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="go", min_width=120)
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, min_width=80)
            self.again = gr.Button("Stop and re-roll", elem_id="reroll", min_width=120)
        self.cost = gr.HTML("", elem_id="cost")
        with gr.Accordion("Sampler and guidance", open=False, elem_id="advanced"):
            self._advanced(pipeline, own)
        with gr.Accordion("Video", open=True, visible=pipeline.makes_videos) as self.video_part:
            self.frames = gr.Number(
                value=own.get("frames"), precision=0, minimum=1, maximum=MAX_FRAMES, label="Frames, with those given"
            )
            self.context_frames = gr.Number(
                value=own.get("context_frames"), precision=0, minimum=0, label="Frames of the clip to go on from"
            )
            self.clip = gr.File(
                label="Clip to go on from (mp4, gif, webm)", type="filepath", file_types=["video", ".gif"]
            )
        with gr.Accordion("Repeat a picture", open=False) as self.repeat_part:
            self.dropped = gr.File(
                label="Drop a file made by vgen to fill in this form",
                type="filepath",
                file_types=[".png", ".mp4", ".gif", ".npz"],
                elem_id="restore",
            )
            self.restored = gr.HTML(elem_id="restored")

    def _advanced(self, pipeline: Any, own: dict[str, Any]) -> None:
        self.sampler = gr.Dropdown(
            list(pipeline.samplers), value=pipeline.samplers[0], label="Sampler", elem_id="sampler"
        )
        self.guidance_scale = gr.Slider(
            0, 20, value=own.get("guidance_scale", 1), step=0.1, label="Guidance scale", info="1 is off."
        )
        self.guidance_schedule = guidance_curve(pipeline, own)
        self.temperature = gr.Slider(
            0,
            4,
            value=own.get("temperature", 1),
            step=0.05,
            label="Temperature",
            info="1 is as trained, 0 the likeliest.",
        )
        self.top_k = gr.Number(
            value=own.get("top_k", 0), precision=0, minimum=0, label="Top-k", info="Codes kept; 0 is off."
        )
        self.top_p = gr.Slider(
            0, 1, value=own.get("top_p", 1), step=0.01, label="Top-p", info="Probability kept; 1 is off."
        )
        self.steps = gr.Number(
            value=own.get("steps"),
            precision=0,
            minimum=1,
            maximum=MAX_STEPS,
            label="Steps",
            info="Evaluations per image; empty is the sampler's own.",
            visible="steps" in own,
        )
        self.others = gr.Textbox(
            label="Other settings",
            lines=2,
            info=_others_info(own),
            placeholder="name=value, one a line",
            elem_id="others",
        )
        self.reset = gr.Button("Reset to the model's own", size="sm")

    @property
    def form(self) -> list[Any]:
        """What `ask` reads, in its order."""
        return [self.model, self.classes, self.per_class, self.seed, self.sampler, *self.settings, self.clip]

    @property
    def settings(self) -> list[Any]:
        """What depends on model and sampler."""
        return [
            self.guidance_scale,
            self.guidance_schedule,
            self.temperature,
            self.top_k,
            self.top_p,
            self.steps,
            self.others,
            self.frames,
            self.context_frames,
        ]

    @property
    def costing(self) -> list[Any]:
        """What the time that a run takes depends on."""
        return [self.model, self.classes, self.per_class, self.sampler, self.steps]

    @property
    def filling(self) -> list[Any]:
        """What `fill` gives new values to."""
        chosen = [self.model, self.classes, self.per_class, self.seed, self.randomly, self.sampler]
        return [self.restored, *chosen, *self.settings]

    def wire_form(self, page: gr.Blocks) -> None:
        """What happens inside the form."""
        changed = self.model.input(
            self.choose_model,
            [self.model],
            [self.classes, self.thumbnails, self.sampler, self.video_part, *self.settings],
            **PRIVATE,
        )
        changed.then(self.draw_thumbnails, [self.model], [self.thumbnails], **PRIVATE)
        self.sampler.input(self.choose_sampler, [self.model, self.sampler], self.settings, **PRIVATE)
        self.reset.click(self.choose_sampler, [self.model, self.sampler], self.settings, **PRIVATE)
        self.guidance_scale.change(
            self._around_curve,
            [self.model, self.guidance_scale],
            [self.guidance_schedule],
            **QUICK,
            trigger_mode="always_last",
        )
        costs = [control.input for control in (self.classes, self.per_class, self.steps)]
        gr.on(costs, friendly(self.tell_cost), self.costing, [self.cost], **QUICK, trigger_mode="always_last")
        self.thumbnails.click(friendly(self.add_class), [self.model, self.classes], [self.classes], **QUICK)
        self.dropped.upload(self.restore, [self.dropped], self.filling, **PRIVATE)
        page.load(self.draw_thumbnails, [self.model], [self.thumbnails], **PRIVATE)
        page.load(self.restore_link, [self.model], self.filling, **PRIVATE)

    # ---- what it says

    def tell_cost(self, model: str, classes: list[int] | None, per_class: Any, sampler: str, steps: Any) -> str:
        """What the run will take, once one of its kind has been measured here."""
        number = whole("images per class", per_class, 1, MAX_IMAGES) * max(1, len(classes or []))
        found = self.studio.estimate(model, sampler, number, int(steps) if steps else None)
        if found is None:
            return ""
        what = "image" if number == 1 else "images"
        text = f"About {short(found[0])} for {number} {what} of {found[1]} evaluations, as the last run went."
        return step_html(text)

    def ask(self, *form: Any) -> tuple[Ask, np.ndarray | None]:
        """The form's values as an Ask, and the clip that is handed in."""
        model, classes, per_class, seed, sampler, *values, others, frames, context_frames, clip = form
        pipeline = self.studio.models.get(model)
        own = setting_names(pipeline, sampler)
        given = dict(zip(NAMED, values, strict=True))
        if pipeline.makes_videos:
            given |= {"frames": frames, "context_frames": context_frames}
        settings = {
            name: _typed(value, own[name]) for name, value in given.items() if name in own and value is not None
        }
        for name, value in parse_settings(others or "").items():
            if name in settings and name in (*NAMED, *VIDEO_NAMED):
                raise SettingError(f"{name} has a control of its own: set it there")
            settings[name] = value
        video = None
        if pipeline.makes_videos and clip:
            most = int(context_frames) if context_frames else MAX_CONTEXT
            video = read_video(Path(clip), min(most, MAX_CONTEXT), pipeline.tokenizer.image_size)[0]
        chosen = list(classes or [])
        return Ask(
            model=model, classes=chosen, per_class=per_class, seed=seed, sampler=sampler, settings=settings
        ), video

    # ---- the form

    @friendly
    def choose_model(self, model: str) -> list[Any]:
        """Fit the form to a model, loading it."""
        pipeline = self.studio.models.get(model)
        choices = _choices(pipeline)
        return [
            gr.Dropdown(choices=choices, value=[0] if choices else [], visible=bool(choices)),
            gr.HTML(visible=False),
            gr.Dropdown(choices=list(pipeline.samplers), value=pipeline.samplers[0]),
            gr.Accordion(visible=pipeline.makes_videos),
            *self._defaults(pipeline, pipeline.samplers[0]),
        ]

    @friendly
    def choose_sampler(self, model: str, sampler: str) -> list[Any]:
        """Settings back to what the model takes with this sampler."""
        return self._defaults(self.studio.models.get(model), sampler)

    def _defaults(self, pipeline: Any, sampler: str, request: Request | None = None) -> list[Any]:
        own = setting_names(pipeline, sampler)
        values = own | ({} if request is None else {key: request.settings.get(key, own[key]) for key in own})

        def control(kind: Any, name: str, **more: Any) -> Any:
            return kind(value=values.get(name), visible=name in own, **more)

        others = "" if request is None else other_settings(pipeline, request)
        return [
            control(gr.Slider, "guidance_scale"),
            gr.HTML(**curve_properties(pipeline, {name: values[name] for name in own})),
            control(gr.Slider, "temperature"),
            control(gr.Number, "top_k"),
            control(gr.Slider, "top_p"),
            control(gr.Number, "steps"),
            gr.Textbox(value=others, info=_others_info(own)),
            gr.Number(value=values.get("frames")),
            gr.Number(value=values.get("context_frames")),
        ]

    def _around_curve(self, model: str, guidance: float) -> Any:
        """The curve's editor with its value as it is."""
        return gr.HTML(**curve_surroundings(self.studio.models.get(model), guidance))

    @friendly
    def draw_thumbnails(self, model: str) -> Any:
        """A picture of each class, sampled once for each checkpoint."""
        found = self.studio.thumbnails(model)
        return gr.HTML(picker_html(found), visible=bool(found))

    def add_class(self, model: str, classes: list[int] | None, event: gr.EventData) -> list[int]:
        """Add or take away the class whose picture was clicked."""
        chosen = list(classes or [])
        index = whole("class", getattr(event, "index", None), 0, max(0, self.studio.models.get(model).null_class - 1))
        return [item for item in chosen if item != index] if index in chosen else [*chosen, index]

    # ---- restoring

    @friendly
    def restore(self, path: str | None) -> list[Any]:
        """Fill the form from a file's request."""
        return self.fill(read_request(Path(path or "")))

    def restore_link(self, model: str, request: gr.Request) -> list[Any]:
        """Fill the form from a link that somebody shared; a broken one changes nothing."""
        text = dict(request.query_params).get("run") if request is not None else None
        nothing: list[Any] = [gr.skip()] * len(self.filling)
        scale = setting_names(self.studio.models.get(model), None).get("guidance_scale", 1)
        nothing[self.filling.index(self.guidance_schedule)] = self._around_curve(model, scale)
        if not text:
            return nothing
        try:
            return self.fill(Request.from_json(str(text)))
        except ValueError as error:
            return [status_html(f"The link could not be read: {error}", "failed"), *nothing[1:]]

    def fill(self, request: Request) -> list[Any]:
        """The form as a request has it, for `filling`. Raises SettingError for one that this model cannot take."""
        pipeline = self.studio.models.get(request.model)
        sampler = pipeline.resolve_sampler(request.sampler)
        own = setting_names(pipeline, sampler)
        ignored = [name for name in request.settings if name not in own and name not in NOT_IN_FORM]
        ignored = [name for name in ignored if name not in pipeline.resolve_settings({}, sampler)]
        given = {name: value for name, value in request.settings.items() if name in own}
        pipeline.resolve_settings({name: given[name] for name in given if name not in ("context", "actions")}, sampler)
        labels = list(dict.fromkeys(request.class_labels or []))
        pipeline.label_ids(labels)
        per_class = max(1, len(request.seeds) // max(1, len(labels)))
        choices = _choices(pipeline)
        return [
            _restored_html(pipeline, request, ignored),
            gr.Dropdown(value=request.model),
            gr.Dropdown(choices=choices, value=labels, visible=bool(choices)),
            min(per_class, 16),
            request.seeds[0],
            False,
            gr.Dropdown(choices=list(pipeline.samplers), value=sampler),
            *self._defaults(pipeline, sampler, dataclasses.replace(request, sampler=sampler)),
        ]


def _typed(value: Any, default: Any) -> Any:
    """Numbers of the page as the setting has them: a whole one may come as 3.0, a fraction as 3."""
    if isinstance(value, float) and value.is_integer() and (default is None or type(default) is int):
        return int(value)
    return value


def _choices(pipeline: Any) -> list[tuple[str, int]]:
    return [(f"{name} ({index})", index) for index, name in enumerate(pipeline.class_names)]


def _others_info(own: dict[str, Any]) -> str:
    hidden = (*NAMED, *VIDEO_NAMED)
    listed = [f"{name}={json.dumps(value)}" for name, value in own.items() if name not in hidden]
    return f"The sampler also reads, with these defaults: {', '.join(listed)}." if listed else "There are none."


def picker_html(found: Sequence[tuple[bytes, str]]) -> str:
    """Buttons with a picture and the name of each class."""
    buttons = []
    for index, (png, name) in enumerate(found):
        data = base64.b64encode(png).decode()
        buttons.append(
            f'<button type="button" data-class="{index}" title="Add or take away {html.escape(name, quote=True)}">'
            f'<img alt="" src="data:image/png;base64,{data}"><span>{html.escape(name)}</span></button>'
        )
    return f'<div class="vgen-picker" role="group" aria-label="Classes">{"".join(buttons)}</div>'


def _restored_html(pipeline: Any, request: Request, ignored: Sequence[str]) -> str:
    """Whether the same pixels will come out, and what could not be taken over."""
    differs = []
    if request.checkpoint and request.checkpoint != pipeline.checkpoint():
        differs.append("other weights")
    for what, then, now in (
        ("vgen", request.vgen, __version__),
        ("dtype", request.dtype, str(pipeline.dtype).removeprefix("torch.")),
        ("device", request.device, pipeline.device.type),
    ):
        if then and then != now:
            differs.append(f"{what} {then} then, {now} now")
    missing = [words for name, words in NOT_IN_FORM.items() if name in request.settings and words]
    same = "Same model, version, precision and device: the same pixels." if not differs and not missing else ""
    text = same or (f"Pixels may differ: {'; '.join(differs)}." if differs else "")
    if ignored:
        text += f" Left out, unknown here: {', '.join(str(name)[:40] for name in list(ignored)[:8])}."
    text = " ".join([text, *missing]).strip()
    return status_html(text, "done" if same else "waiting")
