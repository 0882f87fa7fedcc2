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
from vgen.data import to_model_range
from vgen.generators.mvar import MVAR
from vgen.generators.var import VAR
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.config import TrainingConfig, load_config
from vgen.training.next_scale import misread
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


def test_the_models_own_settings_come_with_it_and_give_way(make: Make, tmp_path: Path) -> None:
    pipeline = vgen.load(start(make(steps=1, sample_settings={"guidance_scale": 3.5, "top_k": 5}), tmp_path / "run"))
    assert {"guidance_scale": 3.5, "top_k": 5}.items() <= pipeline.resolve_settings({}).items()
    plain = pipeline([1], seeds=[0], output_type="latent").tokens
    given = pipeline([1], seeds=[0], guidance_scale=3.5, top_k=5, output_type="latent").tokens
    other = pipeline([1], seeds=[0], guidance_scale=1, top_k=0, output_type="latent").tokens
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    with pytest.raises(SettingError, match="unknown setting 'heat'"):
        build_task(make(sample_settings={"heat": 2}))
    with pytest.raises(SettingError, match=r"top_k is 5000: it must lie in 0\.\."):
        build_task(make(sample_settings={"top_k": 5000}))


# ---- self-correction


def test_nothing_misread_is_what_training_reads_otherwise(make: Make) -> None:
    task: Any = build_task(make())
    tokens, _ = task.batch(torch.arange(6).numpy(), seed=0)
    images = to_model_range(task.source.images(range(6)))
    found, rows = misread(task.tokenizer, images, 0.0, torch.Generator())
    assert torch.equal(found, tokens)
    torch.testing.assert_close(rows, task.tokenizer.context(tokens.split(task.model.lengths, 1)))


def test_what_is_misread_is_near_and_later_scales_mend_it(make: Make) -> None:
    """Followed by hand: what is read at each scale, and that the next one quantises what is then left."""
    task: Any = build_task(make())
    tokenizer, images = task.tokenizer, to_model_range(task.source.images(range(40)))
    read: list[torch.Tensor] = []
    embed = tokenizer.embed
    tokenizer.embed = lambda tokens: read.append(tokens) or embed(tokens)
    tokens, rows = misread(tokenizer, images, 0.9, torch.Generator().manual_seed(1))
    tokenizer.embed = embed
    target, latent, start = tokenizer.encode_latent(images), tokenizer.new_latent(40), 0
    lengths = task.model.lengths
    for k, right in enumerate(tokens.split(lengths, 1)):
        left = tokenizer.aim(target, k) - latent
        assert torch.equal(right, tokenizer.quantize_scale(left, k))
        if k + 1 == len(lengths):
            break
        near = tokenizer.codebook.nearby(tokenizer.read_scale(left, k), max(2, tokenizer.config["vocab_size"] // 16))
        assert (near == read[k][..., None]).any(-1).all()
        latent = tokenizer.add_scale(latent, tokenizer.embed(read[k]), k)
        assert torch.equal(rows[:, start : start + lengths[k + 1]], tokenizer.read_scale(latent, k + 1))
        start += lengths[k + 1]
    assert len(read) == len(lengths) - 1
    wrong = torch.cat([(a != b).float() for a, b in zip(read, tokens.split(lengths, 1)[:-1], strict=True)], 1)
    assert 0.05 < wrong.mean() < 0.45  # of 0.9 at most, half on average, and some are "misread" as what they are
    again = misread(tokenizer, images, 0.9, torch.Generator().manual_seed(1))
    assert torch.equal(tokens, again[0]) and torch.equal(rows, again[1])


def test_a_run_with_self_correction_learns_from_images(make: Make, tmp_path: Path) -> None:
    config = make(self_correction=0.3, steps=12, log_every=1, label_dropout=0.0)
    task: Any = build_task(config)
    randomize(task.model, 0)
    images, labels = task.batch(torch.arange(6).numpy(), seed=0)
    assert torch.equal(images, to_model_range(task.source.images(range(6)))) and torch.equal(labels, task.labels[:6])
    loss, _ = task.loss(task.model, (images, labels), torch.Generator().manual_seed(4))
    rng = torch.Generator().manual_seed(4)
    torch.rand(6, generator=rng)  # which labels are dropped
    tokens, rows = misread(task.tokenizer, images, 0.3, rng)
    expected = F.cross_entropy(task.model(rows, labels).transpose(1, 2), tokens)
    torch.testing.assert_close(loss, expected)
    start(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1


def test_flips_and_crops_are_drawn_anew_with_self_correction(make: Make) -> None:
    task: Any = build_task(make(self_correction=0.3, flip=True))
    number = len(task.labels)
    images, labels = task.batch(torch.arange(number, number + 32).numpy(), seed=5)  # rows of the flipped copy
    originals = to_model_range(task.source.images(range(32)))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(images, originals, strict=True)]
    assert 4 < sum(flipped) < 28 and torch.equal(labels, task.labels[:32])
    assert all(torch.equal(a, b.flip(-1) if f else b) for a, b, f in zip(images, originals, flipped, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self_correction": 1.0}, "self_correction is 1.0: it must be from 0 to below 1"),
        ({"self_correction": -0.1}, "self_correction is -0.1: it must be from 0"),
        ({"self_correction": 0.3, "family": "masked"}, "serves the families var and mvar, not 'masked': leave it out"),
    ],
)
def test_wrong_self_correction_is_refused(data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        generator_config(data, Path("none"), **changes)


def test_a_tokenizer_of_another_kind_is_refused(data: Path, tmp_path: Path) -> None:
    VQGAN(
        side=4, vocab_size=12, code_dim=4, image_channels=1, base_channels=4, channel_multipliers=(1, 1), norm_groups=2
    ).save_pretrained(tmp_path / "vqgan")
    with pytest.raises(SettingError, match="is a VQGAN, but mvar needs a MultiScaleVQ"):
        build_task(generator_config(data, tmp_path / "vqgan", family="mvar", model=MODELS["mvar"]))


def test_presets_share_data_and_size() -> None:
    """What the comparison of the bundled models rests on."""
    presets = [load_config(name) for name in ("fashion-var", "fashion-mvar", "fashion-nfig")]
    shared = ("data", "batch_size", "optimizer", "lr", "weight_decay", "ema", "label_dropout", "self_correction")
    for name in (*shared, "sample_guidance", "sample_settings"):
        assert all(getattr(preset, name) == getattr(presets[0], name) for preset in presets), name
    assert presets[0].model == presets[2].model and presets[0].steps == presets[2].steps
