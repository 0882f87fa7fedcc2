"""Drawings of numbers as HTML and SVG: grids of tokens, lines, bars, matrices in colour, tables. Knows no models."""

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from vgen.app.charts import ticks
from vgen.app.parts import picture_html

# Dark to bright, told apart by lightness alone too (viridis).
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")
WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 42
Colour = tuple[int, int, int]


def ramp(share: float) -> Colour:
    """A colour for 0..1, dark to bright."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))  # type: ignore


def ink(colour: Colour) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = colour
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#fff"


def css(colour: Colour) -> str:
    return "rgb({},{},{})".format(*colour)


# ---- grids of tokens


@dataclass(frozen=True)
class Tile:
    """One token: what is said of it, what stands in it, and its colour; None shows what lies below."""

    words: str
    text: str = ""
    colour: Colour | None = None


def token_grid(tiles: Sequence[Tile], side: int, label: str, picked: int, png: bytes | None = None) -> str:
    """Buttons in a square, above a picture where there is one; arrow keys move between them (GRID_JS)."""
    buttons = []
    for index, tile in enumerate(tiles):
        style = "" if tile.colour is None else f"background:{css(tile.colour)};color:{ink(tile.colour)}"
        words = html.escape(tile.words, quote=True)
        buttons.append(
            f'<button type="button" class="vgen-token" data-token="{index}" tabindex="{0 if index == picked else -1}" '
            f'aria-pressed="{str(index == picked).lower()}" title="{words}" aria-label="{words}" style="{style}">'
            f"{html.escape(tile.text)}</button>"
        )
    below = "" if png is None else _picture(png, "")
    return (
        f'<figure class="vgen-tokens"><figcaption>{html.escape(label)}</figcaption><div class="vgen-tokens-box">{below}'
        f'<div class="vgen-tokens-grid" role="group" aria-label="{html.escape(label, quote=True)}" data-side="{side}" '
        f'style="grid-template-columns:repeat({side},1fr)">{"".join(buttons)}</div></div></figure>'
    )


# Clicks and arrow keys within grids; buttons elsewhere in the element say which code they stand for.
GRID_JS = """
let again = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-token], button[data-code]');
  if (!button) return;
  const {token, code} = button.dataset;
  const grids = [...element.querySelectorAll('.vgen-tokens-grid')];
  again = token === undefined ? null : grids.indexOf(button.parentElement);
  trigger('click', {token: token === undefined ? -1 : Number(token), code: code === undefined ? -1 : Number(code)});
});
element.addEventListener('keydown', (event) => {
  const button = event.target.closest('button[data-token]');
  if (!button) return;
  const side = Number(button.parentElement.dataset.side), place = Number(button.dataset.token);
  const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side}[event.key];
  if (by === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  button.parentElement.children[place + by]?.focus();
});
watch('value', () => {
  if (again === null) return;
  const grid = element.querySelectorAll('.vgen-tokens-grid')[again];
  grid?.querySelector('[aria-pressed="true"]')?.focus({preventScroll: true});
});
"""


def scale_legend(low: str, high: str, what: str) -> str:
    """What the colours of a ramp mean."""
    stops = ",".join(css(colour) for colour in RAMP)
    return (
        f'<p class="vgen-keyline"><span>{html.escape(what)}: {html.escape(low)}</span>'
        f'<span class="vgen-ramp" style="background:linear-gradient(90deg,{stops})" aria-hidden="true"></span>'
        f"<span>{html.escape(high)}</span></p>"
    )


def key_legend(entries: Sequence[tuple[Colour, str]]) -> str:
    """What single colours mean."""
    parts = [
        f'<span><i class="vgen-swatch" style="background:{css(colour)}" aria-hidden="true"></i>'
        f"{html.escape(words)}</span>"
        for colour, words in entries
    ]
    return f'<p class="vgen-keyline">{"".join(parts)}</p>'


# ---- charts


@dataclass(frozen=True)
class Line:
    """A curve; `strong` ones are what the others are compared with."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    strong: bool = False


def lines_svg(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves over common axes, told apart by colour and dashes, with a legend below. Values must be finite."""
    xs = ticks(min(min(line.x) for line in lines), max(max(line.x) for line in lines))
    ys = ticks(min(min(line.y) for line in lines), max(max(line.y) for line in lines))

    def across(x: float) -> float:
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>' for y in ys]
    parts += [_label(LEFT - 5, down(y) + 4, f"{y:g}", "end") for y in ys]
    parts += [_label(across(x), HEIGHT - BOTTOM + 16, f"{x:g}", "middle") for x in xs]
    parts += [_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"), _label(4, 13, y_label, "start")]
    entries = []
    for index, line in enumerate(lines):
        colour = css(ramp(0.85 * index / max(len(lines) - 1, 1)))
        dashes = "" if line.strong else DASHES[index % len(DASHES)]
        # Mixed with the text's colour, light ones are seen on white and dark ones on black.
        shade = "currentColor" if line.strong else f"color-mix(in srgb, {colour} 65%, currentColor)"
        style = f"stroke:{shade};stroke-dasharray:{dashes}"
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline points="{points}" style="{style}"><title>{html.escape(line.label)}</title></polyline>')
        sample = f'<svg viewBox="0 0 24 8" aria-hidden="true"><polyline points="0,4 24,4" style="{style}"/></svg>'
        entries.append(f"<span>{sample}{html.escape(line.label)}</span>")
    return _plot(parts, f"{y_label} against {x_label}: {', '.join(line.label for line in lines)}") + (
        f'<p class="vgen-keyline vgen-plot-key">{"".join(entries)}</p>'
    )


def bars_svg(values: Sequence[float], x_label: str, y_label: str) -> str:
    """Bars side by side, each named by its number and height."""
    ys = ticks(0, max(max(values), 1))
    wide = (WIDTH - LEFT - RIGHT) / len(values)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / ys[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>' for y in ys]
    parts += [_label(LEFT - 5, down(y) + 4, f"{y:g}", "end") for y in ys]
    for index, value in enumerate(values):
        if value:
            parts.append(
                f'<rect x="{LEFT + index * wide:.2f}" y="{down(value):.1f}" width="{max(wide * 0.9, 0.5):.2f}" '
                f'height="{down(0) - down(value):.1f}"><title>{index + 1}: {value:g}</title></rect>'
            )
    for place in (0, len(values) - 1):
        parts.append(_label(LEFT + (place + 0.5) * wide, HEIGHT - BOTTOM + 16, str(place + 1), "middle"))
    parts += [_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"), _label(4, 13, y_label, "start")]
    return _plot(parts, f"{y_label} by {x_label}, {len(values)} bars, the highest {max(values):g}")


def _plot(parts: Sequence[str], words: str) -> str:
    told = html.escape(words, quote=True)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="vgen-plot" aria-label="{told}">'
    return f"{head}{''.join(parts)}</svg>"


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


# ---- matrices


def matrix_html(colours: np.ndarray, words: str, down: str, across: str) -> str:
    """A matrix of colours (rows, columns, 3) uint8 as a picture, its axes named."""
    rows, columns = colours.shape[:2]
    cell = max(1, min(18, 720 // max(columns, 1), 540 // max(rows, 1)))
    big = colours.repeat(cell, 0).repeat(cell, 1)
    if cell >= 5:  # room for a line between cells
        big[::cell], big[:, ::cell] = 128, 128
    file = io.BytesIO()
    Image.fromarray(big).save(file, format="PNG")
    picture = _picture(file.getvalue(), words)
    return (
        f'<figure class="vgen-matrix"><figcaption>↓ {html.escape(down)} &nbsp; → {html.escape(across)}</figcaption>'
        f"{picture}</figure>"
    )


def table_html(heads: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> str:
    """A table of plain values."""
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(item))}</td>' for item in row)}</tr>" for row in rows)
    return (
        f'<div class="vgen-wide"><table class="vgen-table vgen-numbers"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# ---- pictures


def png_of(image: Tensor, side: int = 0) -> bytes:
    """An image (3, H, W) uint8 as PNG, enlarged to about `side` pixels without smoothing."""
    zoom = max(1, round(side / max(image.shape[-2:])))
    pixels = image.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def figure_html(image: Tensor, words: str, caption: str = "", side: int = 0) -> str:
    """An image (3, H, W) uint8 with a caption; `words` are its alternative text."""
    picture = _picture(png_of(image, side), words)
    return f'<figure class="vgen-figure">{picture}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _picture(png: bytes, words: str) -> str:
    """Pictures of which a page has several: without an id."""
    return picture_html(png, words, "").replace(' id=""', "")


def figures_html(figures: Sequence[str]) -> str:
    """Pictures side by side."""
    return f'<div class="vgen-figures">{"".join(figures)}</div>'


def number(value: float, digits: int = 3) -> str:
    """A number as people write it; "none" where there is none."""
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "infinite"
    return f"{value:.{digits}g}"


def per_cent(share: float) -> str:
    """A share in per cent, small ones with the digits they need."""
    if math.isnan(share):
        return "none"
    return f"{100 * share:.1f}%" if share >= 0.001 or share == 0 else f"{100 * share:.1g}%"
