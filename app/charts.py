"""Small charts as SVG, drawn with the page's own colours: points with labels, a line between them, and marks."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 24, 46
MARKS = {"best": "best", "cheapest": "cheapest within 5% of the best"}


@dataclass(frozen=True)
class Dot:
    """A point of a chart."""

    x: float
    y: float
    label: str
    marks: tuple[str, ...] = ()  # of MARKS


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers that span low..high."""
    if not high > low:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(
    dots: Sequence[Dot],
    x_label: str,
    y_label: str,
    *,
    line: bool = True,
    names: Sequence[str] | None = None,
    level: tuple[float, str] | None = None,
    zero: bool = False,
    per_cent: bool = False,
) -> str:
    """Points over axes.

    Args:
        line: whether to join them, in the order given.
        names: of x = 0, 1, ..., where the axis has names instead of numbers.
        level: a height to compare with, and what it is.
        zero: whether the x axis begins at 0.
        per_cent: whether y is a share.
    """
    heights = [dot.y for dot in dots] + ([level[0]] if level else [])
    widths = [dot.x for dot in dots] + ([0.0] if zero else [])
    xs = [float(i) for i in range(len(names))] if names else ticks(min(widths), max(widths))
    ys = ticks(min(heights), max(heights))
    span = (-0.5, len(names) - 0.5) if names else (xs[0], xs[-1])

    def across(x: float) -> float:
        return LEFT + (x - span[0]) / (span[1] - span[0] or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    parts = _axes(xs, ys, across, down, names, per_cent)
    if level:
        parts.append(
            f'<line class="vgen-level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(level[0]):.1f}"'
            f' y2="{down(level[0]):.1f}"/>'
        )
        parts.append(_text(WIDTH - RIGHT, down(level[0]) - 4, level[1], "end"))
    if line and len(dots) > 1:
        parts.append(f'<polyline points="{" ".join(f"{across(d.x):.1f},{down(d.y):.1f}" for d in dots)}"/>')
    parts += [_dot(dot, across(dot.x), down(dot.y), not (names or line)) for dot in dots]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    parts.append(_text(8, 13, y_label, "start"))
    words = f"{y_label} against {x_label}: " + "; ".join(_words(dot, per_cent, line, names) for dot in dots)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="vgen-chart" aria-label="{html.escape(words)}">'
        f"{''.join(parts)}</svg>"
    )


def legend() -> str:
    """What the marks mean."""
    return (
        '<p class="vgen-legend"><svg viewBox="-9 -9 18 18" aria-hidden="true" class="vgen-chart vgen-key">'
        f"{_shape('best', 0, 0)}</svg> {MARKS['best']} "
        '<svg viewBox="-9 -9 18 18" aria-hidden="true" class="vgen-chart vgen-key">'
        f'{_shape("cheapest", 0, 0)}<circle class="vgen-dot" r="3.5"/></svg> {MARKS["cheapest"]}</p>'
    )


def _axes(
    xs: Sequence[float],
    ys: Sequence[float],
    across: Callable[[float], float],
    down: Callable[[float], float],
    names: Sequence[str] | None,
    per_cent: bool,
) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for y in ys:
        parts.append(
            f'<line class="vgen-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        )
        parts.append(_text(LEFT - 6, down(y) + 4, f"{100 * y:g}%" if per_cent else f"{y:g}", "end"))
    for i, x in enumerate(xs):
        parts.append(_text(across(x), bottom + 16, names[i][:16] if names else f"{x:g}", "middle"))
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _dot(dot: Dot, x: float, y: float, labelled: bool) -> str:
    text = _text(x + 11, y - 7, dot.label, "start") if labelled else ""
    shapes = "".join(_shape(mark, x, y) for mark in dot.marks)
    return f'{shapes}<circle class="vgen-dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>{text}'


def _shape(mark: str, x: float, y: float) -> str:
    if mark == "cheapest":
        return f'<rect class="vgen-mark" x="{x - 7:.1f}" y="{y - 7:.1f}" width="14" height="14"/>'
    points = []
    for i in range(10):
        radius, angle = (9 if i % 2 == 0 else 4), math.pi * (i / 5 - 0.5)
        points.append(f"{x + radius * math.cos(angle):.1f},{y + radius * math.sin(angle):.1f}")
    return f'<polygon class="vgen-mark" points="{" ".join(points)}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _words(dot: Dot, per_cent: bool, line: bool, names: Sequence[str] | None) -> str:
    value = f"{100 * dot.y:.1f}%" if per_cent else f"{dot.y:.4g}"
    where = dot.label if names or line else f"{dot.label} ({dot.x:.3g})"
    marked = f" ({' and '.join(MARKS[mark] for mark in dot.marks)})" if dot.marks else ""
    return f"{where}: {value}{marked}"
