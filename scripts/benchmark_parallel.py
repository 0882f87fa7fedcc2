"""The recurrent part of `benchmark.py`: parallel samplers of a looped generator against one token after the other.

Imported by `benchmark.py`, whose `parallel` command prints the tables and draws the plot.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

BASE, EXIT = "raster", "raster, early exit"
WAYS: dict[str, dict[str, Any]] = {
    BASE: {"sampler": "raster"},
    EXIT: {"sampler": "raster", "exit_threshold": 0.03},
    "wave-exact, r' = 1": {"sampler": "wave-exact", "inner_recurrences": 1},
    "wave-exact, r' = 2": {"sampler": "wave-exact", "inner_recurrences": 2},
    "wave-exact, r' = 4": {"sampler": "wave-exact", "inner_recurrences": 4},
    "jacobi, window 8": {"sampler": "jacobi", "wavefront": 8},
    "wave-df, r' = 1": {"sampler": "wave-df", "inner_recurrences": 1},
    "wave-df, r' = 2": {"sampler": "wave-df", "inner_recurrences": 2},
    "zipar, lead 3": {"sampler": "zipar", "row_lead": 3},
}


def run_times(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds per image of each way, turn by turn, and the medians over turns of how many times faster it is than both
    kinds of raster; job: model, batch, threads, repeats, device."""
    import torch
    from benchmark import by_turns

    import vgen

    torch.set_num_threads(job["threads"])
    pipeline = vgen.load(job["model"], device=job["device"])
    labels = [i % pipeline.null_class for i in range(job["batch"])]

    def work(settings: dict[str, Any]) -> Callable[[], Any]:
        # Tokens alone: decoding them costs the same whoever made them.
        return lambda: list(pipeline.stream(labels, seeds=list(range(len(labels))), **settings))

    times = by_turns({name: work(settings) for name, settings in WAYS.items()}, job["repeats"], job["device"])
    return {
        name: {
            "seconds": median(found) / job["batch"],
            "faster": median(base / ours for base, ours in zip(times[BASE], found, strict=True)),
            "faster than early exit": median(base / ours for base, ours in zip(times[EXIT], found, strict=True)),
        }
        for name, found in times.items()
    }


def run_counts(job: dict[str, Any]) -> dict[str, Any]:
    """What each way costs in passes, and how its tokens compare with raster's; job: model, samples, threads, device.

    One image at a time, so that passes are those of an image; float32.
    """
    import torch

    import vgen

    torch.set_num_threads(job["threads"])
    pipeline = vgen.load(job["model"], device=job["device"])
    rows: dict[str, Any] = {}
    wanted: Any = None
    for name, settings in WAYS.items():
        last = []
        for seed in range(job["samples"]):
            *_, step = pipeline.stream([seed % pipeline.null_class], seeds=[seed], **settings)
            last.append(step)
        tokens = torch.cat([step.tokens for step in last])
        if name == BASE:
            wanted = tokens
        equal: Any = tokens == wanted
        first = torch.where(equal.all(1), equal.shape[1], equal.int().argmin(1))
        count = tokens.shape[1]
        rows[name] = {
            "passes": sum(step.wave.passes for step in last) / len(last),
            "tokens per readout": count * len(last) / sum(step.evaluations for step in last),
            "work per token": sum(step.wave.work for step in last) / len(last) / count,
            "restarts": sum(step.wave.restarts for step in last) / len(last),
            "equal tokens": float(equal.float().mean()),
            "equal images": float(equal.all(1).float().mean()),
            "first difference": float(first.float().mean()),
        }
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Times faster than raster, by batch size; a line for each way, a panel for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vgen.files import atomic_file

    threads = sorted({row["threads"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(threads), figsize=(5 * len(threads) + 2.4, 4.2), sharey=True, squeeze=False, constrained_layout=True
    )
    for axes, count in zip(panels[0], threads, strict=True):
        chosen = [row for row in rows if row["threads"] == count]
        sizes = [str(row["batch"]) for row in chosen]
        for name in WAYS:
            style = "k-" if name == BASE else "k--" if name == EXIT else "o-"
            axes.plot(sizes, [row["ways"][name]["faster"] for row in chosen], style, label=name)
        axes.set(xlabel="images at a time", title=f"{count} thread{'s' * (count > 1)}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("times faster than raster")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
