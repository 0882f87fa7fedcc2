"""From a configuration to a finished model: chooses the task and runs the trainer."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from vgen.files import atomic_file
from vgen.training.config import TrainingConfig
from vgen.training.families import start_from
from vgen.training.trainer import Task, Trainer, checkpoints
from vgen.types import SettingError


def start(config: TrainingConfig, out: Path, resume: bool = False, command: str = "") -> Path:
    """Train what `config` describes in the folder `out`; returns the folder of the finished model.

    Raises SettingError where `out` holds a run already and `resume` is off, or none and it is on.
    """
    if not resume and checkpoints(out):
        raise SettingError(f"{out} holds a run already: continue it with --resume, or choose another --out")
    if resume and not checkpoints(out):
        raise SettingError(f"nothing to resume in {out}: start without --resume")
    # Without GPUs accelerate joins the processes of torchrun only where it is told to use the CPU.
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    with PartialState(cpu=on_cpu).main_process_first():  # the first process caches tokens, the others read them
        task = build_task(config, resume)
    if not resume:
        with atomic_file(out / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    trainer = Trainer(task, config, out, command)
    if resume:
        trainer.resume()
    return trainer.run()


def build_task(config: TrainingConfig, resume: bool = False) -> Task:
    """The task, with a model that begins as the configuration says unless a checkpoint will be loaded into it."""
    task = _task(config)
    if config.init_from and config.kind != "decoder" and not resume:  # a decoder's task needs the model in any case
        start_from(task.model, config.init_from)
    return task


def _task(config: TrainingConfig) -> Task:
    if config.kind == "tokenizer":
        from vgen.training.tokenizers import TokenizerTask

        return TokenizerTask(config)
    if config.kind == "decoder":
        from vgen.training.decoders import DecoderTask

        return DecoderTask(config)
    if config.kind == "classifier":
        from vgen.training.classifiers import ClassifierTask

        return ClassifierTask(config)
    from vgen.training.masked import MaskedTask
    from vgen.training.next_frame import NextFrameTask
    from vgen.training.next_scale import MVARTask, NextScaleTask
    from vgen.training.recurrent import RecurrentTask

    families: dict[str, Any] = {
        "var": NextScaleTask,
        "mvar": MVARTask,
        "masked": MaskedTask,
        "far": NextFrameTask,
        "recurrent": RecurrentTask,
    }
    if config.family not in families:
        raise SettingError(f"unknown generator family {config.family!r}: use one of {', '.join(families)}")
    return families[config.family](config)
