"""A grid of two settings: their values, a run for every cell, and the cells as a table and as one picture.

Knows no Gradio.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vgen.app.core import Studio
from vgen.app.forms import MAX_TEXT, Ask
from vgen.app.measured import Comparison, Measured, names_below, write_table
from vgen.app.race import parse_entrant
from vgen.app.recording import sheet
from vgen.evaluation.curves import parse_grid
from vgen.media import save_png
from vgen.types import SettingError

MAX_CELLS = 64
NONE = "off"  # the name of an axis that is left out
CELL = 512  # pixels a side of a cell in the assembled picture, at most; a video's are twice as wide
FONT, MARGIN = 18, 8  # of its labels
SUGGESTED = {
    "guidance_scale": "1, 2, 4",
    "temperature": "0.5, 0.8, 1",
    "top_k": "0, 10, 100",
    "top_p": "0.5, 0.8, 1",
    "steps": "4, 8, 12",
    "seed": "0, 1, 2",
    "guidance_schedule": "constant, linear, 0:1:0",
}


@dataclass(frozen=True)
class Axis:
    """A setting and its values; `shown` are their names."""

    name: str
    values: list[Any]
    shown: list[str]


@dataclass(eq=False, kw_only=True)
class Grid(Comparison):
    """The runs of all cells, row by row."""

    columns: Axis
    rows: Axis

    def cell(self, row: int, column: int) -> Measured:
        return self.runs[row * len(self.columns.values) + column]


def axis_names(pipeline: Any) -> list[str]:
    """What may be along an axis."""
    kinds = ["seed"] + ["class"] * bool(pipeline.null_class) + ["sampler"] * (len(pipeline.samplers) > 1)
    return [*kinds, *pipeline.resolve_settings({})]


def suggest_values(pipeline: Any, name: str) -> str:
    """Values to begin with."""
    if name == "sampler":
        return ", ".join(pipeline.samplers)
    if name == "class":
        return ", ".join(str(index) for index in range(min(4, pipeline.null_class)))
    default = pipeline.resolve_settings({}).get(name)
    if isinstance(default, bool):
        return "false, true"
    return SUGGESTED.get(name, "" if default is None else str(default))


def parse_axes(pipeline: Any, columns: Sequence[str], rows: Sequence[str]) -> tuple[Axis, Axis]:
    """Two axes from their names and values, the second of which may be off. Raises SettingError."""
    wanted = [(name, text) for name, text in (columns, rows) if name and name != NONE]
    known = axis_names(pipeline)
    for name, text in wanted:
        if name not in known:
            raise SettingError(f"{str(name)[:60]!r} cannot be along an axis: use one of {', '.join(known)}")
        if len(text) > MAX_TEXT:
            raise SettingError(f"the values of {name} have {len(text)} characters, the limit is {MAX_TEXT}")
    if not wanted:
        raise SettingError("both axes are off: choose a setting for one")
    found = parse_grid([f"{name}={text}" for name, text in wanted if name != "class"], "axis")
    if len({name for name, _ in wanted}) < len(wanted):
        raise SettingError(f"both axes are {wanted[0][0]}: choose another setting for one")
    axes = []
    for name, text in wanted:
        values = _classes(pipeline, text) if name == "class" else found[name]
        shown = [pipeline.class_names[value] for value in values] if name == "class" else [str(v) for v in values]
        axes.append(Axis(name, values, shown))
    return axes[0], (axes[1] if len(axes) > 1 else Axis(NONE, [None], [""]))


def _classes(pipeline: Any, text: str) -> list[int]:
    labels = [part.strip() for part in text.split(",") if part.strip()]
    if not labels:
        raise SettingError("the class axis has no values: write ids or names, as 0, 3")
    return list(dict.fromkeys(pipeline.label_ids(labels)))


def cells(studio: Studio, base: Ask, fixed: str, columns: Sequence[str], rows: Sequence[str]) -> Grid:
    """A grid of runs. `fixed` is a sampler and settings for all of them, in a race's words; an axis is a name and
    values by commas. Raises SettingError, naming the cell."""
    across, down = parse_axes(studio.models.get(base.model), columns, rows)
    number = len(across.values) * len(down.values)
    if number > MAX_CELLS:
        raise SettingError(
            f"{len(across.values)} x {len(down.values)} values make {number} cells, the limit is {MAX_CELLS}: "
            "take fewer values"
        )
    sampler, settings = parse_entrant(fixed)
    base = replace(base, sampler=sampler, settings=settings)
    for axis in (across, down):
        if axis.name in settings or (axis.name == "sampler" and sampler):
            raise SettingError(f"{axis.name} is along an axis and among the settings for all cells: leave one out")
    runs = []
    for y, below in zip(down.shown, down.values, strict=True):
        for x, along in zip(across.shown, across.values, strict=True):
            label = ", ".join(f"{name} {shown}" for name, shown in ((across.name, x), (down.name, y)) if shown)
            point = {axis.name: value for axis, value in ((across, along), (down, below)) if axis.name != NONE}
            try:
                runs.append(Measured(label, studio.request(_at(base, point))))
            except SettingError as error:
                raise SettingError(f"cell {label[:80]}: {error}") from error
    return Grid(base.model, runs, columns=across, rows=down)


def _at(base: Ask, point: dict[str, Any]) -> Ask:
    """What a cell asks for."""
    settings = dict(point)
    label = settings.pop("class", None)
    changes: dict[str, Any] = {} if label is None else {"classes": [label]}
    changes |= {name: settings.pop(name) for name in ("seed", "sampler") if name in settings}
    return replace(base, **changes, settings={**base.settings, **settings})


# ---- files


def summarise(grid: Comparison, folder: Path) -> Sequence[Path]:
    """The finished cells as a table, and as one picture with its labels beside the pixels."""
    assert isinstance(grid, Grid)
    rows = []
    width = len(grid.columns.values)
    for index, run in enumerate(grid.runs):
        if run.state == "done":
            row, column = divmod(index, width)
            values = {axis.name: axis.shown[i] for axis, i in ((grid.columns, column), (grid.rows, row))}
            values.pop(NONE, None)
            cost = {"evaluations": run.evaluations, "milliseconds": round(run.milliseconds, 3)}
            rows.append(values | cost | {"files": names_below(run.files, folder)})
    save_png(assemble(grid), picture := folder / "grid.png")
    return [write_table(rows, folder / "grid.csv"), picture]


def assemble(grid: Grid) -> Image.Image:
    """All cells in one picture, blank where they are not finished, with the values above and to the left."""
    tiles = [_tile(run) for run in grid.runs]
    width, height = (max(tile.size[side] for tile in tiles if tile is not None) for side in (0, 1))
    font = ImageFont.load_default(FONT)
    above, beside = ([_label(axis, shown) for shown in axis.shown] for axis in (grid.columns, grid.rows))
    left = MARGIN + max((round(font.getlength(text)) + MARGIN for text in beside if text), default=0)
    top = FONT + 2 * MARGIN
    width = max([width, *(round(font.getlength(text)) for text in above)])
    columns = len(grid.columns.values)
    size = (left + columns * (width + MARGIN), top + len(grid.rows.values) * (height + MARGIN))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, text in enumerate(above):
        draw.text((left + column * (width + MARGIN), MARGIN), text, "black", font)
    for row, text in enumerate(beside):
        draw.text((MARGIN, top + row * (height + MARGIN)), text, "black", font)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        if tile is not None:
            picture.paste(tile, (left + column * (width + MARGIN), top + row * (height + MARGIN)))
    return picture


def _label(axis: Axis, shown: str) -> str:
    return "" if axis.name == NONE else f"{axis.name} {shown}"


def _tile(run: Measured) -> Image.Image | None:
    """A finished cell's samples in one picture, made smaller where they are large: the files are exact."""
    if run.state != "done" or run.newest is None:
        return None
    pixels = run.newest.pixels(-1)
    tile = sheet(pixels)
    tile.thumbnail((CELL if pixels.ndim == 4 else 2 * CELL, 2 * CELL), Image.Resampling.LANCZOS)
    return tile
