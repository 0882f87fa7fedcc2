"""What the Compare tab shows, as HTML: entrants side by side, who was first, which tokens differ, cells of a grid."""

import html
import math
import urllib.parse
from pathlib import Path

from torch import Tensor

from vgen.app.cells import NONE, Axis, Grid
from vgen.app.core import Studio, titles
from vgen.app.jobs import Job
from vgen.app.measured import Comparison, Measured
from vgen.app.parts import describe_job, picture_html
from vgen.app.race import describe_difference, differing, outline, placed

SHOWN = {"waiting": "waits", "running": "running", "done": "finished", "stopped": "stopped"}


def status(studio: Studio, job: Job, comparison: Comparison) -> tuple[str, str]:
    """How far a comparison is, and its kind for the style sheet."""
    if job.state in ("queued", "failed"):
        return describe_job(studio, job, None)
    done, number, run = len(comparison.done), len(comparison.runs), comparison.running
    if job.state == "stopped":
        return f"Stopped: {done} of {number} finished, and they stay.", "stopped"
    if job.state == "done":
        seconds = sum(run.seconds for run in comparison.runs)
        return f"Done: {number} runs, {_time(seconds)} of sampling, on {comparison.place}.", "done"
    if run is None or run.step is None:
        between = f"Run {done + 1} of {number} begins…" if done else "Loading the model…"
        return comparison.phase or between, "running"
    return f"Run {done + 1} of {number}, {run.label}: {_cost(run)}", "running"


def pictures(run: Measured, comparison: Comparison, name: str) -> str:
    """The samples of a run: its files where it is finished, otherwise what its newest step looks like."""
    if run.state == "done" and run.newest is not None:
        words = list(titles(run.newest.pipeline, run.request))
        number = len(words)
        columns = math.ceil(math.sqrt(number))
        made = "".join(_linked(path, f"{run.label}: {text}") for path, text in zip(_one_each(run), words, strict=True))
        return f'<div class="vgen-shots" style="grid-template-columns: repeat({columns}, 1fr)">{made}</div>'
    newest = run.newest  # the thread that samples puts another one in its place
    if newest is None:
        return picture_html(None, "", name, empty=SHOWN[run.state])
    with comparison.turns.taken():
        png = newest.picture(-1)
    return picture_html(png, f"{run.label}: {newest.label(-1)}", name)


def _one_each(run: Measured) -> list[Path]:
    """One file of each sample: of videos, the film."""
    return [path for path in run.files if path.suffix != ".gif"]


def _linked(path: Path, words: str) -> str:
    """A file to look at, that opens by itself."""
    place, words = file_url(path), html.escape(words, quote=True)
    if path.suffix == ".mp4":
        return f'<video src="{place}" aria-label="{words}" muted loop autoplay playsinline controls></video>'
    picture = f'<img class="vgen-pixels" decoding="sync" alt="{words}" src="{place}">'
    return f'<a href="{place}" target="_blank" title="Open the file: {words}">{picture}</a>'


def file_url(path: Path) -> str:
    """Where the page finds a file of the studio's folder."""
    return html.escape(f"gradio_api/file={urllib.parse.quote(str(path))}", quote=True)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.0f} ms"


def _cost(run: Measured) -> str:
    evaluations = f"{run.evaluations} {'evaluation' if run.evaluations == 1 else 'evaluations'}"
    return f"{evaluations}, {_time(run.seconds)}, {100 * run.known:.0f}% of tokens known"


# ---- a race


def entrants_html(comparison: Comparison) -> str:
    """All entrants side by side."""
    cards = []
    for index, run in enumerate(comparison.runs):
        share, name = 100 * run.known, html.escape(run.label)
        meter = f'<progress max="100" value="{share:.0f}" aria-label="Tokens known, {name}"></progress>'
        told = "" if run.step is None else _cost(run)
        cards.append(
            f'<figure class="vgen-entrant {run.state}"><figcaption>{name}</figcaption>'
            f"{pictures(run, comparison, f'entrant-{index}')}{meter}<p>{html.escape(told)}</p></figure>"
        )
    return f'<div class="vgen-entrants">{"".join(cards)}</div>'


def order_html(comparison: Comparison) -> str:
    """Who was first, among those that have finished."""
    order = placed(comparison)
    if not order:
        return ""
    slowest = max(run.seconds for run in order)
    rows = []
    for place, run in enumerate(order, start=1):
        bar = f'<span class="vgen-timebar" style="width: {100 * run.seconds / slowest:.1f}%"></span>'
        each = run.milliseconds / max(1, run.evaluations)
        rows.append(
            f'<tr><td>{place}</td><th scope="row">{html.escape(run.label)}</th><td>{run.evaluations}</td>'
            f'<td class="vgen-timed">{run.milliseconds:.1f}{bar}</td><td>{each:.2f}</td></tr>'
        )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Place", "Entrant", "Evaluations", "Time, ms", "ms per evaluation")
    )
    number = len(comparison.runs[0].request.seeds)
    caption = f"Finishing order: {number} {'sample' if number == 1 else 'samples'} each, on {comparison.place}"
    return (
        f'<div class="vgen-wide"><table class="vgen-table"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def differences_html(comparison: Comparison) -> str:
    """The finished samples of every entrant, outlined where their tokens are not the first entrant's."""
    first = comparison.runs[0]
    if first.state != "done" or len(comparison.done) < 2:
        return ""
    parts = [_difference(first, "what the others are compared with", None)]
    for run in comparison.done:
        if run is not first:
            found = differing(first.step, run.step)
            parts.append(_difference(run, describe_difference(first, run), None if found is None else found[-1]))
    return (
        f"<h3>Difference from {html.escape(first.label)}</h3><p>Outlined: tokens"
        f"{_finest(first)} that are not those of the first entrant. Faded: those that are the same.</p>"
        f'<div class="vgen-entrants">{"".join(parts)}</div>'
    )


def _finest(run: Measured) -> str:
    return " of the finest scale" if run.step is not None and isinstance(run.step.tokens, list) else ""


def _difference(run: Measured, words: str, masks: Tensor | None) -> str:
    """A run's samples with the cells outlined that `masks` (B, n) has."""
    made = []
    assert run.newest is not None
    for index, (path, title) in enumerate(zip(_one_each(run), titles(run.newest.pipeline, run.request), strict=True)):
        found = None if masks is None else outline(masks[index])
        if masks is None or found is None or path.suffix != ".png":
            made.append(_linked(path, f"{run.label}: {title}"))
            continue
        side, same, border = found
        label = html.escape(f"{run.label}: {title}, {int(masks[index].sum())} tokens outlined", quote=True)
        made.append(
            f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{label}" class="vgen-outlined">'
            f'<image href="{file_url(path)}" width="{side}" height="{side}" preserveAspectRatio="none"/>'
            f'<path class="same" d="{same}"/><path class="under" d="{border}"/><path class="over" d="{border}"/></svg>'
        )
    columns = math.ceil(math.sqrt(len(made)))
    return (
        f'<figure class="vgen-entrant"><figcaption>{html.escape(run.label)}</figcaption>'
        f'<div class="vgen-shots" style="grid-template-columns: repeat({columns}, 1fr)">{"".join(made)}</div>'
        f"<p>{html.escape(words)}</p></figure>"
    )


# ---- a grid


def grid_html(grid: Grid) -> str:
    """The cells as a table, the values beside them."""
    corner = "" if grid.rows.name == NONE else '<td class="vgen-corner"></td>'
    head = "".join(f'<th scope="col">{text}</th>' for text in _labels(grid.columns))
    rows = []
    for row, label in enumerate(_labels(grid.rows)):
        side = "" if grid.rows.name == NONE else f'<th scope="row">{label}</th>'
        made = "".join(_cell(grid, row, column) for column in range(len(grid.columns.values)))
        rows.append(f"<tr>{side}{made}</tr>")
    return (
        f'<div class="vgen-wide"><table class="vgen-cells"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _labels(axis: Axis) -> list[str]:
    return [f"<span>{html.escape(axis.name)}</span> {html.escape(shown)}" for shown in axis.shown]


def _cell(grid: Grid, row: int, column: int) -> str:
    run = grid.cell(row, column)
    cost = "" if run.step is None else f"{run.evaluations} eval., {_time(run.seconds)}"
    name = f"cell-{row}-{column}"
    return f'<td class="{run.state}">{pictures(run, grid, name)}<p>{cost}</p></td>'
