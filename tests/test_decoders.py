"""Training a model's decoder further: tokens stay what they are, and only the decoder learns."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import fresh_accelerate  # noqa: F401
from tiny import WEIGHTS, generator_config, tokenizer_config, write_folder, write_mnist

import vgen
from vgen.data import open_source, to_model_range
from vgen.training.config import TrainingConfig
from vgen.training.decoders import DecoderTask
from vgen.training.run import build_task, start
from vgen.training.tokens import flat_latent, flat_tokens
from vgen.training.trainer import checkpoints
from vgen.types import SettingError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model, with the cards of both its parts."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = start(tokenizer_config(data), folder / "vq")
    return start(generator_config(data, tokenizer), folder / "var")


def decoder_config(data: Path, trained: Path, **changes: Any) -> TrainingConfig:
    """A run of a few seconds."""
    values: dict[str, Any] = {
        "kind": "decoder",
        "name": "tiny-decoder",
        "family": "decoder",
        "model": {},
        "init_from": str(trained),
        "samples": 24,
        "adversarial": 0.1,
        "adversarial_start": 0.0,
        "warmup": 0,
        "flip": False,
    }
    return tokenizer_config(data, **values | changes)


def test_only_the_decoder_learns_and_the_model_is_whole(data: Path, trained: Path, tmp_path: Path) -> None:
    out = start(decoder_config(data, trained), tmp_path / "run", command="vgen train decoder")
    for part, kept in (("generator", True), ("tokenizer", False)):
        old, new = (load_file(folder / part / WEIGHTS) for folder in (trained, out))
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert old.keys() == new.keys() and (not changed) == kept
        assert {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}
    before, after = vgen.load(trained), vgen.load(out)
    images = to_model_range(open_source("fashion-mnist", "test", 8, 1, data).images(range(16)))
    ours, theirs = (flat_tokens(pipe.tokenizer.encode(images)) for pipe in (before, after))
    assert torch.equal(ours, theirs)
    made = [pipe([1, 2], seeds=[0, 1], output_type="pt") for pipe in (before, after)]
    assert torch.equal(*(flat_tokens(found.tokens) for found in made))
    assert not torch.equal(*(found.images for found in made))
    card = (out / "tokenizer" / "README.md").read_text()
    assert (
        "`vgen train decoder`" in card and "| test_psnr |" in card and "CPU-minutes)" in card
    )  # of what it began with
    own = (out / "README.md").read_text()
    assert own.startswith((trained / "README.md").read_text()) and own.rstrip().endswith("tokenizer/README.md |")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(data: Path, trained: Path, tmp_path: Path) -> None:
    whole = start(decoder_config(data, trained, save_every=3, keep=9), tmp_path / "whole")
    half = tmp_path / "half"
    start(decoder_config(data, trained, save_every=3, keep=9), half)
    for folder in checkpoints(half)[1:]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    again = start(decoder_config(data, trained, save_every=3, keep=9), half, resume=True)
    ours, theirs = (load_file(folder / "tokenizer" / WEIGHTS) for folder in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_samples_are_drawn_with_the_settings_asked_for(data: Path, trained: Path) -> None:
    settings = {"temperature": 0.5, "guidance_scale": 1.5}  # the latter wins over sample_guidance
    task: Any = build_task(decoder_config(data, trained, sample_settings=settings))
    drawn = [flat_tokens(task.pipeline([3], seeds=[1_000_000_003], **each).tokens)[0] for each in (settings, {})]
    assert torch.equal(drawn[0], torch.from_numpy(task.samples[3])) and not torch.equal(*drawn)
    with pytest.raises(SettingError, match="temperature"):
        build_task(decoder_config(data, trained, sample_settings={"temperature": -1}))


def test_it_learns_from_images_and_from_the_models_own_samples(data: Path, trained: Path) -> None:
    task: Any = build_task(decoder_config(data, trained))
    assert isinstance(task, DecoderTask) and task.samples.shape == (24, task.tokens.shape[1])
    expected = task.pipeline([3], seeds=[1_000_000_003], guidance_scale=2.5)  # the preset's sample_guidance
    assert torch.equal(flat_tokens(expected.tokens)[0], torch.from_numpy(task.samples[3]))
    images, tokens, classes = task.batch(torch.arange(8).numpy(), seed=5)
    assert torch.equal(flat_tokens(task.model.tokenizer.encode(images)), tokens[:8])
    assert classes[:8].tolist() == list(task.source.labels[:8])
    known = {tuple(row): number % 10 for number, row in enumerate(task.samples.tolist())}
    assert [known[tuple(row)] for row in tokens[8:].tolist()] == classes[8:].tolist()
    loss, figures = task.loss(task.model, (images, tokens, classes), torch.Generator())
    made = task.model(flat_latent(task.model.tokenizer, tokens))
    difference = made[:8] - images
    error = difference.square().mean() + 0.2 * difference.abs().mean()
    term = task.adversary.decoder_loss(made, classes)  # of all sixteen
    assert figures["adversarial"].item() == pytest.approx(term.item(), rel=1e-4)
    assert loss.item() == pytest.approx((error + 0.1 * term).item(), rel=1e-5)
    loss.backward()
    touched = {name.split(".")[1] for name, p in task.model.named_parameters() if p.grad is not None}
    assert touched == {"decoder", "post_quant_conv"}
    assert all(p.grad is None for p in task.adversary.parameters)  # the term is the decoder's alone


def test_until_its_start_the_discriminator_alone_learns(data: Path, trained: Path) -> None:
    task: Any = build_task(decoder_config(data, trained, adversarial_start=0.5, warmup=0))
    batch = task.batch(torch.arange(8).numpy(), seed=5)
    loss, figures = task.loss(task.model, batch, torch.Generator())
    difference = task.model(flat_latent(task.model.tokenizer, batch[1][:8])) - batch[0]
    error = difference.square().mean() + 0.2 * difference.abs().mean()
    assert loss.item() == pytest.approx(error.item(), rel=1e-5) and not figures["adversarial"]
    before = [p.detach().clone() for p in task.adversary.parameters]
    task.after_step(1, torch.Generator())
    moved = [not torch.equal(a, b) for a, b in zip(before, task.adversary.parameters, strict=True)]
    assert any(moved)
    task.after_step(task.config.steps // 2, torch.Generator())
    assert task.loss(task.model, batch, torch.Generator())[1]["adversarial"] > 0


def test_what_cannot_be_trained_so_is_one_line(data: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="a decoder needs the model it belongs to"):
        decoder_config(data, trained, init_from=None)
    with pytest.raises(SettingError, match="unknown model 'nowhere'"):
        build_task(decoder_config(data, trained, init_from="nowhere"))
    with pytest.raises(SettingError, match="whose tokenizer is a PatchPCA"):
        build_task(decoder_config(data, trained, init_from="moving-far"))
    three = dataclasses.replace(decoder_config(data, trained), data=str(write_folder(tmp_path / "three", side=8)))
    with pytest.raises(SettingError, match=r"has 3 classes, but .* 10: take the data"):
        build_task(three)


def test_the_settings_of_the_model_stay(data: Path, trained: Path, tmp_path: Path) -> None:
    out = start(decoder_config(data, trained, steps=1), tmp_path / "run")
    assert json.loads((out / "model_index.json").read_text()) == json.loads((trained / "model_index.json").read_text())


def test_an_anchor_holds_samples_to_what_they_were_at_first(data: Path, trained: Path) -> None:
    task: Any = build_task(decoder_config(data, trained, anchor=2.0, adversarial_start=0.5))
    images, tokens, _ = batch = task.batch(torch.arange(8).numpy(), seed=5)
    latents = flat_latent(task.model.tokenizer, tokens)
    at_first = task.model(latents).detach()
    assert task.loss(task.model, batch, torch.Generator())[1]["moved"] < 1e-9
    with torch.no_grad():
        for weight in task.model.tokenizer.decoder.parameters():
            weight.mul_(1.1)
    loss, figures = task.loss(task.model, batch, torch.Generator())
    made = task.model(latents)
    difference, moved = made[:8] - images, (made[8:] - at_first[8:]).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    moved = moved.square().mean()  # of 2x2 means: texture is free
    error = difference.square().mean() + 0.2 * difference.abs().mean()
    assert moved > 1e-4 and figures["moved"].item() == pytest.approx(moved.item(), rel=1e-4)
    assert loss.item() == pytest.approx((error + 2 * moved).item(), rel=1e-4)
    with pytest.raises(SettingError, match=r"anchor is 0\.5, but serves decoders, not a tokenizer"):
        dataclasses.replace(decoder_config(data, trained), kind="tokenizer", adversarial=0.0, anchor=0.5)
