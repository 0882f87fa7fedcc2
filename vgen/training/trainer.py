"""The training loop shared by tokenizers and generators, on accelerate.

A step depends on the configuration and its number alone, so a resumed run repeats an unbroken one bit for bit on the
CPU. Knows nothing of what is trained: that is a Task.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vgen.files import atomic_file, atomic_folder
from vgen.media import save_png
from vgen.progress import progress
from vgen.training.card import model_card
from vgen.training.config import TrainingConfig
from vgen.training.curves import plot_curves
from vgen.training.optimizers import build_optimizers
from vgen.training.precision import autocast_type, usual_device
from vgen.types import CheckpointError, SettingError


class Interrupted(Exception):
    """Training was asked to stop (SIGTERM or Ctrl-C) and has saved a checkpoint."""


class Diverged(RuntimeError):
    """The loss or a gradient stopped being a number; the last good state was saved."""


class Companion(Protocol):
    """What learns beside the model, by its own means, and belongs into a checkpoint."""

    def to(self, device: torch.device) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """What the trainer asks of the thing it trains. It may also have `companions`, a sequence of Companion."""

    model: ModelMixin
    num_examples: int  # 0: endless, numbered through the whole run

    def batch(self, indices: np.ndarray, seed: int) -> Any:
        """Examples by index, as a tuple of CPU tensors; `seed` is for augmentation."""
        ...

    def loss(self, model: nn.Module, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over a batch, and figures to log."""
        ...

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Called after optimizer step number `step` (from 1) with the unwrapped model up to date."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out figures of `model`."""
        ...

    def picture(self) -> Image.Image:
        """A sheet of samples or reconstructions of `model`."""
        ...

    def export(self, folder: Path, card: str) -> None:
        """Write the finished `model` with its card into an empty folder, in half precision."""
        ...


class StepBatches(Dataset):
    """Item i is this process's part of micro-batch i of the run, from an endless stream of shuffled epochs."""

    def __init__(self, task: Task, config: TrainingConfig, rank: int, world: int) -> None:
        self.task, self.config, self.rank, self.world = task, config, rank, world
        self.size = config.batch_size // config.accumulation
        if self.size % world:
            raise SettingError(
                f"batch_size / accumulation = {self.size} cannot be shared by {world} processes: make it a multiple"
            )
        self.permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.config.steps * self.config.accumulation

    def __getitem__(self, item: int) -> Any:
        positions = item * self.size + np.arange(self.size)[self.rank :: self.world]
        number = self.task.num_examples
        indices = np.array([self._epoch(int(p) // number)[int(p) % number] for p in positions]) if number else positions
        return self.task.batch(indices, seed=_mix(self.config.seed, item * self.world + self.rank))

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self.permutations:
            self.permutations = {epoch: epoch_order(self.task.num_examples, self.config.seed, epoch)}
        return self.permutations[epoch]


def epoch_order(number: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch takes `number` examples, (N,)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(number)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints of the run in a folder, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


class Trainer:
    """One run in one folder: checkpoints/, samples/, metrics.jsonl, curves.png and, at the end, model/."""

    def __init__(self, task: Task, config: TrainingConfig, out: Path, command: str) -> None:
        self.task, self.config, self.out, self.command = task, config, out, command
        AcceleratorState._reset_state()  # or a second run in one process must have the first one's precision
        # A tokenizer of few scales leaves some of its residual convolutions without a gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=config.kind == "tokenizer")
        self.accelerator = Accelerator(
            kwargs_handlers=[unused],
            mixed_precision=autocast_type(config.precision, usual_device()),
            gradient_accumulation_steps=config.accumulation,
            log_with="tensorboard",
            project_dir=out,
        )
        set_seed(_mix(config.seed, self.accelerator.process_index))
        self.step = 0
        self.seconds = 0.0  # wall clock, over all sessions of this run
        self.cpu_seconds = 0.0  # of this process
        optimizers = build_optimizers(task.model, config)
        self.model, *self.optimizers = self.accelerator.prepare(task.model, *optimizers)
        self.schedulers = [
            get_scheduler(
                config.schedule,
                optimizer.optimizer,
                num_warmup_steps=config.warmup,
                num_training_steps=config.steps,
            )
            for optimizer in self.optimizers
        ]
        self.ema = EMAModel(task.model.parameters(), decay=config.ema)
        self.ema.to(self.accelerator.device)
        companions: Sequence[Companion] = getattr(task, "companions", ())
        for companion in companions:
            companion.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self, self.ema, *self.schedulers, *companions)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]

    def save(self) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep`."""
        folder = self.out / "checkpoints" / f"step-{self.step:08}"
        if self.accelerator.num_processes == 1:
            with atomic_folder(folder) as partial:
                self.accelerator.save_state(str(partial))
        else:
            partial = folder.with_name(f".{folder.name}.tmp")
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                partial.replace(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for old in checkpoints(self.out)[: -self.config.keep]:
                shutil.rmtree(old)

    def resume(self) -> None:
        """Continue from the newest checkpoint, which must exist. Raises CheckpointError where it is damaged."""
        newest = checkpoints(self.out)[-1]
        try:
            self.accelerator.load_state(str(newest))
        except (RuntimeError, ValueError, EOFError, KeyError, OSError, SafetensorError, UnpicklingError) as error:
            raise CheckpointError(
                f"{newest} is damaged or of another model: remove it to resume from the one before, or start anew"
            ) from error
        metrics = self.out / "metrics.jsonl"
        if metrics.exists() and self.accelerator.is_main_process:
            kept = [line for line in _whole_lines(metrics) if line["step"] <= self.step]
            with atomic_file(metrics) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights and in evaluation mode, for the length of the block."""
        parameters = list(self.task.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.task.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ema.restore(parameters)
            self.task.model.train()

    # ---- loop

    def run(self) -> Path:
        """Train to the end and export; returns the folder of the finished model.

        Raises Interrupted after a SIGTERM or Ctrl-C, Diverged when the loss stops being a number; both save first.
        """
        self.accelerator.init_trackers("tensorboard")
        config, main = self.config, self.accelerator.is_main_process
        steps = self.steps()
        with (
            _stop_requests() as stopped,
            progress(config.steps, f"train {config.name}", "steps", self.step, lines=200) as shown,
        ):
            while self.step < config.steps:
                began, cpu = time.monotonic(), time.process_time()
                figures = next(steps)
                self.seconds += time.monotonic() - began
                self.cpu_seconds += time.process_time() - cpu
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    self._log({name: float(value) for name, value in figures.items()})
                if self.step % config.eval_every == 0 or last:
                    with self.averaged():
                        self._log(self.task.evaluate())
                if main and (self.step % config.sample_every == 0 or last):
                    self._draw()
                stop = self._any_process(bool(stopped))
                if self.step % config.save_every == 0 or last or stop:
                    self.save()
                shown.advance(note=f"loss {float(figures['loss']):.4f}")
                if stop and not last:
                    raise Interrupted(f"stopped after step {self.step}; continue with --resume")
        folder = self._export()
        self.accelerator.end_training()
        return folder

    def steps(self) -> Iterator[dict[str, Tensor]]:
        """Takes the optimizer steps from where the run stands to its end, and no more; yields each one's figures."""
        loader = iter(self._loader())
        self.task.model.train()
        while self.step < self.config.steps:
            figures = self._one_step(loader)
            self.step += 1
            yield figures

    def _any_process(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def _loader(self) -> DataLoader:
        world = self.accelerator.num_processes
        batches = StepBatches(self.task, self.config, self.accelerator.process_index, world)
        order = range(self.step * self.config.accumulation, len(batches))
        workers = self.config.workers
        return DataLoader(
            batches,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or it would draw from the global stream, which a checkpoint restores
        )

    def _one_step(self, loader: Iterator[Any]) -> dict[str, Tensor]:
        config, device = self.config, self.accelerator.device
        rng = torch.Generator().manual_seed(_mix(config.seed, 1, self.step, self.accelerator.process_index))
        figures: dict[str, Tensor] = {}
        for _ in range(config.accumulation):
            batch = tuple(item.to(device, non_blocking=True) for item in next(loader))
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, extra = self.task.loss(self.model, batch, rng)
                self.accelerator.backward(loss)
                for name, value in {"loss": loss, **extra}.items():
                    share = value.detach().float() / config.accumulation
                    figures[name] = figures[name] + share if name in figures else share
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        figures["gradient"] = torch.as_tensor(norm)
        scaled = self.accelerator.scaler is not None  # float16's scaler skips bad steps by itself
        if not math.isfinite(figures["loss"]) or not (scaled or math.isfinite(figures["gradient"])):
            self._diverged(figures)
        figures["lr"] = torch.tensor(self.schedulers[0].get_last_lr()[0])
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        self.task.after_step(self.step + 1, rng)
        self.ema.step(self.task.model.parameters())
        return figures

    def _diverged(self, figures: dict[str, Tensor]) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # this step was never applied: what is saved is the last good state
        found = f"step {self.step + 1}: loss {float(figures['loss'])}, gradient norm {float(figures['gradient'])}; "
        if not self.step:
            raise Diverged(f"{found}there is no state to keep: start with a lower --set lr= or look at the data")
        self.save()
        kept = f"the state after step {self.step} is kept in {self.out / 'checkpoints'}"
        raise Diverged(f"{found}{kept}: resume with a lower --set lr=")

    # ---- what people look at

    def _log(self, figures: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(figures, step=self.step)
        line = {
            "step": self.step,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
        }
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line | figures) + "\n")

    def _draw(self) -> None:
        with self.averaged():
            sheet = self.task.picture()
        path = self.out / "samples" / f"step-{self.step:08}.png"
        save_png(sheet, path)
        with atomic_file(self.out / "curves.png") as partial:
            plot_curves(_whole_lines(self.out / "metrics.jsonl"), self.config.name, partial)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(sheet.convert("RGB"))
                tracker.writer.add_image("samples", pixels, self.step, dataformats="HWC")

    def _export(self) -> Path:
        folder = self.out / "model"
        if self.accelerator.is_main_process:
            figures: dict[str, float] = {}
            for line in _whole_lines(self.out / "metrics.jsonl"):
                figures |= line  # the last value of each
            times = self.seconds, self.cpu_seconds
            card = model_card(self.config, self.task.model, figures, times, self.command)
            with self.averaged(), atomic_folder(folder) as partial:
                self.task.export(partial, card)
        self.accelerator.wait_for_everyone()
        return folder


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that becomes non-empty when SIGTERM or SIGINT arrives."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    try:
        previous = [signal.signal(number, note) for number in numbers]
    except ValueError:  # not in the main thread: nobody can signal us
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _whole_lines(path: Path) -> list[dict[str, float]]:
    """The JSON lines of a file, but for a last one that was cut short."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
