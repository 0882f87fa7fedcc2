"""The part of `benchmark.py` on bundled models of one kind: sampling and training, turn by turn in one process.

Imported by `benchmark.py`, whose `zoo` command prints the table.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

BATCHES = (1, 16)  # of sampling; training takes the preset's


def run_zoo(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By model: seconds per image of each batch size, images per second of a training step, and parameters; medians
    over turns. job: models, threads, repeats."""
    import torch
    from benchmark import by_turns

    torch.set_num_threads(job["threads"])
    works = {name: _works(name) for name in job["models"]}
    rows: dict[str, dict[str, float]] = {name: {} for name in works}
    for kind in next(iter(works.values())):
        found = by_turns({name: works[name][kind][0] for name in works}, job["repeats"], "cpu")
        for name, taken in found.items():
            rows[name][kind] = median(taken) / works[name][kind][1]
    return rows


def _works(name: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many images it is for."""
    from benchmark_training import step_of

    import vgen
    from vgen.training.config import load_config

    pipeline, config = vgen.load(name, device="cpu"), load_config(name)
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for batch in BATCHES:
        labels = [i % 10 for i in range(batch)]
        found[f"batch {batch}"] = (_sampling(pipeline, labels), batch)
    found["training"] = (step_of(name, name), config.batch_size)
    return found


def _sampling(pipeline: Any, labels: list[int]) -> Callable[[], Any]:
    return lambda: pipeline(class_labels=labels, seeds=list(range(len(labels))))
