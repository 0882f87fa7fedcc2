"""Training steps of the presets that bundled models came from, as the trainer takes them.

Imported by `benchmark.py` and `compare_families.py`: models whose cards were written on different machines have their
training compared by the seconds of a step on one.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from train_zoo import chain, finished_by

from vgen.hub import ZOO, component_folders
from vgen.training.config import load_config

TOGETHER = 12  # steps that are timed as one: some have a penalty, or go deeper than others


def presets_of(model: str) -> dict[str, list[str]]:
    """Those behind a bundled model's "generator" and behind its "tokenizer", in the order of training."""
    parts = {"generator": (model, ("generator",)), "tokenizer": (_owner(model), ("tokenizer", "decoder"))}
    return {
        part: [preset for preset in chain(finished_by(of)) if load_config(preset).kind in kinds]
        for part, (of, kinds) in parts.items()
    }


def step_of(model: str, preset: str, data_root: str | None = None) -> Callable[[], Any]:
    """What takes the next training step of a preset behind `model`. Its data must be there; no earlier run need be."""
    from vgen.training.run import build_task
    from vgen.training.trainer import Trainer

    config = load_config(preset)
    changes: dict[str, Any] = {"data_root": data_root, "classifier": None}
    if config.kind == "generator":
        changes["tokenizer"] = str(ZOO / _owner(model))
    if config.init_from:
        changes["init_from"] = str(ZOO / (_owner(model) if config.kind == "decoder" else model))
    if config.kind == "decoder":
        changes |= {"samples": 100, "adversarial_start": 0.0}  # it has started for most of the run
    config = dataclasses.replace(config, **changes)
    folder = tempfile.TemporaryDirectory(prefix="vgen-steps-")
    steps = Trainer(build_task(config), config, Path(folder.name), "").steps()

    def step(folder: Any = folder) -> Any:  # the folder lives as long as the step
        return next(steps)

    return step


def _owner(model: str) -> str:
    """The bundled model that has the tokenizer of one."""
    return component_folders(ZOO / model)["tokenizer"].parent.name


def seconds_per_step(models: list[str], repeats: int, data_root: str | None = None) -> dict[str, float]:
    """Mean seconds of a training step of every preset behind the models, turn by turn in this process."""
    from benchmark import by_turns

    of = {preset: model for model in models for part in presets_of(model).values() for preset in part}
    steps = {}
    for preset, model in of.items():
        print(f"{preset}: preparing its training", file=sys.stderr)
        steps[preset] = step_of(model, preset, data_root)

    def work(preset: str) -> Callable[[], Any]:
        return lambda: [steps[preset]() for _ in range(TOGETHER)]

    taken = by_turns({preset: work(preset) for preset in steps}, repeats, "cpu")
    return {preset: mean(seconds) / TOGETHER for preset, seconds in taken.items()}
