"""Panels on the tokenizer: codebook usage, and the round trip of a picture."""

import asyncio
import html
import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from vgen.app import drawing
from vgen.app.codebooks import (
    Usage,
    band_count,
    codebook_of,
    count_codes,
    decode_codes,
    encode_scales,
    held_out_images,
    nearest_codes,
    open_picture,
    round_trip,
    together,
)
from vgen.app.core import Run
from vgen.app.drawing import GRID_JS
from vgen.app.forms import Ask, whole
from vgen.app.inspect_panel import Panel, Work, describe_run, fitted
from vgen.app.inspecting import has_codes, record_image
from vgen.app.parts import POLL_SECONDS, QUICK, WATCHING, friendly, owner_of, status_html
from vgen.app.recording import Recording
from vgen.data import to_model_range
from vgen.types import SettingError

SOURCES = ("Tokens of the run", "The run's images, encoded", "Test images, encoded")
ORDERS = ("Most used first", "By number")
MOST_IMAGES = 1000
MOST_BARS = 512
PAGE_PIXELS = 1 << 20  # decoded for a page of codes
MOST_CODES = 48  # on a page
NEAREST = 8
THUMBNAIL = 56
PICTURE = 224
ALL = 0  # scales


class CodebookPanel(Panel):
    """Which codes are used, how often, and what they look like."""

    name = "Codebook"
    example_words = "sixteen images with fashion-var"

    def build(self) -> None:
        with gr.Row(elem_classes="vgen-controls"):
            self.source = gr.Radio(SOURCES, value=SOURCES[0], label="Count codes in", min_width=240)
            self.images = gr.Number(
                200, precision=0, minimum=1, maximum=MOST_IMAGES, label="Test images, at most", min_width=140
            )
            self.scale = gr.Slider(0, 2, value=ALL, step=1, label="Scale (0 is all)", visible=False, min_width=140)
        self.usage = gr.HTML("", elem_id="code-usage")
        with gr.Row(elem_classes="vgen-controls"):
            self.order = gr.Radio(ORDERS, value=ORDERS[0], label="Codes as pictures", min_width=200)
            self.page = gr.Number(1, precision=0, minimum=1, label="Page", min_width=120)
        self.codes = gr.HTML("", js_on_load=GRID_JS, elem_id="code-page")
        self.code = gr.Number(0, precision=0, minimum=0, label="Nearest codes of code", elem_id="code-number")
        self.near = gr.HTML("", elem_id="code-nearest")
        self.inputs = [self.source, self.images, self.scale, self.order, self.page]
        self.parts = [self.scale, self.usage, self.page, self.codes, self.near]

    def wire(self, page: gr.Blocks) -> None:
        super().wire(page)
        clicked = self.codes.click(self.choose, [self.code], [self.code], **QUICK)
        where = [self.visitor, self.current, self.scale, self.code]
        for event in (clicked.success, self.code.submit):
            event(self.nearest, where, [self.status, self.near], **WATCHING)

    def lacking(self, recording: Recording) -> str | None:
        if not has_codes(recording) or recording.pipeline.tokenizer is None:
            return "The run's model has no codebook: run one with codes, such as fashion-var."
        return None

    def example_ask(self) -> Ask:
        return Ask(model="fashion-var", classes=None, per_class=2, seed=0)

    def fit(self, recording: Recording, values: Any) -> list[Any]:
        source, images, scale, order, _ = values
        return [source, images, fitted(scale, 0, band_count(recording.pipeline.tokenizer), ALL), order, 1]

    def view(self, recording: Recording, *values: Any) -> Work:
        source, images, scale, order, page = values
        pipeline = recording.pipeline
        tokenizer, scales = pipeline.tokenizer, max(1, band_count(pipeline.tokenizer))
        k = whole("scale", scale, 0, scales if scales > 1 else 0)
        count = whole("test images", images, 1, MOST_IMAGES)
        tokens, words = self._tokens(recording, source, count)
        yield
        usages = count_codes(tokens, len(codebook_of(tokenizer)))
        usage = together(usages) if k == ALL else usages[min(k, len(usages)) - 1]
        size = max(12, min(MOST_CODES, PAGE_PIXELS // tokenizer.image_size**2))
        vocab = len(usage.counts)
        number = whole("page", page, 1, math.ceil(vocab / size))
        ranked = usage.counts.argsort(descending=True, stable=True) if order != ORDERS[1] else torch.arange(vocab)
        shown = ranked[(number - 1) * size : number * size].tolist()
        images_of = decode_codes(tokenizer, shown, max(0, k - 1))
        yield
        return [
            gr.Slider(value=k, maximum=max(2, scales), visible=scales > 1),
            usage_html(usages, usage, words, tokenizer),
            gr.Number(value=number, maximum=math.ceil(vocab / size)),
            codes_html(shown, images_of, usage, f"Page {number} of {math.ceil(vocab / size)}", scales > 1, k),
            "",
        ]

    def _tokens(self, recording: Recording, source: Any, count: int) -> tuple[list[Tensor], str]:
        """Tokens (B, n_k) of every scale, and what they are of."""
        last, tokenizer = recording.steps[-1], recording.pipeline.tokenizer
        if source == SOURCES[0]:
            tokens = last.tokens if isinstance(last.tokens, list) else [last.tokens]
            return tokens, f"the tokens of {recording.rows} images as they were drawn"
        found = held_out_images(recording.pipeline, count) if source == SOURCES[2] else None
        if found is not None:
            return encode_scales(tokenizer, found), f"{len(found)} test images, encoded"
        missing = " (no test images of the model's classes are on this machine)" if source == SOURCES[2] else ""
        return encode_scales(tokenizer, recording.pixels(-1)), f"the {recording.rows} images, encoded{missing}"

    def choose(self, code: Any, event: gr.EventData) -> Any:
        clicked = getattr(event, "code", None)
        return clicked if isinstance(clicked, int) and clicked >= 0 else code

    @friendly
    async def nearest(
        self, visitor: Any, job_id: Any, scale: Any, code: Any, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        """The codes whose vectors lie nearest to one's, as pictures."""
        owner = owner_of(visitor, request)
        recording = self.recording(owner, job_id)
        if recording is None or self.lacking(recording):
            raise SettingError("there is no codebook to look at: generate something first")
        work = partial(self._nearest, recording, scale, code)
        async for item in self.answer(owner, work, 2, describe_run(recording)):
            yield item

    def _nearest(self, recording: Recording, scale: Any, code: Any) -> Work:
        tokenizer = recording.pipeline.tokenizer
        vectors = codebook_of(tokenizer)
        chosen = whole("code", code, 0, len(vectors) - 1)
        k = whole("scale", scale, 0, band_count(tokenizer)) if band_count(tokenizer) else 0
        near = [(chosen, 0.0), *nearest_codes(vectors, chosen, NEAREST)]
        images = decode_codes(tokenizer, [other for other, _ in near], max(0, k - 1))
        yield
        figures = [
            drawing.figure_html(image, f"Code {other}", f"{other}: {apart:.3g} away", THUMBNAIL)
            for image, (other, apart) in zip(images, near, strict=True)
        ]
        return [f"<p>Nearest to code {chosen}, by Euclidean distance:</p>{drawing.figures_html(figures)}"]


def usage_html(usages: list[Usage], usage: Usage, words: str, tokenizer: Any) -> str:
    """Numbers, a bar for every code by rank, and a row for every scale."""
    vocab, used = len(usage.counts), len(usage.counts) - usage.dead
    counts = usage.counts.sort(descending=True).values.double()
    per_bar = math.ceil(vocab / MOST_BARS)
    heights = [float(part.mean()) for part in counts.split(per_bar)]
    grouped = f", {per_bar} codes a bar" if per_bar > 1 else ""
    rows = [[k + 1, one.total, vocab - one.dead, one.dead, f"{one.perplexity:.0f}"] for k, one in enumerate(usages)]
    table = drawing.table_html(["Scale", "Tokens", "Codes used", "Not used", "Perplexity"], rows, "Scale by scale")
    trained = tokenizer.codebook.statistics()
    training = (
        f"At the end of training {drawing.per_cent(trained['codes_used'])} of codes were in use, perplexity "
        f"{trained['perplexity']:.0f}."
        if bool(tokenizer.codebook.usage.sum())
        else ""
    )
    return (
        f"<p>In {html.escape(words)}: {usage.total} tokens use <b>{used} of {vocab} codes</b>, {usage.dead} are not "
        f"used here; perplexity <b>{usage.perplexity:.0f}</b> ({vocab} if all were used alike). {training}</p>"
        f"{drawing.bars_svg(heights, f'codes by rank{grouped}', 'times used')}{table if len(usages) > 1 else ''}"
    )


def codes_html(codes: list[int], images: Tensor, usage: Usage, place: str, scaled: bool, k: int) -> str:
    """Codes as buttons with what each decodes to."""
    buttons = []
    for code, image in zip(codes, images, strict=True):
        used = int(usage.counts[code])
        patch = drawing.figure_html(image, "", f"{code} ({used})", THUMBNAIL)
        words = f"Code {code}, used {used} times: show its nearest codes"
        buttons.append(f'<button type="button" data-code="{code}" aria-label="{words}">{patch}</button>')
    alone = (
        f"every token of scale {max(1, k)} is this code and no other scale adds to it"
        if scaled
        else "every token is this code"
    )
    return (
        f"<p>{place}. Each picture is what the decoder makes of a grid in which {alone}; below it code "
        f"and, in brackets, times used. Click one for its nearest codes.</p>"
        f'<div class="vgen-patches">{"".join(buttons)}</div>'
    )


# ---- round trip


class RoundTripPanel(Panel):
    """What a tokenizer keeps of a picture that is handed in."""

    name = "Round trip"
    needs_run = False

    def build(self) -> None:
        names = self.studio.models.names()
        first = self.studio.models.usual()
        with gr.Row(elem_classes="vgen-controls"):
            self.model = gr.Dropdown(names, value=first, label="Model", min_width=180)
            self.file = gr.File(
                label="Picture (PNG, JPEG, WebP, BMP, GIF); its middle square is taken",
                type="filepath",
                file_types=["image"],
                elem_id="trip-file",
                height=120,
            )
        self.go = gr.Button("Encode and decode", variant="primary", elem_id="trip-go")
        self.result = gr.HTML("", elem_id="trip-result")
        with gr.Row(elem_classes="vgen-controls"):
            self.label = gr.Textbox(
                label="Class of the picture", info="Name or number; empty is no class.", max_length=80, min_width=180
            )
            self.take = gr.Button("Inspect its tokens as the last run", min_width=180, scale=0)
        self.inputs, self.parts = [], [self.result]

    def wire(self, page: gr.Blocks) -> None:
        given = [self.visitor, self.model, self.file]
        for event in (self.go.click, self.file.upload):
            event(self.convert, given, [self.status, self.result], **WATCHING)
        self.take.click(self.adopt, [*given, self.label], [self.current, self.status], **WATCHING)

    def nothing(self, line: str) -> list[Any]:
        return [status_html("Hand in a picture to see what the tokenizer keeps of it."), *[gr.skip()] * 3]

    def lacking(self, recording: Recording) -> str | None:
        return ""  # a picture is looked at, not a run

    @friendly
    async def convert(self, visitor: Any, model: Any, path: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Encode and decode a picture."""
        if not path:
            raise SettingError("there is no picture: hand one in first")
        work = partial(self._convert, model, path)
        async for item in self.answer(owner_of(visitor, request), work, 2, "Encoded and decoded."):
            yield item

    def _open(self, model: Any, path: Any) -> tuple[Any, Tensor]:
        """A pipeline and the picture in its size."""
        pipeline = self.studio.models.get(str(model))
        if pipeline.makes_videos or pipeline.tokenizer is None:
            raise SettingError("this model encodes no single pictures: choose an image model with a tokenizer")
        return pipeline, open_picture(str(path), pipeline.tokenizer.image_size)

    def _convert(self, model: Any, path: Any) -> Work:
        pipeline, image = self._open(model, path)
        trip = round_trip(pipeline.tokenizer, image)
        yield
        return [trip_html(trip, pipeline.tokenizer)]

    @friendly
    async def adopt(
        self, visitor: Any, model: Any, path: Any, label: Any, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        """Make a picture's tokens the last run, so that the other panels look at them."""
        if not path:
            raise SettingError("there is no picture: hand one in first")
        owner = owner_of(visitor, request)
        run = Run(title=str(model))

        def work(job: Any) -> Any:
            pipeline, image = self._open(model, path)
            codebook_of(pipeline.tokenizer)
            labels = pipeline.label_ids(str(label).strip()) if str(label or "").strip() else None
            run.request = pipeline.request(labels, [0], None, {})
            recording = Recording(pipeline, run.request)
            record_image(recording, to_model_range(image))
            run.recording = recording
            yield

        job = self.studio.jobs.submit(owner, "sample", run.title, work)
        job.view = run
        while not job.wait_until_ended(0):
            yield [gr.skip(), status_html("Computing…", "waiting")]
            await asyncio.sleep(POLL_SECONDS)
        if job.state != "done":
            self.studio.jobs.forget(job)
            raise SettingError(job.error or "it was stopped")
        yield [
            job.id,
            status_html("The picture's tokens are now the last run: open Tokens, Codebook or Spectrum.", "done"),
        ]


def trip_html(trip: Any, tokenizer: Any) -> str:
    """The original, what came back after each scale, and the tokens."""
    last = len(trip.prefixes) - 1
    figures = [drawing.figure_html(trip.original, "The picture as the model gets it", "As the model gets it", PICTURE)]
    for k, (image, value) in enumerate(zip(trip.prefixes, trip.psnr, strict=True)):
        name = f"Up to scale {k + 1}" if last else "Decoded"
        name = f"All {last + 1} scales" if last and k == last else name
        figures.append(drawing.figure_html(image, name, f"{name}: PSNR {drawing.number(value)} dB", PICTURE))
    blocks = []
    for k, codes in enumerate(trip.tokens):
        side = math.isqrt(len(codes))
        title = f"Tokens of scale {k + 1}, {side}x{side}" if last else f"Tokens, {side}x{side}"
        rows = [[str(code) for code in row] for row in codes.reshape(side, side).tolist()]
        blocks.append(drawing.table_html([str(i + 1) for i in range(side)], rows, title))
    number = sum(len(codes) for codes in trip.tokens)
    vocab = tokenizer.config.get("vocab_size")
    told = (
        f"<p>{number} tokens of {math.log2(vocab):.1f} bits: {number * math.log2(vocab) / 8:.0f} bytes.</p>"
        if number
        else ""
    )
    listed = f"<details><summary>Tokens</summary>{''.join(blocks)}</details>" if blocks else ""
    return f"{told}{drawing.figures_html(figures)}{listed}"
