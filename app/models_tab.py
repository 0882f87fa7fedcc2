"""The Models tab: what models there are, what is inside them, which are in memory, and bringing more."""

import asyncio
import html
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vgen import conversion, hub
from vgen.app.core import Studio, told
from vgen.app.jobs import Job
from vgen.app.parts import (
    PRIVATE,
    QUICK,
    WATCHING,
    friendly,
    note,
    owner_of,
    status_html,
    tab_named,
    text_to_copy,
    watch,
)
from vgen.app.shelf import HELD
from vgen.app.uploads import (
    MAX_BYTES,
    check_allowed,
    inspect_checkpoint,
    override_names,
    submit_conversion,
)
from vgen.types import SettingError

KIND = "convert"
MAX_CLASSES = 40  # names shown
OFF = "Uploads are off. Start the studio with --allow-upload to look at and convert checkpoints here."
NOWHERE = "Converting needs a folder for models: start the studio with --models FOLDER."


class ModelsTab:
    """Builds the tab's components and wires them to the studio."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor = studio, visitor
        names = studio.models.names()
        self.table = gr.HTML("", elem_id="models-table")
        with gr.Row(elem_classes="vgen-toolbar"):
            self.chosen = gr.Dropdown(names, value=names[0], label="Model to look at", elem_id="models-chosen", scale=3)
            self.load = gr.Button("Load", size="sm", elem_id="models-load", min_width=90, scale=1)
            self.unload = gr.Button("Unload", size="sm", elem_id="models-unload", min_width=90, scale=1)
        self.status = gr.HTML(status_html(""), elem_id="models-status")
        with gr.Row(equal_height=False, elem_classes="vgen-main"):
            with gr.Column(scale=2, min_width=300):
                self.facts = gr.HTML("", elem_id="models-facts")
                self.config = text_to_copy("Configuration", lines=4, most=24)
            with gr.Column(scale=2, min_width=300):
                self.card = gr.HTML("", elem_id="models-card")
        with gr.Accordion("Bring a checkpoint", open=False, elem_id="models-upload"):
            self._upload()

    def _upload(self) -> None:
        allowed = self.studio.allow_upload
        note(_upload_words(self.studio))
        with gr.Column(visible=allowed):
            with gr.Row():
                self.generator = gr.File(label="Checkpoint (safetensors)", type="filepath", elem_id="models-generator")
                self.tokenizer = gr.File(label="Its tokenizer, where there is one", type="filepath")
            self.inspect = gr.Button("Look inside", size="sm", elem_id="models-inspect")
            self.inside = gr.HTML("", elem_id="models-inside")
            families = list(conversion.FAMILIES)
            with gr.Row(visible=self.studio.models.folder is not None):
                self.family = gr.Dropdown(
                    families, value=families[0], label="Family", info=_override_words(families[0])
                )
                self.name = gr.Textbox(label="Name", info="A part of the checkpoint's hash is added.", max_lines=1)
                self.overrides = gr.Textbox(label="What shapes cannot tell", placeholder="name=value, one a line")
            self.convert = gr.Button("Convert", visible=self.studio.models.folder is not None, elem_id="models-convert")
            self.job = gr.State("")
            self.converted = gr.HTML("", elem_id="models-converted")

    # ---- wiring

    def wire(self, page: gr.Blocks) -> None:
        looked = [self.facts, self.config, self.card]
        self.chosen.input(self.look, [self.chosen], looked, **PRIVATE)
        self.load.click(self.take_in, [self.chosen], [self.table, self.status], **PRIVATE)
        self.unload.click(self.let_go, [self.chosen], [self.table, self.status], **PRIVATE)
        self.inspect.click(self.look_inside, [self.generator], [self.inside], **PRIVATE)
        self.family.input(lambda name: gr.Dropdown(info=_override_words(name)), [self.family], [self.family], **QUICK)
        given = [self.visitor, self.family, self.name, self.generator, self.tokenizer, self.overrides]
        begun = self.convert.click(self.start, given, [self.job, self.converted], **PRIVATE)
        done = begun.success(self.follow, [self.visitor, self.job], [self.converted], **WATCHING)
        done.then(self.show_all, None, [self.table, self.chosen], **PRIVATE)

    def join(self, page: gr.Blocks, tabs: gr.Tabs, others: Sequence[Any]) -> None:
        """Look anew whenever this tab is chosen, as others load models too; and keep their lists of models up to date,
        where models can come."""
        listed = tab_named(tabs, "models").select(self.show_all, None, [self.table, self.chosen], **PRIVATE)
        listed.then(self.look, [self.chosen], [self.facts, self.config, self.card], **PRIVATE)
        found = [getattr(tab, "model", None) for tab in others]
        pickers = [picker for picker in found if isinstance(picker, gr.Dropdown)]
        if self.studio.models.folder is None or not pickers:
            return

        def choices() -> list[Any]:
            return [gr.Dropdown(choices=self.studio.models.names()) for _ in pickers]

        for event in (page.load, self.converted.change):
            event(choices, None, pickers, **QUICK)

    # ---- handlers

    @friendly
    def show_all(self) -> list[Any]:
        """Every model in a line, and the list to choose from."""
        return [models_html(self.studio), gr.Dropdown(choices=self.studio.models.names())]

    @friendly
    def look(self, name: Any) -> list[Any]:
        """What a model is, read without loading it."""
        _check_name(self.studio, name)
        found, line = told(lambda: self.studio.models.describe(name))
        if found is None:
            return [status_html(_without_folders(self.studio, str(line)), "failed"), "", ""]
        config = json.dumps(found["components"], indent=2)
        return [facts_html(name, found), config, card_html(found["card"])]

    @friendly
    def take_in(self, name: Any) -> list[Any]:
        """Load a model."""
        _check_name(self.studio, name)
        before = self.studio.models.loaded()
        _, line = told(lambda: self.studio.models.get(name))
        if line is not None:
            raise SettingError(_without_folders(self.studio, line))
        gone = [other for other in before if other not in self.studio.models.loaded()]
        said = f"{name} is in memory." + (f" {', '.join(gone)} made room for it." if gone else "")
        return [models_html(self.studio), status_html(said, "done")]

    @friendly
    def let_go(self, name: Any) -> list[Any]:
        """Unload a model."""
        _check_name(self.studio, name)
        there = self.studio.models.unload(name)
        said = f"{name} is out of memory; it is loaded again when it is needed." if there else f"{name} was not loaded."
        return [models_html(self.studio), status_html(said)]

    @friendly
    def look_inside(self, path: Any) -> Any:
        """What an uploaded file holds, none of its tensors being read."""
        check_allowed(self.studio)
        if not path:
            raise SettingError("there is no file yet: hand one in")
        return checkpoint_html(inspect_checkpoint(Path(path), Path(path).name))

    @friendly
    def start(
        self, visitor: Any, request: gr.Request, family: Any, name: Any, generator: Any, tokenizer: Any, text: Any
    ) -> list[Any]:
        """Queue a conversion."""
        weights, codec = (Path(path) if path else None for path in (generator, tokenizer))
        job = submit_conversion(self.studio, owner_of(visitor, request), family, name, weights, codec, text)
        return [job.id, status_html("Waiting for its turn…", "waiting")]

    async def follow(self, visitor: Any, job_id: Any, request: gr.Request) -> AsyncIterator[Any]:
        """Show a conversion until it ends."""
        job = self.studio.jobs.get(owner_of(visitor, request), job_id)
        if job is None:
            yield gr.skip()
            return
        async for _ in watch(job):
            yield await asyncio.to_thread(conversion_html, job)


def _check_name(studio: Studio, name: Any) -> None:
    if name not in studio.models.names():
        raise SettingError(f"there is no model {str(name)[:80]!r}: choose one of the list")


def _without_folders(studio: Studio, line: str) -> str:
    """A message with names of models instead of paths of this machine."""
    for folder in (studio.models.folder, hub.ZOO):
        line = line.replace(f"{folder}/", "") if folder is not None else line
    return line


def _upload_words(studio: Studio) -> str:
    if not studio.allow_upload:
        return OFF
    limit = f"Safetensors files of at most {MAX_BYTES / 1e9:.0f} GB, told by their content; pickles are never read."
    return limit + (f" {NOWHERE}" if studio.models.folder is None else " A converted model is there for all visitors.")


def _override_words(family: Any) -> str:
    names = override_names(family) if family in conversion.FAMILIES else []
    return f"Of the published checkpoint. It can be told: {', '.join(names)}." if names else "Of the checkpoint."


# ---- what is shown


def models_html(studio: Studio) -> str:
    """A table of all models; one that cannot be read has a line that says why."""
    loaded, heads = studio.models.loaded(), ("Model", "Kind", "Parameters", "On disk", "In memory", "Licence", "Hash")
    lines = []
    for name, folder in studio.models.folders().items():
        found, line = told(lambda name=name: studio.models.describe(name))  # type: ignore[misc]
        head = f'<th scope="row">{html.escape(name)}</th>'
        if found is None:
            why = html.escape(_without_folders(studio, str(line)))
            lines.append(
                f'<tr>{head}<td class="vgen-broken" colspan="{len(heads) - 1}">Cannot be read: {why}</td></tr>'
            )
            continue
        cells = [
            str(found["pipeline"]).removesuffix("Pipeline"),
            number_words(found["parameters"]),
            byte_words(found["bytes"]),
            "● yes" if name in loaded else "no",
            found["license"],
            found["checkpoint"][:12],
        ]
        origin = "bundled" if folder.parent == hub.ZOO else "local"
        row = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f'<tr>{head.removesuffix("</th>")}<br><span class="vgen-badge">{origin}</span></th>{row}</tr>')
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    room = f"{len(loaded)} of {HELD} places in memory taken. The model used longest ago makes room for a new one."
    return (
        f'<div class="vgen-wide"><table class="vgen-table vgen-models"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="vgen-note">{room}</p>'
    )


def facts_html(name: str, found: Mapping[str, Any]) -> str:
    """A model in a few lines."""
    classes = [str(item) for item in found["classes"]]
    more = f" and {len(classes) - MAX_CLASSES} more" if len(classes) > MAX_CLASSES else ""
    lines = {
        "Model": name,
        "Pipeline": found["pipeline"],
        "Parts": ", ".join(found["components"]) or "none",
        "Parameters": f"{found['parameters']:,}",
        "Weights": f"{byte_words(found['bytes'])} on disk, sha256 {found['checkpoint']}",
        "Licence": found["license"],
        "Classes": f"{len(classes)}: {', '.join(classes[:MAX_CLASSES])}{more}" if classes else "no names",
    }
    items = "".join(f"<dt>{key}</dt><dd>{html.escape(str(text))}</dd>" for key, text in lines.items())
    return f'<dl class="vgen-facts">{items}</dl>'


def card_html(text: str) -> str:
    """A model card as it is written: it may come from anybody, so nothing of it is taken for HTML."""
    shown = html.escape(text.strip() or "This model has no card (README.md).")
    return f'<section aria-label="Model card"><h4>Model card</h4><pre class="vgen-card">{shown}</pre></section>'


def checkpoint_html(found: Mapping[str, Any]) -> str:
    """What an uploaded checkpoint holds."""
    lines = {
        "File": found["file"],
        "Size": byte_words(found["bytes"]),
        "sha256": found["sha256"],
        "Parameters": f"{found['parameters']:,} in {found['tensors']:,} tensors",
        "Metadata": json.dumps(found["metadata"])[:2000] if found["metadata"] else "none",
    }
    items = "".join(f"<dt>{key}</dt><dd>{html.escape(str(text))}</dd>" for key, text in lines.items())
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(name)[:200])}</th><td>{html.escape(shape)}</td></tr>'
        for name, shape in found["shapes"].items()
    )
    hidden = found["tensors"] - len(found["shapes"])
    more = f'<p class="vgen-note">and {hidden:,} more tensors</p>' if hidden > 0 else ""
    return (
        f'<dl class="vgen-facts">{items}</dl><details class="vgen-details"><summary>Tensors</summary>'
        f'<div class="vgen-wide"><table class="vgen-table">{rows}</table></div>{more}</details>'
    )


def conversion_html(job: Job) -> str:
    """How far a conversion is."""
    if job.state == "done":
        return status_html(f"Converted: {job.view} is among the models now.", "done")
    if job.state == "failed":
        return status_html(f"Not converted: {job.error}", "failed")
    words = {"queued": "Waiting for its turn…", "running": "Converting…", "stopped": "Stopped."}
    return status_html(words[job.state], job.state)


def number_words(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"


def byte_words(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
