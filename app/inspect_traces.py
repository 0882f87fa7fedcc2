"""Panels on the course of a run: first-hitting times, wavefronts and noise levels, ReCAP's cache."""

import html
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from vgen.app import drawing
from vgen.app.drawing import Line
from vgen.app.forms import Ask, whole
from vgen.app.inspect_panel import Panel, Work, describe_run, fitted, slider
from vgen.app.parts import WATCHING, friendly, owner_of
from vgen.app.recording import Recording
from vgen.app.traces import (
    cache_errors,
    cache_trace,
    distance,
    draw_shares,
    grid_costs,
    hitting_run,
    noise_levels,
    order_law,
    recap_run,
    recorded_hits,
    share_of_time,
    wave_trace,
)
from vgen.types import SettingError

MOST_SEEDS = 5000
MOST_DRAWS = 2_000_000
POINTS = 101  # of a law's curve
UNFIT = 1 << 20  # of a slider that has seen no run yet
GRIDS = (8, 16, 32, 64, 128, 256, 1000)
MOST_ROWS = 40  # of a table
GREY, AMBER, BLUE, WHITE = (150, 150, 150), (240, 170, 40), (40, 110, 190), (245, 245, 245)


class HittingPanel(Panel):
    """When first hitting reveals tokens, drawn many times, against the law."""

    name = "First hitting"
    example_words = "four bags with fashion-maskgit, sampler first-hitting"

    def build(self) -> None:
        with gr.Row(elem_classes="vgen-controls"):
            self.order = gr.Slider(1, UNFIT, value=UNFIT, step=1, label="Revelation number", min_width=180)
            self.seeds = gr.Slider(100, MOST_SEEDS, value=1000, step=100, label="Seeds to draw", min_width=180)
            self.image = gr.Slider(1, 2, value=1, step=1, label="Image", visible=False, min_width=140)
        self.result = gr.HTML("", elem_id="hitting-result")
        self.inputs = [self.order, self.seeds, self.image]
        self.parts = [self.order, self.image, self.result]

    def lacking(self, recording: Recording) -> str | None:
        if not hitting_run(recording):
            return "To see first-hitting times, run fashion-maskgit with sampler first-hitting."
        return None

    def example_ask(self) -> Ask:
        return Ask(model="fashion-maskgit", classes=["bag"], per_class=4, seed=0, sampler="first-hitting")

    def fit(self, recording: Recording, values: Any) -> list[Any]:
        order, seeds, image = values
        number = recording.steps[-1].known.shape[1]
        return [fitted(order, 1, number, max(1, number // 2)), seeds, fitted(image, 1, recording.rows, 1)]

    def view(self, recording: Recording, *values: Any) -> Work:
        order, seeds, image = values
        number = recording.steps[-1].known.shape[1]
        k = whole("revelation number", order, 1, number)
        draws = whole("seeds", seeds, 1, MOST_SEEDS)
        row = whole("image", image, 1, recording.rows) - 1
        draws = min(draws, max(1, MOST_DRAWS // number))
        schedule = recording.request.settings["noise_schedule"]
        drawn = draw_shares(range(draws), number)[:, k - 1].sort().values
        yield
        return [
            gr.Slider(value=k, maximum=max(2, number)),
            slider(row + 1, recording.rows),
            self._law(recording, drawn, number, k, schedule) + self._run(recording, row, number, schedule),
        ]

    def _law(self, recording: Recording, drawn: Tensor, number: int, k: int, schedule: str) -> str:
        """Drawn times of one revelation against their law, over diffusion time."""
        times = torch.linspace(0, 1, POINTS, dtype=torch.float64)
        law = order_law(share_of_time(times, schedule), number, k)
        below = torch.searchsorted(drawn, share_of_time(times, schedule), right=True) / len(drawn)
        apart = distance(drawn, order_law(drawn, number, k))
        usual = 1.36 / len(drawn) ** 0.5
        lines = [
            Line("exact law", times.tolist(), law.tolist(), strong=True),
            Line(f"{len(drawn)} seeds drawn", times.tolist(), below.tolist()),
        ]
        verdict = "as the law has it" if apart <= usual else "unusually far, as one set of seeds in twenty is"
        chart = drawing.lines_svg(
            lines, "diffusion time t, 1 is all masked", "share of runs where it comes at t or below"
        )
        return (
            f"<h3>Time of revelation {k} of {number}</h3>{chart}"
            f"<p>Largest distance {apart:.4f}; with {len(drawn)} seeds it stays below {usual:.4f} nineteen times in "
            f"twenty: {verdict}. No network is evaluated for this.</p>"
        )

    def _run(self, recording: Recording, row: int, number: int, schedule: str) -> str:
        """The run's own times, and what a grid of time would have cost."""
        hits = recorded_hits(recording, row)
        median = [_median(number, known, schedule) for known, _ in hits]
        lines = [
            Line("median of the law", [known for known, _ in hits], median, strong=True),
            Line(f"this run, image {row + 1}", [known for known, _ in hits], [time for _, time in hits]),
        ]
        counts = np.diff([0, *(known for known, _ in hits)])
        rows = [[f"first hitting, image {row + 1} of this run", len(hits), len(hits), int(counts[counts > 1].sum())]]
        for cost in grid_costs(number, schedule, GRIDS):
            rows.append(["ancestral", cost.steps, f"{cost.evaluations:.1f}", f"{cost.together:.1f}"])
        heads = ["Sampler", "Steps", "Of these, reveal something", "Tokens drawn along with another"]
        table = drawing.table_html(heads, rows, "Against a uniform grid of time, expected for one image")
        return (
            f"<h3>This run</h3>{drawing.lines_svg(lines, 'tokens known', 'diffusion time')}{table}"
            f"<p>Each step that reveals something is an evaluation. Left to itself, first hitting takes {number}, one "
            "for each token, and draws none blind to another. A grid that comes close to that needs many more steps, "
            "nearly all of which reveal nothing; a coarse one saves evaluations by drawing tokens blind.</p>"
        )


def _median(number: int, order: int, schedule: str) -> float:
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    law = order_law(share_of_time(times, schedule), number, order)
    return float(times[int((law < 0.5).sum().clamp_max(1000))])


# ---- wavefront


class WavePanel(Panel):
    """Tokens or frames at work at the same time."""

    name = "Wavefront"
    example_words = "a recurrent-depth or video model, where one is here"

    def build(self) -> None:
        self.image = gr.Slider(1, 2, value=1, step=1, label="Image or video", visible=False)
        self.result = gr.HTML("", elem_id="wave-result")
        self.inputs = [self.image]
        self.parts = [self.image, self.result]

    def lacking(self, recording: Recording) -> str | None:
        last = recording.steps[-1]
        if last.wave is None and (last.time is None or last.time.ndim != 2):
            return "To see a wavefront, run a recurrent-depth model (sampler wave-exact), or a video model."
        return None

    def example_ask(self) -> Ask:
        for name in self.studio.models.names():
            if self.studio.models.describe(name)["pipeline"] in ("RasterPipeline", "NextFramePipeline"):
                return Ask(model=name, classes=[], per_class=1, seed=0)
        raise SettingError("there is no recurrent-depth or video model here: put one into the studio's models folder")

    def fit(self, recording: Recording, values: Any) -> list[Any]:
        return [fitted(values[0], 1, recording.rows, 1)]

    def view(self, recording: Recording, *values: Any) -> Work:
        row = whole("image", values[0], 1, recording.rows) - 1
        shown = wave_html(recording, row) if recording.steps[-1].wave is not None else noise_html(recording, row)
        yield
        return [slider(row + 1, recording.rows), shown]


def wave_html(recording: Recording, row: int) -> str:
    """Positions by evaluations, coloured by recurrences."""
    trace = wave_trace(recording, row)
    most = max(1, int(trace.depths.max()))
    colours = _ramped(trace.depths / most)
    colours[(trace.depths == 0).numpy()] = GREY
    colours[trace.final.numpy()] = WHITE
    at_work = (~trace.final & (trace.depths > 0)).sum(0)
    words = (
        f"{trace.depths.shape[0]} tokens in {trace.depths.shape[1]} evaluations, {trace.passes[-1]} passes of the "
        f"core, {trace.work} tokens' recurrences in all rows, {trace.restarts} restarts"
    )
    rows = [
        [i + 1, trace.passes[i], int(trace.final[:, i].sum()), int(at_work[i]), int(trace.drafts[i])]
        for i in _some(trace.depths.shape[1])
    ]
    heads = ["Evaluation", "Passes so far", "Final", "At work", "Guesses standing"]
    one_by_one = trace.depths.shape[0] * most
    return (
        f"<p>{words}. One token after the other would take {one_by_one} passes.</p>"
        f"{drawing.matrix_html(colours, words, 'tokens, in raster order', 'evaluations')}"
        f"{drawing.key_legend([(GREY, 'not begun'), (WHITE, 'final')])}"
        f"{drawing.scale_legend('1', f'{most} recurrences', 'At work')}"
        f"{drawing.table_html(heads, rows, 'What each evaluation did')}"
    )


def noise_html(recording: Recording, row: int) -> str:
    """Frames by evaluations, coloured by noise level."""
    levels = noise_levels(recording, row)
    colours = _ramped(levels)
    colours[(levels <= 0).numpy()] = WHITE
    busy = ((levels > 0) & (levels < 1)).sum(0)
    words = (
        f"{levels.shape[0]} frames in {levels.shape[1]} evaluations, up to {int(busy.max())} frames half done at a time"
    )
    rows = [
        [i + 1, int((levels[:, i] <= 0).sum()), int(busy[i]), int((levels[:, i] >= 1).sum())]
        for i in _some(levels.shape[1])
    ]
    heads = ["Evaluation", "Frames finished", "At work", "Still noise"]
    return (
        f"<p>{words}.</p>{drawing.matrix_html(colours, words, 'frames', 'evaluations')}"
        f"{drawing.key_legend([(WHITE, 'finished')])}"
        f"{drawing.scale_legend('nearly clean', 'all noise (1)', 'Noise level')}"
        f"{drawing.table_html(heads, rows, 'What each evaluation did')}"
    )


def _ramped(shares: Tensor) -> np.ndarray:
    """Colours (..., 3) uint8 of shares in 0..1."""
    table = np.array([drawing.ramp(i / 255) for i in range(256)], dtype=np.uint8)
    return table[(shares.clamp(0, 1) * 255).round().long().numpy()]


def _some(count: int) -> list[int]:
    """At most MOST_ROWS of so many numbers, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS)).round().astype(int)).tolist()


# ---- ReCAP


class RecapPanel(Panel):
    """Which tokens a step evaluated, and which it read from the cache."""

    name = "ReCAP"
    example_words = "four sneakers with fashion-maskgit, partial evaluations on"

    def build(self) -> None:
        self.image = gr.Slider(1, 2, value=1, step=1, label="Image", visible=False)
        self.result = gr.HTML("", elem_id="recap-result")
        self.measure = gr.Button("Measure the error against whole evaluations")
        self.errors = gr.HTML("", elem_id="recap-errors")
        self.inputs = [self.image]
        self.parts = [self.image, self.result, self.errors]

    def wire(self, page: gr.Blocks) -> None:
        super().wire(page)
        where = [self.visitor, self.current, self.image]
        self.measure.click(self.compare, where, [self.status, self.errors], **WATCHING)

    def lacking(self, recording: Recording) -> str | None:
        if not recap_run(recording):
            return (
                "No evaluation of the last run was partial: run a masked model with full_steps and partial_steps set."
            )
        return None

    def example_ask(self) -> Ask:
        settings = {"steps": 12, "full_steps": 3, "partial_steps": 2}
        return Ask(model="fashion-maskgit", classes=["sneaker"], per_class=4, seed=0, settings=settings)

    def fit(self, recording: Recording, values: Any) -> list[Any]:
        return [fitted(values[0], 1, recording.rows, 1)]

    def view(self, recording: Recording, *values: Any) -> Work:
        row = whole("image", values[0], 1, recording.rows) - 1
        shown = cache_html(recording, row)
        yield
        return [slider(row + 1, recording.rows), shown, ""]

    @friendly
    async def compare(self, visitor: Any, job_id: Any, image: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Repeat every partial evaluation of an image whole, and tell how far apart they are."""
        owner = owner_of(visitor, request)
        recording = self.recording(owner, job_id)
        if recording is None or self.lacking(recording):
            raise SettingError("the last run has no partial evaluations: run the example")
        row = whole("image", image, 1, recording.rows) - 1
        work = partial(self._compared, recording, row)
        async for item in self.answer(owner, work, 2, describe_run(recording)):
            yield item

    def _compared(self, recording: Recording, row: int) -> Work:
        errors = yield from cache_errors(recording, row)
        rows = [
            [
                error.step,
                error.tokens,
                f"{error.divergence:.4f}",
                drawing.per_cent(error.apart),
                drawing.per_cent(error.likeliest),
            ]
            for error in errors
        ]
        tokens = sum(error.tokens for error in errors)
        mean = sum(error.divergence * error.tokens for error in errors) / max(tokens, 1)
        apart = sum(error.apart * error.tokens for error in errors) / max(tokens, 1)
        heads = ["Step", "Tokens fixed", "KL, nats a token", "Draws that must differ", "Other likeliest code"]
        return [
            f"<p>Over {tokens} tokens that partial evaluations fixed: {mean:.4f} nats a token from what whole ones "
            f"give (KL divergence), so that {drawing.per_cent(apart)} of draws must come out otherwise. With the run's "
            f"guidance, temperature 1.</p>{drawing.table_html(heads, rows, 'Partial against whole evaluations')}"
        ]


def cache_html(recording: Recording, row: int) -> str:
    """Tokens by steps: evaluated, read from the cache, fixed."""
    trace = cache_trace(recording, row)
    colours = np.empty((*trace.evaluated.shape, 3), dtype=np.uint8)
    colours[:] = GREY
    colours[trace.evaluated.numpy()] = BLUE
    colours[(trace.evaluated & trace.whole).numpy()] = WHITE
    colours[trace.fixed.numpy()] = AMBER
    whole_steps, steps = int(trace.whole.sum()), len(trace.whole)
    words = (
        f"{whole_steps} of {steps} evaluations whole, the others partial: {int(trace.evaluated.sum())} tokens "
        f"evaluated instead of {trace.evaluated.numel()}, {drawing.per_cent(trace.share)}"
    )
    rows = [
        [
            i + 1,
            "whole" if trace.whole[i] else "partial",
            int(trace.evaluated[:, i].sum()),
            int((~trace.evaluated[:, i]).sum()),
            int(trace.fixed[:, i].sum()),
        ]
        for i in _some(steps)
    ]
    heads = ["Step", "Evaluation", "Evaluated", "From the cache", "Fixed"]
    key = [
        (WHITE, "evaluated, whole step"),
        (BLUE, "evaluated, partial step"),
        (GREY, "from the cache"),
        (AMBER, "fixed in this step"),
    ]
    return (
        f"<p>{html.escape(words)}.</p>{drawing.matrix_html(colours, words, 'tokens, in raster order', 'steps')}"
        f"{drawing.key_legend(key)}{drawing.table_html(heads, rows, 'Step by step')}"
    )
