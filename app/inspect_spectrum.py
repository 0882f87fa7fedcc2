"""The spectrum view: power by frequency after each step, and bands turned off and on."""

import html
from typing import Any

import gradio as gr
import numpy as np
import torch

from vgen.app import drawing
from vgen.app.codebooks import band_count, decode_bands, frequency_bands
from vgen.app.drawing import Line
from vgen.app.forms import Ask, whole
from vgen.app.inspect_panel import Panel, Work, fitted
from vgen.app.recording import Recording
from vgen.data import to_model_range
from vgen.spectrum import radial_power

ADDED, FREQUENCIES = "What each scale added", "Frequencies of the latent"
PICTURE = 448  # pixels that four images side by side are enlarged to, about
MOST_LINES = 8


class SpectrumPanel(Panel):
    """Power by frequency after each step, and bands turned off and on."""

    name = "Spectrum"
    example_words = "eight images with fashion-nfig"

    def build(self) -> None:
        self.lines = gr.HTML("", elem_id="spectrum-lines")
        with gr.Row(elem_classes="vgen-controls"):
            self.kind = gr.Radio([ADDED, FREQUENCIES], value=ADDED, label="A band is", visible=False, min_width=240)
            self.bands = gr.CheckboxGroup(
                [], label="Bands that are on", info="Leave a single one on to see it alone.", visible=False
            )
        self.muted = gr.HTML("", elem_id="spectrum-bands")
        self.inputs = [self.kind, self.bands]
        self.parts = [self.lines, self.kind, self.bands, self.muted]

    def lacking(self, recording: Recording) -> str | None:
        if recording.pipeline.makes_videos:
            return "The spectrum is of images: run fashion-nfig, or fashion-var to compare."
        if recording.pipeline.tokenizer is None:
            return "The model has no tokenizer, so that nothing can be decoded: run another one."
        return None

    def example_ask(self) -> Ask:
        return Ask(model="fashion-nfig", classes=["sneaker", "bag"], per_class=4, seed=0)

    def fit(self, recording: Recording, values: Any) -> list[Any]:
        kind, bands = values
        number = band_count(recording.pipeline.tokenizer)
        fits = isinstance(bands, list) and bands and all(fitted(band, 0, number - 1, -1) >= 0 for band in bands)
        return [kind, bands if fits else list(range(number))]

    def view(self, recording: Recording, *values: Any) -> Work:
        kind, bands = values
        tokenizer = recording.pipeline.tokenizer
        lines = spectrum_lines(recording)
        yield
        number, muted = band_count(tokenizer), ""
        if number:
            kept = sorted({whole("band", band, 0, number - 1) for band in list(bands or [])[:number]})
            muted = self._muted(recording, kept, kind == FREQUENCIES)
            yield
        return [
            drawing.lines_svg(lines, "frequency, cycles per image", "power, powers of ten")
            + "<p>Mean radial power of the pixels over all images of the run, constant part left out.</p>",
            gr.Radio(visible=bool(number)),
            gr.CheckboxGroup(choices=self._choices(tokenizer), value=kept if number else [], visible=bool(number)),
            muted,
        ]

    def _choices(self, tokenizer: Any) -> list[tuple[str, int]]:
        return [(f"{k + 1} ({side}x{side})", k) for k, side in enumerate(getattr(tokenizer, "scales", ()))]

    def _muted(self, recording: Recording, kept: list[int], by_frequency: bool) -> str:
        """The run's first images with all bands and with those that are on."""
        tokens = [part[:4] for part in recording.steps[-1].tokens]
        tokenizer = recording.pipeline.tokenizer
        every = decode_bands(tokenizer, tokens, range(band_count(tokenizer)), by_frequency)
        some = decode_bands(tokenizer, tokens, kept, by_frequency)
        named = f"On: {', '.join(str(k + 1) for k in kept) or 'none'}"
        figures = [
            drawing.figure_html(torch.cat(list(images), -1), words, words, PICTURE)
            for images, words in ((every, "All bands"), (some, named))
        ]
        own = tokenizer.config.get("band_schedule", "none")
        what = ""
        if by_frequency:
            sizes = torch.bincount(frequency_bands(tokenizer).flatten(), minlength=band_count(tokenizer)).tolist()
            whose = f"the tokenizer's own, {own!r}" if own != "none" else "'nyquist', NFIG's: this model knows none"
            what = f"<p>Band limits are {html.escape(whose)}; frequencies in each: {sizes}.</p>"
        return f"{drawing.figures_html(figures)}{what}"


def spectrum_lines(recording: Recording) -> list[Line]:
    """Log10 of the mean power in each ring of the pixels in [-1, 1], for a few steps and the last one."""
    last = len(recording) - 1
    places = np.unique(np.linspace(0, last, min(MOST_LINES, last + 1)).round().astype(int)).tolist()
    found = []
    for place in places:
        power = radial_power(to_model_range(recording.pixels(place))).mean(0)[1:]
        heights = power.clamp_min(1e-12).log10().tolist()
        found.append(Line(recording.label(place).split(":")[0], range(1, len(heights) + 1), heights, place == last))
    return found
