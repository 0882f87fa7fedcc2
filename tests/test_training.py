"""Training: a step depends on (configuration, step) alone, so a resumed run repeats an unbroken one bit for bit."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from tiny import GENERATOR, TOKENIZER, WEIGHTS, generator_config, python, tokenizer_config, write_folder, write_mnist
from torch import Tensor, nn

import vgen
from vgen.data import FASHION, open_source, to_model_range, to_uint8
from vgen.evaluation.classifier import ImageClassifier
from vgen.evaluation.extractors import ExtractorOptions, build_extractor
from vgen.evaluation.metrics import frechet_distance
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.training.config import TrainingConfig, load_config
from vgen.training.muon import Muon
from vgen.training.optimizers import build_optimizers
from vgen.training.run import build_task, start
from vgen.training.trainer import Diverged, Interrupted, StepBatches, Trainer
from vgen.types import SettingError

CLOCKS = {"seconds", "cpu_seconds"}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process; each test is a process of its own to it."""
    forget()
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained tokenizer."""
    forget()
    return start(tokenizer_config(data, steps=40), tmp_path_factory.mktemp("runs") / "vq")


Make = Callable[..., TrainingConfig]


@pytest.fixture(params=["tokenizer", "generator"])
def make(request: pytest.FixtureRequest, data: Path) -> Make:
    """Configurations of both kinds of run."""
    if request.param == "tokenizer":
        return lambda **changes: tokenizer_config(data, **changes)
    folder = request.getfixturevalue("tokenizer")
    return lambda **changes: generator_config(data, folder, **changes)


def trainer_for(config: TrainingConfig, out: Path) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    return Trainer(build_task(config), config, out, command="vgen train")


def run_until(config: TrainingConfig, out: Path, step: int, resume: bool = False) -> None:
    """Train, and be told to stop while step number `step` is being done."""
    trainer = trainer_for(config, out)
    if resume:
        trainer.resume()
    after_step = trainer.task.after_step

    def stop(number: int, rng: torch.Generator) -> None:
        after_step(number, rng)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    trainer.task.after_step = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=f"stopped after step {step}; continue with --resume"):
        trainer.run()


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def checkpoint(out: Path, step: int, random: bool = False) -> dict[str, Any]:
    """All that a checkpoint holds, file by file, without the clocks; `random` includes the global random state."""
    found: dict[str, Any] = {}
    for path in sorted((out / "checkpoints" / f"step-{step:08}").iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif random or not path.name.startswith("random"):
            found[path.name] = torch.load(path, weights_only=False)
    assert found["custom_checkpoint_0.pkl"]["step"] == step
    del found["custom_checkpoint_0.pkl"]
    return found


def same(a: Any, b: Any) -> bool:
    """Bit for bit equality of nested structures."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    found = sorted(folder.rglob("*.safetensors"))
    assert found
    return {f"{path.parent.name}/{name}": tensor for path in found for name, tensor in load_file(path).items()}


# ---- resuming


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_equals_an_unbroken_one(make: Make, tmp_path: Path, accumulation: int, precision: str) -> None:
    config = make(accumulation=accumulation, precision=precision, steps=7)
    start(config, tmp_path / "whole")
    run_until(config, tmp_path / "broken", 2)
    run_until(config, tmp_path / "broken", 5, resume=True)
    start(config, tmp_path / "broken", resume=True)
    assert same(checkpoint(tmp_path / "whole", 7), checkpoint(tmp_path / "broken", 7))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))


def test_a_killed_run_goes_back_to_its_last_checkpoint(make: Make, tmp_path: Path) -> None:
    """No signal, no goodbye: steps after the checkpoint are done again, and logged once."""
    config = make(save_every=2)
    start(config, tmp_path / "whole")
    trainer = trainer_for(config, tmp_path / "killed")
    after_step = trainer.task.after_step

    def kill(number: int, rng: torch.Generator) -> None:
        after_step(number, rng)
        if number == 4:
            raise MemoryError

    trainer.task.after_step = kill  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        trainer.run()
    assert checkpoints(tmp_path / "killed") == ["step-00000002"]
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the line it was writing
    start(config, tmp_path / "killed", resume=True)
    assert same(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "killed", 6))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_stochastic_depth_resumes_too(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """`model.drop_path` draws from torch's global random state, which a checkpoint has to bring back."""
    config = generator_config(data, tokenizer, model=GENERATOR | {"drop_path": 0.5, "init_gate": 1.0}, steps=8)
    start(config, tmp_path / "whole")
    run_until(config, tmp_path / "broken", 3)
    start(config, tmp_path / "broken", resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert same(checkpoint(tmp_path / "whole", 8, random=True), checkpoint(tmp_path / "broken", 8, random=True))


def test_a_finished_run_can_be_resumed_and_exports_again(make: Make, tmp_path: Path) -> None:
    config = make()
    first = weights(start(config, tmp_path / "run"))
    before = metrics(tmp_path / "run")
    assert same(weights(start(config, tmp_path / "run", resume=True)), first)
    assert metrics(tmp_path / "run") == before


def test_a_run_is_never_begun_twice_in_one_folder(make: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nothing to resume in .*without --resume"):
        start(make(), tmp_path / "run", resume=True)
    start(make(steps=1), tmp_path / "run")
    with pytest.raises(SettingError, match=r"holds a run already: continue it with --resume"):
        start(make(), tmp_path / "run")


def test_the_last_checkpoints_are_kept(make: Make, tmp_path: Path) -> None:
    start(make(save_every=1, keep=3), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000005", "step-00000006"]


def test_a_full_disk_costs_no_checkpoint(make: Make, tmp_path: Path) -> None:
    """The old ones go only when the new one is whole, and nothing half-written stays."""
    trainer = trainer_for(make(save_every=1, keep=2), tmp_path / "run")
    save_state = trainer.accelerator.save_state

    def full(folder: str) -> None:
        save_state(folder)
        if trainer.step == 4:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    trainer.accelerator.save_state = full
    with pytest.raises(OSError, match="No space"):
        trainer.run()
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000003"]
    start(make(save_every=1, keep=2), tmp_path / "run", resume=True)
    start(make(), tmp_path / "whole")
    assert same(checkpoint(tmp_path / "run", 6), checkpoint(tmp_path / "whole", 6))


# ---- stopping


def poison(trainer: Trainer, step: int, what: str) -> None:
    """Make the loss, or only its gradient, stop being a number in step number `step`."""
    loss_of = trainer.task.loss

    def loss(model: nn.Module, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        value, figures = loss_of(model, batch, rng)
        if trainer.step + 1 == step:
            parameter = next(model.parameters()).sum()
            value = value * math.nan if what == "loss" else value + ((parameter - parameter.detach()) * 0).sqrt()
        return value, figures

    trainer.task.loss = loss  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_at_its_last_good_state(make: Make, tmp_path: Path, what: str) -> None:
    config = make(save_every=100)
    trainer = trainer_for(config, tmp_path / "bad")
    poison(trainer, 4, what)
    with pytest.raises(Diverged, match=r"step 4: .*nan.*after step 3 is kept in .*lower --set lr="):
        trainer.run()
    assert checkpoints(tmp_path / "bad") == ["step-00000003"]
    run_until(config, tmp_path / "good", 3)
    kept, good = checkpoint(tmp_path / "bad", 3), checkpoint(tmp_path / "good", 3)
    assert same(kept, good)
    assert all(
        line["step"] <= 3 and math.isfinite(line["loss"]) for line in metrics(tmp_path / "bad") if "loss" in line
    )
    assert not (tmp_path / "bad" / "model").exists()


def test_a_first_step_that_diverges_promises_no_checkpoint(make: Make, tmp_path: Path) -> None:
    trainer = trainer_for(make(), tmp_path / "run")
    poison(trainer, 1, "loss")
    with pytest.raises(Diverged, match="step 1: loss nan") as caught:
        trainer.run()
    assert "is kept" not in str(caught.value) or (tmp_path / "run" / "checkpoints").exists()


def test_sigterm_leaves_a_checkpoint_and_code_130(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = generator_config(data, tokenizer, steps=100_000, warmup=10)
    preset, out = tmp_path / "long.yaml", tmp_path / "run"
    preset.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, "-m", "vgen.cli", "train", "generator", "--preset", str(preset), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 120
        while not ((out / "metrics.jsonl").exists() and len(metrics(out)) > 5):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and printed == ""
    (name,) = checkpoints(out)
    step = int(name.removeprefix("step-"))
    assert errors.splitlines()[-1] == f"vgen: stopped after step {step}; continue with --resume"
    run_until(config, out, step + 3, resume=True)
    steps = [line["step"] for line in metrics(out) if "loss" in line]
    assert steps == list(range(1, step + 4))


# ---- randomness and order


def labels_seen(config: TrainingConfig, out: Path, first: int) -> list[list[int]]:
    """Labels after dropout, in the order the model reads them from step `first` (counted from 0) on."""
    trainer, seen = trainer_for(config, out), []
    trainer.step = first

    def note(module: nn.Module, arguments: tuple) -> None:
        if module.training:
            seen.append(arguments[1].tolist())

    trainer.task.model.register_forward_pre_hook(note)
    trainer.run()
    return seen


def test_label_dropout_and_order_depend_on_seed_and_step_alone(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = generator_config(data, tokenizer, label_dropout=0.5, steps=6, accumulation=2)
    whole = labels_seen(config, tmp_path / "1", 0)
    assert len(whole) == 12 and len({str(labels) for labels in whole}) == 12
    torch.rand(17)  # whatever else has drawn
    other = dataclasses.replace(config, lr=5e-3, sample_every=2, eval_every=1, ema=0.5)
    assert labels_seen(other, tmp_path / "2", 4) == whole[8:]
    assert labels_seen(dataclasses.replace(config, seed=1), tmp_path / "3", 0) != whole


def test_label_dropout_has_its_rate_and_spares_the_other_labels(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    base = generator_config(data, tokenizer, steps=30, batch_size=32, label_dropout=0.0, eval_every=100)
    kept, never = (
        np.array(labels_seen(dataclasses.replace(base, label_dropout=rate), tmp_path / str(rate), 0))
        for rate in (0.25, 0.0)
    )
    dropped = kept == len(FASHION)
    assert not (never == len(FASHION)).any() and (kept[~dropped] == never[~dropped]).all()
    assert abs(dropped.mean() - 0.25) < 0.06  # 960 draws: 4 standard deviations


class Indices:
    """A task whose batches are their own indices."""

    def __init__(self, number: int) -> None:
        self.num_examples = number

    def batch(self, indices: np.ndarray, seed: int) -> tuple[list[int], int]:
        return indices.tolist(), seed


def micro_batches(number: int, world: int = 1, **changes: Any) -> list[list[tuple[list[int], int]]]:
    """Per process, all its micro-batches."""
    config = tokenizer_config(Path("none"), **changes)
    task: Any = Indices(number)
    return [[each[i] for i in range(len(each))] for each in (StepBatches(task, config, r, world) for r in range(world))]


@pytest.mark.parametrize(("number", "batch_size", "accumulation"), [(12, 4, 1), (10, 4, 2), (7, 12, 3), (5, 16, 1)])
def test_every_epoch_visits_every_example_once(number: int, batch_size: int, accumulation: int) -> None:
    (batches,) = micro_batches(number, batch_size=batch_size, accumulation=accumulation, steps=20)
    assert len(batches) == 20 * accumulation
    order = [index for indices, _ in batches for index in indices]
    assert len(order) == 20 * batch_size
    epochs = [order[i : i + number] for i in range(0, len(order) - number + 1, number)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2  # shuffled anew each time


def test_processes_share_a_batch_between_them() -> None:
    (alone,) = micro_batches(10, batch_size=4, steps=10)
    two = micro_batches(10, world=2, batch_size=4, steps=10)
    for i, (indices, _) in enumerate(alone):
        assert sorted(indices) == sorted(two[0][i][0] + two[1][i][0])
    seeds = [seed for process in two for _, seed in process]
    assert len(set(seeds)) == len(seeds)  # augmentation differs everywhere
    with pytest.raises(SettingError, match="cannot be shared by 3 processes"):
        micro_batches(10, world=3, batch_size=4)


def test_order_and_augmentation_follow_the_seed() -> None:
    assert micro_batches(50, seed=3) == micro_batches(50, seed=3)
    (first,), (second,) = micro_batches(50, seed=3), micro_batches(50, seed=4)
    assert [i for i, _ in first] != [i for i, _ in second] and [s for _, s in first] != [s for _, s in second]


def test_workers_change_nothing(make: Make, tmp_path: Path) -> None:
    start(make(), tmp_path / "0")
    start(make(workers=1), tmp_path / "1")
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1")


def test_accumulated_micro_batches_add_up_to_the_batch(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    for accumulation in (1, 4):
        config = generator_config(data, tokenizer, accumulation=accumulation, label_dropout=0.0, optimizer="adamw")
        start(config, tmp_path / str(accumulation))
    for one, four in zip(metrics(tmp_path / "1"), metrics(tmp_path / "4"), strict=True):
        assert one == pytest.approx(four, rel=1e-4)
    assert [line["lr"] for line in metrics(tmp_path / "4") if "lr" in line][-1] < 1e-3  # one schedule step per batch


# ---- tokens on disk


def token_files(data: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (data / "tokens").iterdir()}


def test_tokens_are_computed_once(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_mnist(tmp_path / "data")
    task: Any = build_task(generator_config(data, tokenizer))
    files = token_files(data)
    assert len(files) == 2  # train and test
    source = open_source("fashion-mnist", "train", 8, 1, data)
    codes = MultiScaleVQ.from_pretrained(tokenizer).eval().encode(to_model_range(source.images(range(64))))
    assert np.array_equal(task.tokens, torch.cat(codes, dim=1).numpy())
    assert len({row.tobytes() for row in task.tokens}) > 5
    monkeypatch.setattr(MultiScaleVQ, "encode", None)  # would fail if it were called again
    again: Any = build_task(generator_config(data, tokenizer, seed=5, steps=9))
    assert np.array_equal(again.tokens, task.tokens) and token_files(data) == files


def test_another_tokenizer_has_tokens_of_its_own(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    build_task(generator_config(data, tokenizer))
    before = token_files(data)
    other = MultiScaleVQ(**TOKENIZER)
    other.save_pretrained(tmp_path / "other")
    task: Any = build_task(generator_config(data, tmp_path / "other"))
    assert len(token_files(data).keys() - before.keys()) == 2
    assert {name: token_files(data)[name] for name in before} == before
    images = to_model_range(open_source("fashion-mnist", "train", 8, 1, data).images(range(64)))
    assert np.array_equal(task.tokens, torch.cat(other.eval().encode(images), dim=1).numpy())


def test_interrupted_tokens_leave_nothing(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, encode, calls = write_mnist(tmp_path / "data", train=250), MultiScaleVQ.encode, []

    def interrupted(self: MultiScaleVQ, images: Tensor) -> list[Tensor]:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(MultiScaleVQ, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_task(generator_config(data, tokenizer))
    assert len(calls) == 3 and token_files(data) == {}


def test_flips_double_the_tokens(data: Path, tokenizer: Path) -> None:
    task: Any = build_task(generator_config(data, tokenizer, flip=True))
    plain: Any = build_task(generator_config(data, tokenizer))
    assert task.num_examples == 2 * plain.num_examples == 128
    assert np.array_equal(task.tokens[:64], plain.tokens)
    images = to_model_range(open_source("fashion-mnist", "train", 8, 1, data).images(range(64)))
    codes = MultiScaleVQ.from_pretrained(tokenizer).eval().encode(images.flip(-1))
    assert np.array_equal(task.tokens[64:], torch.cat(codes, dim=1).numpy())
    tokens, labels = task.batch(np.array([3, 67]), seed=0)
    assert labels.tolist() == [3, 3] and tokens.dtype == torch.int64
    assert len(task.test_tokens) == 16  # evaluation sees each picture once


def test_crops_multiply_the_tokens_of_folders(tokenizer: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (12, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    task: Any = build_task(generator_config(tmp_path, tokenizer, data=str(tmp_path / "pictures"), crops=3, flip=True))
    assert task.class_names == ["ant", "bee"] and task.tokens.shape == (2 * 3 * 6, 21)
    assert task.batch(np.arange(36), seed=0)[1].tolist() == [0, 0, 0, 1, 1, 1] * 6
    source = open_source(str(tmp_path / "pictures"), "train", 8, 1)
    for crop in range(3):
        codes = task.tokenizer.encode(to_model_range(source.images(range(6), crop_seed=crop or None)))
        assert np.array_equal(task.tokens[6 * crop : 6 * crop + 6], torch.cat(codes, dim=1).numpy())


def test_a_changed_folder_is_tokenized_again(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", each=2)
    config = generator_config(tmp_path, tokenizer, data=str(folder))
    before: Any = build_task(config)
    for path in (folder / "ant").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 10), dtype=np.uint8)).save(path)
    after: Any = build_task(config)
    assert not np.array_equal(before.tokens, after.tokens)


# ---- the finished model


def assert_half(state: dict[str, Tensor]) -> None:
    """Half precision on disk, but for the codes and what smooths them."""
    for name, tensor in state.items():
        exact = "codebook." in name or "phi." in name
        assert tensor.dtype == (torch.float32 if exact else torch.float16), name


def test_a_trained_generator_is_a_model_to_load(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = generator_config(data, tokenizer, notes="About these clothes.", license="mit")
    folder = start(config, tmp_path / "run", command="vgen train generator --preset x --set lr=1")
    assert folder == tmp_path / "run" / "model"
    pipeline = vgen.load(folder)
    assert pipeline.class_names == FASHION
    assert_half(weights(folder))
    averages = checkpoint(tmp_path / "run", 6)["custom_checkpoint_1.pkl"]["shadow_params"]
    exported = list(pipeline.generator.parameters())
    assert all(torch.equal(a.half().float(), b) for a, b in zip(averages, exported, strict=True))
    assert same(load_file(tokenizer / WEIGHTS), load_file(folder / "tokenizer" / WEIGHTS))  # as it was trained
    (image,) = pipeline(class_labels=["bag"], seeds=[0]).images
    assert image.size == (8, 8)

    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    last = [line for line in metrics(tmp_path / "run") if "test_loss" in line][-1]
    for part in (
        "About these clothes.",
        "fashion-mnist",
        "`vgen train generator --preset x --set lr=1`",
        "CPU-minutes",
    ):
        assert part in card
    assert f"| test_loss | {last['test_loss']:.4g} |" in card and "code revision" in card
    assert "tiny-vq" in (folder / "tokenizer" / "README.md").read_text()


def test_a_trained_tokenizer_is_one_to_load(data: Path, tmp_path: Path) -> None:
    folder = start(tokenizer_config(data), tmp_path / "run", command="vgen train tokenizer")
    assert_half(load_file(folder / WEIGHTS))
    loaded = MultiScaleVQ.from_pretrained(folder)
    assert loaded.image_size == 8 and list(loaded.config.scales) == TOKENIZER["scales"]
    card = (folder / "README.md").read_text()
    assert "`vgen train tokenizer`" in card and "| test_psnr |" in card and "fashion-mnist" in card


def test_a_run_can_be_looked_at(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgen.progress.SPACING", 0)
    config = make(sample_every=2, log_every=2)
    start(config, tmp_path / "run")
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in sheets] == [f"step-{step:08}.png" for step in (2, 4, 6)]
    columns = 16 if config.kind == "tokenizer" else len(FASHION)
    with Image.open(sheets[-1]) as sheet:
        assert sheet.width == columns * (8 * 10 + 2) + 2
    with Image.open(tmp_path / "run" / "curves.png") as curves:
        assert curves.width > 300 and len(set(curves.convert("RGB").get_flattened_data())) > 50
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [2, 4, 6]
    assert any(path.name.startswith("events") for path in (tmp_path / "run").rglob("*"))
    shown = capsys.readouterr()
    assert shown.out == "" and "train tiny-" in shown.err and "6/6 steps" in shown.err.splitlines()[-1]


def test_averages_are_what_is_shown_and_training_goes_on_without_them(
    data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(generator_config(data, tokenizer, sample_every=1, eval_every=1), tmp_path / "run")
    trainer.run()
    model = trainer.task.model
    live = [parameter.clone() for parameter in model.parameters()]
    with trainer.averaged():
        inside = [parameter.clone() for parameter in model.parameters()]
        assert not model.training
    assert model.training and same(live, [parameter.data for parameter in model.parameters()])
    assert same(inside, [average.data for average in trainer.ema.shadow_params])
    assert not same(inside, live)
    start(generator_config(data, tokenizer), tmp_path / "unwatched")
    assert same(checkpoint(tmp_path / "run", 6), checkpoint(tmp_path / "unwatched", 6))


# ---- optimisation


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_warm_up_and_end_at_zero(data: Path, tokenizer: Path, tmp_path: Path, schedule: str) -> None:
    config = generator_config(data, tokenizer, schedule=schedule, steps=12, warmup=4, lr=1e-3, muon_lr=3e-3)
    trainer = trainer_for(config, tmp_path / schedule)
    trainer.run()
    assert len(trainer.schedulers) == 2
    assert all(rate == 0 for scheduler in trainer.schedulers for rate in scheduler.get_last_lr())
    rates = [line["lr"] for line in metrics(tmp_path / schedule) if "lr" in line]
    fall = [1 - i / 8 if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)]
    assert rates == pytest.approx([1e-3 * share for share in (0, 0.25, 0.5, 0.75, *fall)])
    assert {group["lr"] for group in trainer.optimizers[1].optimizer.param_groups} == {0}
    assert trainer.schedulers[1].base_lrs == [3e-3]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("shared", [False, True])
def test_muon_serves_the_matrices_of_the_blocks_only(data: Path, tokenizer: Path, shared: bool) -> None:
    config = generator_config(data, tokenizer, model=GENERATOR | {"shared_adaln": shared}, lr=1e-3)
    model = build_task(config).model
    adamw, muon = build_optimizers(model, config)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    chosen = parameter_names(model, muon)
    layers = {"attn.qkv", "attn.proj", "ffn.fc1", "ffn.fc2"} | (set() if shared else {"adaln"})
    assert {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers} == {
        name for name in chosen if not name.endswith("adaln_table")
    }
    assert chosen | parameter_names(model, adamw) == {name for name, _ in model.named_parameters()}
    assert not chosen & parameter_names(model, adamw)
    assert muon.param_groups[0]["lr"] == pytest.approx(1.5e-3)  # muon_lr 0 is 1.5 lr


def test_muon_leaves_tables_to_adamw(data: Path, tokenizer: Path) -> None:
    config = generator_config(data, tokenizer, model=GENERATOR | {"shared_adaln": True})
    model = build_task(config).model
    assert not any(name.endswith("table") for name in parameter_names(model, build_optimizers(model, config)[1]))


def test_vectors_embeddings_and_codes_are_not_decayed(make: Make) -> None:
    config = make(optimizer="adamw", weight_decay=0.3)
    model = build_task(config).model
    (adamw,) = build_optimizers(model, config)
    decayed, plain = adamw.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    held = {names[id(parameter)] for parameter in plain["params"]}
    assert all(name in held for name, p in model.named_parameters() if p.ndim < 2 or "embed.weight" in name)
    assert "codebook.weight" in held if config.kind == "tokenizer" else {"position", "start_position"} <= held


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precision_is_that_of_the_matrix_products(make: Make, tmp_path: Path, precision: str) -> None:
    trainer, seen = trainer_for(make(precision=precision, steps=2), tmp_path / "run"), set()
    layer = next(m for m in trainer.task.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))

    def note(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():
            seen.add(output.dtype)

    layer.register_forward_hook(note)
    trainer.run()
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {parameter.dtype for parameter in trainer.task.model.parameters()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)


def test_two_runs_of_one_process_may_differ_in_precision(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """A script that trains a tokenizer in float32 and then a generator in bfloat16."""
    start(tokenizer_config(data, precision="no", steps=1), tmp_path / "vq")
    start(generator_config(data, tokenizer, precision="bf16", steps=1), tmp_path / "var")


def test_a_tokenizer_learns_a_trivial_data_set(data: Path, tmp_path: Path) -> None:
    start(tokenizer_config(data, steps=150, batch_size=16, lr=5e-3, eval_every=30, flip=False), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    psnr = [line["test_psnr"] for line in lines if "test_psnr" in line]
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    assert psnr[-1] > psnr[0] + 3


def test_a_generator_learns_a_trivial_data_set(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = generator_config(data, tokenizer, steps=150, batch_size=16, lr=1e-2, eval_every=30, ema=0.9)
    start(config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["test_loss"] for line in lines if "test_loss" in line]
    assert losses[0] == pytest.approx(math.log(16), abs=0.1)  # it knows nothing yet
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    assert held_out[-1] < 0.3 * losses[0]  # the test pictures are of the same kind


# ---- wrong settings of a run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "gan"}, "unknown .* family 'gan'"),
        ({"model": {"depth_": 3}}, "model settings of .*depth_"),
        ({"data": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_settings_that_no_task_can_use_are_named(make: Make, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        build_task(make(**changes))


def test_a_missing_tokenizer_says_how_to_name_one(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no tokenizer in .*--set tokenizer=FOLDER"):
        build_task(generator_config(data, tmp_path))


def test_the_tokenizer_of_a_finished_pipeline_or_run_is_found(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    model = start(generator_config(data, tokenizer, steps=1), tmp_path / "var")
    for folder in (model, tokenizer.parent, tokenizer):
        task: Any = build_task(generator_config(data, folder))
        assert (task.tokenizer_folder / WEIGHTS).is_file()


def test_an_image_size_the_model_does_not_have_is_named(data: Path) -> None:
    with pytest.raises(SettingError, match="image_size is 16, but the model's token grid gives 8"):
        build_task(tokenizer_config(data, image_size=16))


# ---- several processes

RANK_PROGRAM = """
import sys
from pathlib import Path
import torch, yaml
from vgen.training.config import TrainingConfig, load_config
from vgen.training.run import build_task
from vgen.training.trainer import Trainer

config, out = TrainingConfig(**yaml.safe_load(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
trainer = Trainer(build_task(config), config, out, command="")
trainer.run()
torch.save(trainer.task.model.state_dict(), out / f"rank{trainer.accelerator.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_two_processes_train_one_model(data: Path, tokenizer: Path, tmp_path: Path, kind: str) -> None:
    """What differs between processes by design, flips and label dropout, is off: then two equal one."""
    changes: dict[str, Any] = {"flip": False, "label_dropout": 0.0, "steps": 4, "restart_every": 100, "save_every": 2}
    if kind == "tokenizer":
        model = TOKENIZER | {"num_phi": 3}  # the default four leave one without a gradient at three scales
        config = tokenizer_config(data, **changes, restart_until=0.0, model=model)
    else:
        config = generator_config(data, tokenizer, **changes)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    out = tmp_path / "two"
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "program.py", "config.yaml", str(out)]
    done = python(*arguments, cwd=tmp_path, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in range(2))
    for state in (first, second):
        state.pop("codebook.usage", None)  # each process counts its own batches
    assert same(first, second)
    start(config, tmp_path / "one")
    alone = load_file(tmp_path / "one" / "checkpoints" / "step-00000004" / "model.safetensors")
    for name, tensor in first.items():
        assert torch.allclose(tensor, alone[name], atol=2e-4), name
    assert checkpoints(out) == ["step-00000002", "step-00000004"]
    assert len([line for line in metrics(out) if "loss" in line]) == 4  # written by one process only
    assert (out / "model" / "README.md").is_file()


# ---- a classifier that judges samples


def test_a_classifier_judges_the_samples_of_a_run(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    """Its figures are those of the same samples, judged apart."""
    folder = tmp_path / "judge"
    names = open_source("fashion-mnist", "test", 8, 1, data).class_names
    torch.manual_seed(0)
    ImageClassifier(class_names=names, image_size=8, widths=(8, 16), norm_groups=4).save_pretrained(folder)
    task: Any = build_task(generator_config(data, tokenizer, classifier=str(folder), score_samples=30))
    figures = task.evaluate()
    assert {"test_loss", "class_accuracy", "classifier_frechet"} <= figures.keys()
    labels = [seed % len(names) for seed in range(30)]
    images = task.pipeline()(
        class_labels=labels, seeds=list(range(30)), guidance_scale=task.config.sample_guidance, output_type="pt"
    ).images
    found = build_extractor(str(folder), ExtractorOptions())(to_uint8(images), ("features", "logits"))
    assert figures["class_accuracy"] == float((found["logits"].argmax(1) == torch.tensor(labels)).double().mean())
    real = open_source("fashion-mnist", "test", 8, 1, data).images(range(16)).expand(-1, 3, -1, -1)
    true = build_extractor(str(folder), ExtractorOptions())(real, ("features",))["features"].double()
    fake = found["features"].double()
    expected = frechet_distance(fake.mean(0), torch.cov(fake.T), true.mean(0), torch.cov(true.T))
    assert figures["classifier_frechet"] == pytest.approx(expected, rel=1e-4)


def test_a_classifier_of_other_classes_is_refused_before_training(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    ImageClassifier(class_names=["cat", "dog"], image_size=8, widths=(8, 16), norm_groups=4).save_pretrained(
        tmp_path / "pets"
    )
    with pytest.raises(SettingError, match=r"knows cat, dog, .*but the data has t-shirt"):
        build_task(generator_config(data, tokenizer, classifier=str(tmp_path / "pets")))


def test_a_classifier_of_another_size_is_refused_before_training(tokenizer: Path, data: Path) -> None:
    with pytest.raises(SettingError, match="trained on 28x28"):
        build_task(generator_config(data, tokenizer, classifier="fashion-classifier"))


def test_a_presets_classifier_is_for_its_own_data() -> None:
    assert load_config("fashion-var").classifier == "fashion-classifier"
    assert load_config("fashion-var", ["data=photos"]).classifier is None
    assert load_config("fashion-var", ["data=photos", "classifier=runs/photos"]).classifier == "runs/photos"
