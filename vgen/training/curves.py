"""Loss curves of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

BOOKKEEPING = {"step", "seconds", "cpu_seconds", "gradient", "lr"}  # logged, but no measure of a model


def plot_curves(lines: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """One panel per logged figure against the step, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for line in lines for name in line} - BOOKKEEPING)
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, format="png")
