"""Quality against cost: one evaluation for every combination of sampling settings, as a table and a plot."""

import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vgen.batch import Item
from vgen.evaluation.evaluate import Evaluator
from vgen.evaluation.report import Report
from vgen.evaluation.sampled import SampledImages
from vgen.files import atomic_file
from vgen.types import SettingError

COSTS = ("evaluations_per_image", "seconds_per_image")
MAX_POINTS = 1000


def parse_grid(texts: Sequence[str], what: str = "--grid") -> dict[str, list[Any]]:
    """["guidance_scale=1,2", "top_k=0,100"] -> values by setting. Raises SettingError, calling a text `what`."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        found = [parse_value(value.strip(), f"{what} {text!r}") for value in values.split(",") if value.strip()]
        if not equals or not found:
            raise SettingError(f"{what} {text!r} has no values: write a setting and its values, as guidance_scale=1,2")
        if name in grid:
            raise SettingError(f"{what} names {name} twice: give all its values at once")
        grid[name] = list(dict.fromkeys(found))
    number = 1
    for choices in grid.values():
        number *= len(choices)
    if number > MAX_POINTS:
        raise SettingError(f"the grid has {number} points, over the limit of {MAX_POINTS}: take fewer values")
    return grid


def parse_value(text: str, whole: str) -> Any:
    """A number, true or false, a name, or a curve (numbers between colons). Raises SettingError, quoting `whole`."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not re.fullmatch(r"[A-Za-z_][\w.-]*|[\d.]+(:[\d.]+)+", text):
        raise SettingError(f"{whole}: {text!r} is neither a number nor a name")
    return text


def grid_points(
    pipeline: Any,
    items: Sequence[Item],
    settings: dict[str, Any],
    sampler: str | None,
    grid: dict[str, list[Any]],
) -> list[tuple[dict[str, Any], SampledImages]]:
    """Every combination of the grid's settings, with what it samples. Raises SettingError for one out of bounds."""
    chosen_twice = [name for name in grid if name in settings or (name == "sampler" and sampler)]
    if chosen_twice:
        raise SettingError(f"{chosen_twice[0]} is given both by itself and in --grid: leave one out")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    sets = []
    for point in points:
        chosen = settings | {name: value for name, value in point.items() if name != "sampler"}
        sets.append(SampledImages(pipeline, items, chosen, point.get("sampler", sampler)))
    return list(zip(points, sets, strict=True))


def evaluate_grid(
    points: Sequence[tuple[dict[str, Any], SampledImages]], evaluator: Evaluator, out: Path
) -> Iterator[tuple[dict[str, Any], Report | None]]:
    """Evaluate every point of a grid, and after each one write curve.csv, curve.json and curve.png in `out`.

    The other processes of torchrun yield None.
    """
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    for point, images in points:
        report = evaluator.run(images)
        if report is not None:
            rows.append(point | report.metrics)
            reports.append({"point": point, **json.loads(report.to_json())})
            _write(out, list(point), rows, reports)
        yield point, report


def _write(out: Path, axes: list[str], rows: list[dict[str, Any]], reports: list[dict[str, Any]]) -> None:
    with atomic_file(out / "curve.csv") as partial, partial.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    with atomic_file(out / "curve.json") as partial:
        partial.write_text(json.dumps(reports, indent=2) + "\n")
    with atomic_file(out / "curve.png") as partial:
        plot(rows, axes, reports[0]["images"], partial)


def plot(rows: Sequence[dict[str, Any]], axes: Sequence[str], images: dict[str, Any], path: Path) -> None:
    """Each figure against the first setting with several values, against evaluations and against wall clock, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    aside = {*axes, *COSTS}
    figures = [n for n in rows[0] if n not in aside and not n.partition("@")[0].endswith(("_std", "_se"))]
    columns = _columns(rows, axes)
    figure = Figure(figsize=(4.2 * len(columns), 2.9 * len(figures) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(figures):
        for j, column in enumerate(columns):
            panel = figure.add_subplot(len(figures), len(columns), i * len(columns) + j + 1)
            for label, points in _lines(rows, axes, columns[0] if columns[0] in axes else None, column, name):
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=label or None)
            panel.set_xlabel(column.replace("_", " "), fontsize=9)
            panel.set_ylabel(name.replace("_", " "), fontsize=9)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
            if column in COSTS:
                panel.set_xlim(0, 1.15 * max(row[column] for row in rows))
                for row in rows if columns[0] in axes else ():
                    panel.annotate(f" {row[columns[0]]:g}", (row[column], row[name]), fontsize=7)
            if len(panel.lines) > 1 and j == 0:
                panel.legend(fontsize=7)
    figure.suptitle(f"{images['name']}, {images['n']} images a point", fontsize=11)
    figure.savefig(path, dpi=110, format="png")


def _columns(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[str]:
    """What figures are plotted against: a setting that varies, and the costs where they vary or nothing else does."""
    numeric = [a for a in axes if all(isinstance(row[a], (int, float)) for row in rows)]
    varied = [a for a in numeric if len({row[a] for row in rows}) > 1]
    return [*varied[:1], *(cost for cost in COSTS if cost in rows[0])]


def _lines(
    rows: Sequence[dict[str, Any]], axes: Sequence[str], along: str | None, x: str, y: str
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """A line for each combination of the settings that do not vary along it, in the order of the points."""
    others = [axis for axis in axes if axis != along]
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = ", ".join(f"{axis}={row[axis]}" for axis in others)
        groups.setdefault(label, []).append((row[x], row[y]))
    yield from groups.items()
