"""Quality against time of every masked sampler, with and without ReCAP: `python scripts/masked_curves.py`.

Samples a model at many settings, judges them by the small classifier (class accuracy, Fréchet distance of its
features), and writes a table (Markdown, JSON) and a plot. Points already in the JSON file are not measured again.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vgen import hub
from vgen.data import open_source
from vgen.evaluation.quick import QuickJudge
from vgen.files import atomic_file

STEPS: dict[str, tuple[int | None, ...]] = {
    "maskgit": (4, 8, 12, 16),
    "halton": (4, 8, 16),
    "random": (4, 8, 16),
    "first-hitting": (8, 16, None),
    "ancestral": (8, 16, 64),
    "ancestral-categorical": (64,),
}
TICKS = (20, 50, 100, 200, 500)
COLOURS = dict(zip(STEPS, ("tab:red", "tab:orange", "tab:green", "tab:blue", "tab:purple", "tab:gray"), strict=True))


class Timed:
    """A pipeline that adds up what sampling costs, without what judging does."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.null_class = pipeline, pipeline.null_class
        self.cpu_seconds, self.evaluations, self.images = 0.0, 0, 0

    def __call__(self, **arguments: Any) -> Any:
        began = time.process_time()
        output = self.pipeline(**arguments)
        self.cpu_seconds += time.process_time() - began
        self.evaluations += output.evaluations * len(output.images)
        self.images += len(output.images)
        return output


def points() -> list[dict[str, Any]]:
    """All that is measured, cheap points first."""
    found = [
        {"sampler": sampler, "steps": steps, "partial_steps": partial}
        for sampler, choices in STEPS.items()
        for steps, partial in itertools.product(choices, (0, 1))
    ]
    return sorted(found, key=lambda point: point["steps"] or 49)


def main(
    model: Annotated[str, typer.Option(help="A masked model.")] = "fashion-maskgit",
    number: Annotated[int, typer.Option(help="Samples per point.")] = 500,
    guidance_scale: Annotated[float, typer.Option(help="1 is off.")] = 3.0,
    only: Annotated[str, typer.Option(help="Measure these samplers alone, separated by commas.")] = "",
    data_root: Annotated[str | None, typer.Option(help="Where Fashion-MNIST lies.")] = None,
    out: Annotated[Path, typer.Option(help="Table; its .md and .png are written beside it.")] = Path(
        "docs/results/masked-curves.json"
    ),
) -> None:
    """Measure all points that are not in the table yet."""
    torch.set_num_threads(1)
    pipeline = hub.load(model, device="cpu")
    judge = QuickJudge("fashion-classifier", open_source("fashion-mnist", "test", 28, 1, data_root))
    shared = {"model": model, "checkpoint": pipeline.checkpoint(), "number": number, "guidance_scale": guidance_scale}
    found = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in found if row["model"] != model or row["checkpoint"] == shared["checkpoint"]]
    for point in points():
        if only and point["sampler"] not in only.split(","):
            continue
        if any((shared | point).items() <= row.items() for row in rows):
            continue
        timed = Timed(pipeline)
        figures = judge(timed, number, guidance_scale=guidance_scale, **point)
        cost = {
            "evaluations": timed.evaluations / timed.images,
            "cpu_ms_per_image": 1000 * timed.cpu_seconds / timed.images,
        }
        rows.append(shared | point | cost | figures)
        with atomic_file(out) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n")
        print(rows[-1])
    rows = [row for row in rows if shared.items() <= row.items()]
    with atomic_file(out.with_suffix(".md")) as partial:
        partial.write_text(table(rows))
    with atomic_file(out.with_suffix(".png")) as partial:
        plot(rows, partial)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in the order of STEPS."""
    lines = [
        "| sampler | steps | ReCAP | evaluations | CPU ms/image | class accuracy | classifier Fréchet |",
        "|---|---|---|---|---|---|---|",
    ]
    names = list(STEPS)
    for row in sorted(rows, key=lambda row: (names.index(row["sampler"]), row["steps"] or 49, row["partial_steps"])):
        cells = [
            row["sampler"],
            row["steps"] or "one per token",
            "u = 1" if row["partial_steps"] else "-",
            f"{row['evaluations']:.1f}",
            f"{row['cpu_ms_per_image']:.0f}",
            f"{row['class_accuracy']:.1%}",
            f"{row['classifier_frechet']:.3f}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both figures against CPU time: whole evaluations solid, ReCAP dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, label) in enumerate(
        (("classifier_frechet", "classifier Fréchet distance (lower is better)"), ("class_accuracy", "class accuracy"))
    ):
        axes: Any = figure.add_subplot(1, 2, i + 1)
        for sampler, recap in itertools.product(STEPS, (0, 1)):
            chosen = [row for row in rows if row["sampler"] == sampler and row["partial_steps"] == recap]
            chosen.sort(key=lambda row: row["cpu_ms_per_image"])
            axes.plot(
                [row["cpu_ms_per_image"] for row in chosen],
                [row[name] for row in chosen],
                color=COLOURS[sampler],
                linestyle="--" if recap else "-",
                marker="s" if recap else "o",
                markersize=4,
                label=f"{sampler}{' + ReCAP' if recap else ''}",
            )
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.minorticks_off()
        axes.set_xlabel("CPU milliseconds per image (one core, batch 100)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['number']} samples a point, guidance {rows[0]['guidance_scale']:g}")
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    typer.run(main)
