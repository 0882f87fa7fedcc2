"""What `gradio_client`, curl and MCP call by name; everything else of the page is private."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from vgen.app.core import Studio
from vgen.app.editing import Repaint, grid_side, submit_edit
from vgen.app.forms import Ask, named
from vgen.app.jobs import Job
from vgen.app.parts import describe_job, friendly, owner_of, run_of, watch
from vgen.app.pictures import place_with_mask, read_working
from vgen.types import SettingError

LEASE = 15.0  # seconds that a run goes on without being watched
Made = tuple[list[str] | None, Any, str]  # the files made, the request that they carry, and a status line


def add_endpoints(studio: Studio) -> None:
    """Add `generate`, `edit` and `models` to the page that is being built, behind components that nobody sees."""

    async def generate(
        model: str,
        classes: list | None,
        per_class: float,
        seed: float,
        sampler: str | None,
        settings: dict | None,
        request: gr.Request,
    ) -> AsyncIterator[Made]:
        """Sample images or videos from a model: the files made, the request that repeats them, and a status line.

        Args:
            model: a name that `models` lists.
            classes: names or ids; null for every class, [] for none.
            per_class: images of each class.
            seed: of the first image; image i has seed + i.
            sampler: one that `models` lists for the model; null for its first.
            settings: of the sampler by name, such as {"guidance_scale": 3}.
        """
        ask = Ask(
            model=str(model),
            classes=classes,
            per_class=per_class,  # type: ignore[arg-type]  # checked there
            seed=seed,  # type: ignore[arg-type]
            sampler=sampler or None,
            settings=settings or {},
        )
        async with aclosing(_follow(studio, studio.sample(owner_of(None, request), ask, lease=LEASE))) as states:
            async for state in states:
                yield state

    async def edit(
        model: str,
        image: str | None,
        mask: str | None,
        class_label: Any,
        versions: float,
        seed: float,
        sampler: str | None,
        settings: dict | None,
        request: gr.Request,
    ) -> AsyncIterator[Made]:
        """Repaint a part of an image: the files made, the request that they carry, and a status line.

        Args:
            model: a name that `models` lists, of images.
            image: a picture file; its middle square is what the model takes.
            mask: a picture of the same size, white where the image is to be drawn anew and black elsewhere.
            class_label: name or id of the class to paint; null for none.
            versions: how many to make.
            seed: of the first version; version i has seed + i.
            sampler: one that `models` lists for the model; null for its first.
            settings: of the sampler by name, such as {"guidance_scale": 3}.
        """
        if not image or not mask:
            raise SettingError("an edit needs an image and a mask: give two picture files")
        pipeline = studio.models.get(str(model))
        grid_side(pipeline)
        canvas, marked = place_with_mask(
            read_working(Path(image)), read_working(Path(mask)), pipeline.tokenizer.image_size
        )
        repaint = Repaint(
            model=str(model),
            canvas=canvas,
            mask=marked,
            label=None if class_label is None else pipeline.label_ids([class_label])[0],
            seed=seed,  # type: ignore[arg-type]  # checked there
            versions=versions,  # type: ignore[arg-type]
            sampler=sampler or None,
            settings=named(settings or {}),
        )
        async with aclosing(_follow(studio, submit_edit(studio, owner_of(None, request), repaint, LEASE))) as states:
            async for state in states:
                yield state

    def models() -> list[dict[str, Any]]:
        """The models here: name, samplers, class names, whether it makes videos, and its size."""
        return [_summary(studio, name) for name in studio.models.names()]

    hidden: dict[str, Any] = {"visible": False}  # each of them: what is visible in a hidden row is loaded all the same
    with gr.Row(**hidden):
        model = gr.Textbox(label="model", **hidden)
        seed = gr.Number(label="seed", value=0, **hidden)
        sampler = gr.Textbox(label="sampler", **hidden)
        settings = gr.JSON(label="settings", **hidden)
        classes = gr.JSON(label="classes", **hidden)
        per_class = gr.Number(label="per_class", value=1, **hidden)
        image, mask = gr.File(label="image", **hidden), gr.File(label="mask", **hidden)
        class_label = gr.JSON(label="class_label", **hidden)
        versions = gr.Number(label="versions", value=1, **hidden)
        made = [
            gr.File(label="files", file_count="multiple", **hidden),
            gr.Textbox(label="request", **hidden),
            gr.Textbox(label="status", **hidden),
        ]
        listed = gr.JSON(label="models", **hidden)
        button = gr.Button(**hidden)
        asked = [model, classes, per_class, seed, sampler, settings]
        edited = [model, image, mask, class_label, versions, seed, sampler, settings]
        button.click(friendly(generate), asked, made, api_name="generate", concurrency_limit=None)
        button.click(friendly(edit), edited, made, api_name="edit", concurrency_limit=None)
        button.click(friendly(models), None, [listed], api_name="models")


async def _follow(studio: Studio, job: Job) -> AsyncGenerator[Made, None]:
    """How far a job is, until it has ended. A client that cancels ends it; where Gradio does not close this iterator,
    the lease does. Begin it at once: a job is not awaited before, lest whoever cancels leave it without an owner."""
    try:
        async for last in watch(job):
            run = run_of(job)
            text, _ = describe_job(studio, job, run)
            if job.state == "failed":
                raise SettingError(job.error or "failed")
            files = [str(path) for path in run.files] if last and run is not None else None
            told = None if run is None or run.request is None else run.request.to_json()
            yield files, told, text
    finally:
        studio.jobs.forget(job)


def _summary(studio: Studio, name: str) -> dict[str, Any]:
    told = studio.models.describe(name)
    pipeline = studio.models.get(name)
    return {
        "name": name,
        "samplers": list(pipeline.samplers),
        "classes": told["classes"],
        "videos": pipeline.makes_videos,
        "parameters": told["parameters"],
        "checkpoint": told["checkpoint"],
    }
