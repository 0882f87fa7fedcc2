"""The optional terms of tokenizer training: a discriminator of patches, its balance with the rest, and LPIPS."""

import dataclasses
import math
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from test_training import (  # noqa: F401
    RANK_PROGRAM,
    checkpoint,
    fresh_accelerate,
    metrics,
    poison,
    run_until,
    same,
    trainer_for,
    weights,
)
from tiny import TOKENIZER, generator_config, python, tokenizer_config, write_mnist
from torch import Tensor, nn

from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.training.adversary import Adversary, PatchAdversary, PatchDiscriminator, adaptive_weight, hinge_loss
from vgen.training.config import load_config
from vgen.training.perceptual import Perceptual
from vgen.training.run import build_task, start
from vgen.training.trainer import Diverged
from vgen.types import SettingError

SIXTEEN = TOKENIZER | {"channel_multipliers": [1, 1, 2]}  # VGG-16 takes no smaller images than 16 x 16
FIGURES = {"adversarial", "adversarial_weight", "discriminator"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


def images(number: int, size: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(number, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def adversary(**changes: Any) -> PatchAdversary:
    return PatchAdversary(tokenizer_config(Path("none"), **{"adversarial": 0.5, "schedule": "linear"} | changes), 1, 8)


def discriminator(channels: int = 1, size: int = 8, **settings: Any) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(channels, size, **settings).eval()


def task_of(data: Path, **changes: Any) -> Any:
    return build_task(tokenizer_config(data, **changes))


def discriminator_state(found: dict[str, Any]) -> dict[str, Any]:
    """The adversary's part of a checkpoint."""
    (kept,) = (state for state in found.values() if "discriminator" in state)
    return kept


def loss_of(task: Any, number: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    size = task.model.image_size
    return task.loss(task.model, (images(number, size),), torch.Generator().manual_seed(0))


# ---- the losses


def test_hinge_losses_are_those_worked_out_by_hand() -> None:
    real, fake = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-3.0, 0.25])
    assert float(hinge_loss(real, fake)) == pytest.approx((0.5 + 0 + 2) / 3 + (0 + 1.25) / 2)
    assert float(hinge_loss(torch.zeros(4), torch.zeros(4))) == 2  # knows nothing
    assert float(hinge_loss(torch.ones(4), -torch.ones(4))) == 0  # beyond the margin nothing is gained


def test_the_tokenizer_is_told_to_raise_the_logits_of_its_images() -> None:
    judge, fake = adversary(), images(3)
    assert judge.generator_loss(fake).item() == pytest.approx(-judge.discriminator(fake).mean().item())
    assert judge.discriminator(fake).requires_grad  # it is frozen for the term only


def test_the_adaptive_weight_is_the_ratio_of_two_gradients_norms() -> None:
    """A linear last layer: the gradient of c * x w is c x, whatever w."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    error, term = 3 * (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([1.0, 0.0])).sum()
    assert float(adaptive_weight(error, term, w)) == pytest.approx(15, rel=1e-5)
    assert float(adaptive_weight(error, term * 1e-5, w)) == 1e4  # not beyond
    assert float(adaptive_weight(term, error, w)) == pytest.approx(1 / 15, rel=1e-5)
    assert float(adaptive_weight(error * 1e-7, term * 0, w)) == pytest.approx(1.5, rel=1e-5)  # 15e-7 / (0 + 1e-6)
    assert not adaptive_weight(error, term, w).requires_grad and w.grad is None
    (error + term).backward()  # the graphs are kept


def test_the_adaptive_weight_survives_float16() -> None:
    """The error of a large batch has gradients per pixel that are zero in float16."""
    torch.manual_seed(0)
    layer, h = nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 128, 128)

    def found() -> float:
        out = layer(h).float()
        error, term = (out * 0.01).square().mean(), out.sigmoid().mean() * 0.01
        return float(adaptive_weight(error, term, layer.weight))

    exact = found()
    with torch.autocast("cpu", dtype=torch.float16):
        assert found() == pytest.approx(exact, rel=0.05)


# ---- the discriminator


@pytest.mark.parametrize(("size", "layers", "side"), [(8, 1, 2), (16, 2, 2), (28, 2, 5), (32, 3, 2), (256, 3, 30)])
def test_small_images_have_fewer_layers_and_a_map_of_two_by_two_at_least(size: int, layers: int, side: int) -> None:
    network = discriminator(3, size, base=4)
    assert network(images(2, size, 3)).shape == (2, 1, side, side)
    assert len(network.layers) == layers + 2
    if size < 32:  # one more would have left less
        assert size // 2 ** (layers + 1) - 2 < 2
    assert [layer.weight.shape[0] for layer in network.layers] == [*[4, 8, 16, 32][: layers + 1], 1]


def test_images_without_room_for_a_map_are_refused() -> None:
    with pytest.raises(SettingError, match=r"images of 7x7 are too small .*at least 8x8: --set adversarial=0"):
        PatchDiscriminator(1, 7)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_own_patch_only(layers: int, patch: int) -> None:
    """Also the rest of the image must not change it: no statistics over the image."""
    size = 112
    network = discriminator(1, size, base=4, layers=layers)
    picture = images(1, size).requires_grad_()
    found = network(picture)
    cell = found.shape[-1] // 2
    (gradient,) = torch.autograd.grad(found[0, 0, cell, cell], picture)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    first = cell * 2**layers - sum(2**i for i in range(layers)) - 2 * 2**layers
    assert (int(rows.min()), int(rows.max())) == (first, first + patch - 1)
    changed = images(1, size, seed=1)
    changed[..., first : first + patch, first : first + patch] = picture[
        ..., first : first + patch, first : first + patch
    ]
    assert torch.allclose(network(changed)[0, 0, cell, cell], found[0, 0, cell, cell], atol=1e-6)
    changed[..., first + patch // 2, first + patch // 2] += 1
    assert not torch.allclose(network(changed)[0, 0, cell, cell], found[0, 0, cell, cell], atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_a_row_of_a_batch_is_judged_as_if_alone(training: bool) -> None:
    together, alone = discriminator().train(training), discriminator().train(training)
    batch = images(5)
    assert torch.allclose(together(batch)[2:3], alone(batch[2:3]), atol=1e-6)


def test_every_layer_is_bounded_by_its_largest_singular_value() -> None:
    network = discriminator()
    with torch.no_grad():
        for layer in network.layers:
            layer.parametrizations.weight.original.mul_(7)
    before = network(images(1))
    for _ in range(30):
        network.refine()
    assert not network.training
    for layer in network.layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert torch.equal(network(images(1)), network(images(1))) and not torch.equal(network(images(1)), before)


def test_it_learns_to_tell_two_kinds_of_images_apart() -> None:
    judge, losses = adversary(lr=1e-3, steps=1000, warmup=0, adversarial_start=0.0), []
    last_layer = torch.ones((), requires_grad=True)
    for step in range(1, 31):
        real, fake = images(16, seed=step) * 0.5 + 0.3, images(16, seed=-step) * 0.5 - 0.3
        losses.append(float(judge(real, fake * last_layer, last_layer.square(), last_layer)[1]["discriminator"]))
        judge.learn(step)
    assert losses[0] == pytest.approx(2, abs=0.3) and losses[-1] < 0.5
    for layer in judge.discriminator.layers:  # the estimates of the norms keep up with the weights
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    real, fake = (judge.discriminator(images(50, seed=77) * 0.5 + shift).mean((1, 2, 3)) for shift in (0.3, -0.3))
    assert real.min() > fake.max()


# ---- who learns what from whom


def test_the_term_reaches_the_tokenizer_and_not_the_discriminator(data: Path) -> None:
    task = task_of(data, adversarial=0.5, adversarial_start=0.0)
    reference = task_of(data)
    plain, _ = loss_of(reference)
    before = [parameter.clone() for parameter in task.adversary.parameters]
    loss, figures = loss_of(task)
    gained = 0.5 * figures["adversarial_weight"] * figures["adversarial"]
    assert (loss - gained).item() == pytest.approx(plain.item(), abs=1e-6) and abs(gained.item()) > 1e-4
    decoder = list(task.model.decoder.parameters())
    gradients = torch.autograd.grad(gained, decoder, retain_graph=True)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    encoder = torch.autograd.grad(gained, task.model.encoder.conv_in.weight, retain_graph=True)[0]
    assert float(encoder.abs().max()) > 0  # straight through the quantiser
    loss.backward()
    assert all(parameter.grad is None for parameter in task.adversary.parameters)
    assert same([parameter.data for parameter in task.adversary.parameters], before)
    plain.backward()
    for parameter, unchanged, extra in zip(decoder, reference.model.decoder.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, unchanged.grad + extra, atol=1e-6)


def test_the_weight_balances_the_term_with_the_reconstruction_at_the_last_convolution(data: Path) -> None:
    task = task_of(data, adversarial=0.5, adversarial_start=0.0, l1=0.7)
    last = task.model.decoder.conv_out.weight
    _, figures = loss_of(task)
    (pictures,) = (images(8, 8),)
    rebuilt = task.model(pictures)[0]
    error = F.mse_loss(rebuilt, pictures) + 0.7 * F.l1_loss(rebuilt, pictures)
    upper = torch.autograd.grad(error, last, retain_graph=True)[0].norm()
    lower = torch.autograd.grad(-task.adversary.discriminator(rebuilt).mean(), last)[0].norm()
    assert float(figures["adversarial_weight"]) == pytest.approx(float(upper / lower), rel=1e-3)


def test_a_step_of_the_discriminator_is_that_of_its_hinge_loss(data: Path) -> None:
    """AdamW without decay on the gradient of the hinge loss at detached images, and the tokenizer gets none of it."""
    task = task_of(data, adversarial=0.5, adversarial_start=0.0, warmup=0)
    judge, twin = task.adversary, task_of(data, adversarial=0.5).adversary
    _, figures = loss_of(task)
    task.model.zero_grad()
    rebuilt = task.model(images(8))[0].detach()
    loss = F.relu(1 - twin.discriminator(images(8))).mean() + F.relu(1 + twin.discriminator(rebuilt)).mean()
    assert figures["discriminator"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    optimizer = torch.optim.AdamW(twin.parameters, lr=2e-3, betas=(0.5, 0.9), weight_decay=0.0)
    optimizer.step()
    task.after_step(1, torch.Generator().manual_seed(0))
    ours, expected = (torch.cat([p.detach().flatten() for p in each.parameters]) for each in (judge, twin))
    gradient = torch.cat([parameter.grad.flatten() for parameter in twin.parameters])
    certain = gradient.abs() > 1e-6  # the first step is the gradient's sign, and rounding may turn the smallest
    assert certain.float().mean() > 0.9 and torch.allclose(ours[certain], expected[certain], atol=1e-5)
    moments = [judge.optimizer.state[parameter] for parameter in judge.parameters]
    for name, wanted in (("exp_avg", 0.5 * gradient), ("exp_avg_sq", 0.1 * gradient.square())):
        found = torch.cat([moment[name].flatten() for moment in moments])
        assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max().item())
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_micro_batches_add_up_to_the_discriminators_batch() -> None:
    last_layer, whole, parts = torch.ones((), requires_grad=True), adversary(warmup=0), adversary(warmup=0)
    real, fake = images(8), images(8, seed=1)
    for judge, chunks in ((whole, 1), (parts, 4)):
        for a, b in zip(real.chunk(chunks), fake.chunk(chunks), strict=True):
            judge(a, b * last_layer, last_layer.square(), last_layer)
        judge.learn(1)
    first, second = (torch.cat([s["exp_avg"].flatten() for s in j.optimizer.state.values()]) for j in (whole, parts))
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-8) and first.abs().max() > 1e-4
    before = [parameter.clone() for parameter in whole.parameters]
    whole.learn(2)  # nothing was seen since
    assert same(before, [parameter.data for parameter in whole.parameters])


def test_asking_changes_nothing_until_it_learns(data: Path) -> None:
    """Or the last good state of a run that diverges would not be the one before the bad step."""
    task = task_of(data, adversarial=0.5, adversarial_start=0.0)
    loss_of(task)
    task.after_step(1, torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in task.adversary.discriminator.state_dict().items()}
    figures = [loss_of(task)[1] for _ in range(2)]
    assert same(before, dict(task.adversary.discriminator.state_dict())) and same(*figures)


def test_it_judges_in_float32_whatever_the_precision_of_the_run() -> None:
    judge, layer, real = adversary(), torch.ones((), requires_grad=True), images(4)
    fake = images(4, seed=1) * layer
    exact = judge(real, fake, fake.square().mean(), layer)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(judge(real, fake, fake.square().mean(), layer)[1], exact)


# ---- runs


def test_the_trainer_moves_it_to_its_device(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    monkeypatch.setattr(Adversary, "to", lambda self, device: moved.append(device))
    trainer = trainer_for(tokenizer_config(data, adversarial=0.5), tmp_path / "run")
    assert moved == [trainer.accelerator.device]


def test_it_takes_part_after_its_share_of_the_run(data: Path, tmp_path: Path) -> None:
    config = tokenizer_config(data, adversarial=0.5, adversarial_start=0.5, steps=6)
    trainer = trainer_for(config, tmp_path / "run")
    fresh = [parameter.clone() for parameter in trainer.task.adversary.parameters]
    after_step, moved = trainer.task.after_step, []

    def note(step: int, rng: torch.Generator) -> None:
        after_step(step, rng)
        moved.append(not same(fresh, [parameter.data for parameter in trainer.task.adversary.parameters]))

    trainer.task.after_step = note
    trainer.run()
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line.keys() >= FIGURES for line in lines] == [False] * 3 + [True] * 3
    assert moved == [False] * 3 + [True] * 3
    start(tokenizer_config(data, steps=6), tmp_path / "plain")
    plain = [line for line in metrics(tmp_path / "plain") if "loss" in line]
    assert lines[:3] == plain[:3] and lines[3]["loss"] != plain[3]["loss"]
    assert lines[3]["squared_error"] == plain[3]["squared_error"] and lines[4] | plain[4] != lines[4]


def test_it_has_the_tokenizers_learning_rate_at_every_step(data: Path, tmp_path: Path) -> None:
    config = tokenizer_config(data, adversarial=0.5, adversarial_start=0.3, steps=7, warmup=4, schedule="cosine")
    trainer = trainer_for(config, tmp_path / "run")
    rates: list[float] = []
    trainer.task.adversary.optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    trainer.run()
    logged = [line["lr"] for line in metrics(tmp_path / "run") if line.keys() >= FIGURES]
    assert len(rates) == 5 and rates == pytest.approx(logged) and len(set(rates)) > 3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_with_an_adversary_equals_an_unbroken_one(data: Path, tmp_path: Path, precision: str) -> None:
    """Broken off once before it takes part and once after."""
    changes = {"precision": precision, "accumulation": 2, "steps": 7}
    config = tokenizer_config(data, adversarial=0.5, adversarial_start=0.45, **changes)
    start(config, tmp_path / "whole")
    run_until(config, tmp_path / "broken", 2)
    run_until(config, tmp_path / "broken", 5, resume=True)
    start(config, tmp_path / "broken", resume=True)
    whole = checkpoint(tmp_path / "whole", 7)
    assert same(whole, checkpoint(tmp_path / "broken", 7))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))
    kept = discriminator_state(whole)
    assert kept["done"] == 7 and len(kept["optimizer"]["state"]) == 6
    assert all(float(state["step"]) == 4 for state in kept["optimizer"]["state"].values())


def test_a_run_that_diverges_keeps_the_discriminator_of_its_last_good_step(data: Path, tmp_path: Path) -> None:
    config = tokenizer_config(data, adversarial=0.5, adversarial_start=0.0, save_every=100)
    trainer = trainer_for(config, tmp_path / "bad")
    poison(trainer, 4, "gradient")
    with pytest.raises(Diverged):
        trainer.run()
    run_until(config, tmp_path / "good", 3)
    assert same(checkpoint(tmp_path / "bad", 3), checkpoint(tmp_path / "good", 3))


def test_a_run_with_an_adversary_ends_in_a_plain_tokenizer(data: Path, tmp_path: Path) -> None:
    config = tokenizer_config(data, adversarial=0.5, steps=40, batch_size=16)
    folder = start(config, tmp_path / "run", command="vgen train tokenizer")
    loaded = MultiScaleVQ.from_pretrained(folder)
    assert set(loaded.state_dict()) == set(MultiScaleVQ(**TOKENIZER).state_dict())
    assert "| discriminator |" in (folder / "README.md").read_text()
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line.keys() >= FIGURES for line in lines] == [False] * 4 + [True] * 36
    assert lines[-1]["squared_error"] < 0.7 * lines[0]["squared_error"]
    assert min(line["discriminator"] for line in lines[4:]) < 1.9


@pytest.mark.parametrize("family", ["vqgan", "frequency"])
def test_every_family_has_the_last_convolution_it_needs(data: Path, family: str) -> None:
    model = TOKENIZER
    if family == "vqgan":
        model = {name: value for name, value in TOKENIZER.items() if name not in ("scales", "attention_levels")}
        model["side"] = 4
    _, figures = loss_of(task_of(data, family=family, model=model, adversarial=0.5, adversarial_start=0.0))
    assert float(figures["adversarial_weight"]) > 0


@pytest.mark.slow
def test_two_processes_train_one_discriminator(data: Path, tmp_path: Path) -> None:
    """The one that a single process trains on the whole batches, with the same balance."""
    changes: dict[str, Any] = {"flip": False, "steps": 2, "restart_until": 0.0, "warmup": 0}
    config = tokenizer_config(
        data, **changes, model=TOKENIZER | {"num_phi": 3}, adversarial=0.5, adversarial_start=0.5, weight_decay=0.0
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    program = RANK_PROGRAM.replace("task.model.state_dict()", "task.adversary.state_dict()")
    (tmp_path / "program.py").write_text(program)
    out = tmp_path / "two"
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "program.py", "config.yaml", str(out)]
    done = python(*arguments, cwd=tmp_path, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in range(2))
    assert same(first, second)
    start(config, tmp_path / "one")
    alone, together = (discriminator_state(checkpoint(folder, 2)) for folder in (tmp_path / "one", out))
    assert same(together, first)
    for i, moments in alone["optimizer"]["state"].items():
        found, expected = first["optimizer"]["state"][i]["exp_avg"], moments["exp_avg"]
        assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max())), i
    balance = [
        [line for line in metrics(f) if "loss" in line][-1]["adversarial_weight"] for f in (out, tmp_path / "one")
    ]
    assert balance[0] == pytest.approx(balance[1], rel=1e-3)


# ---- off


def test_off_is_off(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*arguments: Any) -> None:
        raise AssertionError("built, though nobody asked for it")

    for name in ("PatchAdversary", "Perceptual"):
        monkeypatch.setattr(f"vgen.training.tokenizers.{name}", built)
    task = task_of(data)
    assert task.companions == () and task.adversary is None and task.perceptual is None
    loss, figures = loss_of(task)
    rebuilt, (codebook, commitment), _ = task.model(images(8))
    error = rebuilt - images(8)
    assert torch.equal(loss, error.square().mean() + 0.2 * error.abs().mean() + codebook + 0.25 * commitment)
    assert figures.keys() == {"squared_error", "commitment"}
    task.after_step(1, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", ["fashion-vq", "fashion-vqgan", "fashion-nfig-vq"])
def test_the_small_presets_have_neither_term(preset: str) -> None:
    config = load_config(preset)
    assert (config.perceptual, config.adversarial, config.adversarial_start) == (0, 0, 0.1)
    changed = load_config(preset, ["perceptual=1", "adversarial=0.5", "adversarial_start=0.2"])
    assert (changed.perceptual, changed.adversarial, changed.adversarial_start) == (1, 0.5, 0.2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"perceptual": -0.5}, "perceptual is -0.5: it must be at least 0"),
        ({"adversarial": -1.0}, "adversarial is -1.0: it must be at least 0"),
        ({"adversarial": math.nan}, "adversarial is nan: it must be at least 0"),
        ({"perceptual": math.inf}, "perceptual is inf: .* finite"),
        ({"adversarial_start": -0.1}, "adversarial_start is -0.1: it must be from 0 to below 1"),
        ({"adversarial_start": 1.0}, "adversarial_start is 1.0: it must be from 0 to below 1"),
    ],
)
def test_weights_out_of_bounds_are_named_with_their_limit(changes: dict[str, float], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        tokenizer_config(Path("none"), **changes)


@pytest.mark.parametrize("name", ["perceptual", "adversarial"])
def test_other_kinds_of_run_have_no_such_terms(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} is 0.5, but serves tokenizers, not a generator: leave it out"):
        generator_config(Path("none"), Path("none"), **{name: 0.5})


# ---- LPIPS


@pytest.fixture
def random_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG-16's layers with random weights in torchvision's place: nothing is downloaded."""
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **settings: SimpleNamespace(features=features))


class Stub(nn.Module):
    """In the place of LPIPS: the largest difference of two images, on average."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return (fake - real).abs().amax((1, 2, 3)).mean()


def test_the_perceptual_term_is_added_with_its_weight(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = loss_of(task_of(data))
    monkeypatch.setattr("vgen.training.tokenizers.Perceptual", Stub)
    task = task_of(data, perceptual=0.3)
    loss, figures = loss_of(task)
    expected = Stub(8)(images(8), task.model(images(8))[0])
    assert figures["perceptual"].item() == pytest.approx(expected.item())
    assert (loss - plain).item() == pytest.approx(0.3 * expected.item(), rel=1e-5)
    assert task.companions == ()  # nothing of it belongs into a checkpoint


def test_the_perceptual_term_is_part_of_what_the_adversary_is_weighed_against(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgen.training.tokenizers.Perceptual", Stub)
    both = {"adversarial": 0.5, "adversarial_start": 0.0}
    small, large = (float(loss_of(task_of(data, perceptual=w, **both))[1]["adversarial_weight"]) for w in (0.0, 100.0))
    assert large > 10 * small


def test_lpips_is_that_of_torchmetrics_on_three_channels(random_vgg: None) -> None:
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    network, real, fake = Perceptual(16), images(3, 16), images(3, 16, seed=1)
    found = network(real, fake)
    threefold = [x.repeat(1, 3, 1, 1) for x in (fake, real)]
    assert float(found) == pytest.approx(float(learned_perceptual_image_patch_similarity(*threefold, "vgg")), rel=1e-4)
    assert float(network(real, real)) == 0 < float(found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(real, fake), found)


def test_lpips_is_frozen_and_has_a_gradient_beyond_the_range_of_images(random_vgg: None) -> None:
    """Reconstructions overshoot, and must be told."""
    network, fake = Perceptual(16).train(), (2 * images(2, 16, seed=1)).requires_grad_()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, nn.Dropout) and module.training for module in network.modules())
    (gradient,) = torch.autograd.grad(network(images(2, 16), fake), fake)
    assert (gradient[fake.detach().abs() > 1].abs() > 0).float().mean() > 0.9


def test_a_run_with_lpips_ends_well(data: Path, tmp_path: Path, random_vgg: None) -> None:
    start(tokenizer_config(data, model=SIXTEEN, perceptual=0.5, steps=2, batch_size=4), tmp_path / "run")
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(lines) == 2 and all(line["perceptual"] > 0 for line in lines)
    assert all("perceptual" not in str(state) for state in checkpoint(tmp_path / "run", 2))


@pytest.mark.parametrize("obstacle", ["no network", "damaged file"])
def test_weights_that_cannot_be_had_are_one_line_with_the_remedy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    def unreachable(*arguments: Any, **settings: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    place = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: weights.get_state_dict(progress=False))
    if obstacle == "damaged file":
        place.parent.mkdir(parents=True)
        place.write_bytes(b"half of a file")
    with pytest.raises(SettingError, match=r"VGG-16's weights.*--set perceptual=0$") as caught:
        task_of(data, model=SIXTEEN, perceptual=1.0)
    said = str(caught.value)
    assert str(place) in said and "\n" not in said
    assert ("Name or service not known" in said) == (obstacle == "no network")


def test_images_too_small_for_vgg_are_refused_before_any_download(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "vgg16", None)
    with pytest.raises(SettingError, match=r"images of 8x8 are too small .*at least 16x16: --set perceptual=0"):
        task_of(data, perceptual=1.0)
