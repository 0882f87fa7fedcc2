"""Training the generators that predict scale by scale: every family on every tokenizer of its kind."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from tiny import TOKENIZER, generator_config, randomize, write_mnist

import vgen
from vgen.generators.mvar import MVAR
from vgen.generators.var import VAR
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.config import TrainingConfig, load_config
from vgen.training.run import build_task, start
from vgen.types import SettingError

MODELS: dict[str, dict[str, Any]] = {
    "var": {"width": 16, "depth": 2, "heads": 2},
    "mvar": {"width": 16, "depth": 2, "heads": 2, "mamba_head_width": 8, "state_size": 4},
}
CLASSES = {"var": VAR, "mvar": MVAR}
Make = Callable[..., TrainingConfig]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process; each test is a process of its own to it."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[MultiScaleVQ, FrequencyVQ], ids=["multiscale", "frequency"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random tokenizer of either kind."""
    model = request.param(**TOKENIZER)
    randomize(model, 3)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest, data: Path, tokenizer: Path) -> Make:
    def config(**changes: Any) -> TrainingConfig:
        settings = {"family": request.param, "model": MODELS[request.param], "optimizer": "muon", "lr": 1e-2}
        return generator_config(data, tokenizer, **settings | changes)

    return config


def test_the_loss_is_the_cross_entropy_of_every_token(make: Make) -> None:
    config = make(label_dropout=0.0)
    task: Any = build_task(config)
    randomize(task.model, 0)
    tokens, labels = task.batch(torch.arange(6).numpy(), seed=0)
    loss, _ = task.loss(task.model, (tokens, labels), torch.Generator().manual_seed(0))
    pipeline = task.pipeline()
    logits = pipeline.logits(tokens.split(task.model.lengths, 1), labels.tolist())
    expected = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.token_losses(tokens, labels), expected, rtol=1e-5, atol=1e-5)
    found = task.test_losses(tokens, labels, 0)
    torch.testing.assert_close(found["test_loss_tail"], expected[:, -task.model.lengths[-1] :].mean(1))


def test_a_run_trains_exports_and_samples(make: Make, tmp_path: Path) -> None:
    config = make(steps=12, log_every=1)
    folder = start(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    pipeline = vgen.load(folder)
    assert type(pipeline.generator) is CLASSES[config.family]
    assert len(pipeline(class_labels=[1, 2], seeds=[0, 1]).images) == 2


def test_a_resumed_run_equals_an_unbroken_one(make: Make, tmp_path: Path) -> None:
    whole = start(make(steps=6, save_every=3), tmp_path / "whole")
    broken = make(steps=6, save_every=3)
    start(broken, tmp_path / "parts")
    for later in (tmp_path / "parts" / "checkpoints").glob("*6"):
        for file in sorted(later.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        later.rmdir()
    resumed = start(broken, tmp_path / "parts", resume=True)
    ours, theirs = (vgen.load(folder).generator.state_dict() for folder in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tokenizer_of_another_kind_is_refused(data: Path, tmp_path: Path) -> None:
    VQGAN(
        side=4, vocab_size=12, code_dim=4, image_channels=1, base_channels=4, channel_multipliers=(1, 1), norm_groups=2
    ).save_pretrained(tmp_path / "vqgan")
    with pytest.raises(SettingError, match="is a VQGAN, but mvar needs a MultiScaleVQ"):
        build_task(generator_config(data, tmp_path / "vqgan", family="mvar", model=MODELS["mvar"]))


def test_presets_share_data_and_size() -> None:
    """What the comparison of the bundled models rests on."""
    presets = [load_config(name) for name in ("fashion-var", "fashion-mvar", "fashion-nfig")]
    for name in ("data", "batch_size", "optimizer", "lr", "weight_decay", "ema", "label_dropout", "sample_guidance"):
        assert len({getattr(preset, name) for preset in presets}) == 1, name
    assert presets[0].model == presets[2].model and presets[0].steps == presets[2].steps
