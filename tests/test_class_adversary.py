"""The discriminator that decoders train with: what it sees, its losses, and the penalty that keeps it calm."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adversary import images
from tiny import tokenizer_config
from torch import Tensor, nn

from vgen.training.class_adversary import ClassAdversary, ClassDiscriminator, gradient_penalty, logistic_loss
from vgen.types import SettingError


def adversary(**changes: Any) -> ClassAdversary:
    values = {"kind": "decoder", "family": "decoder", "model": {}, "init_from": "fashion-var", "adversarial": 0.1}
    values |= {"adversarial_start": 0.0, "warmup": 0, "lr": 1e-3, "steps": 1000} | changes
    return ClassAdversary(tokenizer_config(Path("none"), **values), 1, 8, 10)


def discriminator(size: int = 28, channels: int = 1) -> ClassDiscriminator:
    torch.manual_seed(0)
    return ClassDiscriminator(channels, size, classes=3, base=4)


@pytest.mark.parametrize(("size", "fine", "coarse"), [(8, 2, 1), (28, 7, 3), (32, 8, 4), (256, 64, 4)])
def test_it_has_a_fine_map_and_a_coarse_one_of_at_most_four_by_four(size: int, fine: int, coarse: int) -> None:
    found = discriminator(size, 3)(images(2, size, 3), torch.tensor([0, 2]))
    assert [each.shape for each in found] == [(2, fine * fine), (2, coarse * coarse)]


def test_images_without_room_for_a_map_are_refused() -> None:
    with pytest.raises(SettingError, match=r"images of 7x7 are too small to judge: at least 8x8"):
        ClassDiscriminator(1, 7, 10)


@pytest.mark.parametrize(("which", "cell", "side"), [(0, 3 * 7 + 3, 20), (1, 4, 28)])
def test_a_fine_logit_sees_its_surroundings_and_a_coarse_one_everything(which: int, cell: int, side: int) -> None:
    picture = images(1, 28).requires_grad_()
    found = discriminator()(picture, torch.tensor([1]))[which]
    (gradient,) = torch.autograd.grad(found[0, cell], picture)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == side


def test_classes_are_told_apart_only_once_it_has_learnt_them_and_rows_are_judged_alone() -> None:
    network, picture = discriminator(), images(1).repeat(2, 1, 4, 4)[..., :28, :28]
    for one in network(picture, torch.tensor([0, 2])):
        assert torch.allclose(one[0], one[1], atol=1e-6)
    nn.init.normal_(network.heads[1].of_class.weight)
    fine, coarse = network(picture, torch.tensor([0, 2]))
    assert torch.allclose(fine[0], fine[1], atol=1e-6) and not torch.allclose(coarse[0], coarse[1])
    alone = network(picture[1:], torch.tensor([2]))
    assert torch.allclose(alone[1][0], coarse[1], atol=1e-6)


def test_losses_are_those_worked_out_by_hand() -> None:
    """Each map has an equal say, however many logits it has."""
    one, two = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5]])

    def soft(x: float) -> float:
        return math.log1p(math.exp(x))

    real = ((soft(-2) + soft(1)) / 2 + soft(-0.5)) / 2
    fake = ((soft(2) + soft(-1)) / 2 + soft(0.5)) / 2
    assert float(logistic_loss((one, two), (one, two))) == pytest.approx(real + fake, rel=1e-6)
    zero = (torch.zeros(2, 3), torch.zeros(2, 1))
    assert float(logistic_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    judge, fake_images, classes = adversary(), images(3), torch.tensor([0, 1, 2])
    logits = judge.discriminator(fake_images, classes)
    expected = sum(nn.functional.softplus(-each).mean() for each in logits) / 2
    assert judge.decoder_loss(fake_images, classes).item() == pytest.approx(expected.item(), rel=1e-5)
    assert judge.discriminator(fake_images, classes)[0].requires_grad  # it is frozen for the term only


def test_the_penalty_is_the_squared_slope_of_the_mean_logit() -> None:
    """A linear discriminator: fine logits a x, a coarse one b mean(x)."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(3.0))
            self.b = nn.Parameter(torch.tensor(-5.0))

        def forward(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            return self.a * x.flatten(1), self.b * x.flatten(1).mean(1, keepdim=True)

    network = Linear()
    found = gradient_penalty(network, images(4), torch.zeros(4, dtype=torch.long))
    slope = (3 - 5) / 2 / 64  # of each of 64 pixels, in every image
    assert found.item() == pytest.approx(64 * slope**2)
    found.backward()
    assert network.a.grad is not None and network.a.grad.item() == pytest.approx(64 * 2 * slope / 2 / 64)


def test_the_penalty_comes_every_fourth_step_and_counts_four_times() -> None:
    real, fake, classes = images(4), images(4, seed=1), torch.zeros(4, dtype=torch.long)
    gradients = {}
    for penalty in (0.0, 2.0):
        judge = adversary(gradient_penalty=penalty)
        for step in range(5):
            judge.done = step
            judge(real, fake, classes, classes)
            gradients[penalty, step], judge.batches = judge.gradients, 0
    judge = adversary(gradient_penalty=2.0)
    extra = torch.autograd.grad(
        gradient_penalty(judge.discriminator, real, classes),
        judge.parameters,
        allow_unused=True,
        materialize_grads=True,
    )
    for step in range(5):
        for plain, found, more in zip(gradients[0.0, step], gradients[2.0, step], extra, strict=True):
            wanted = plain + 4 * more if step % 4 == 0 else plain
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-6)


def test_it_learns_to_tell_two_kinds_of_images_apart_and_faster_than_the_decoder() -> None:
    judge, losses = adversary(gradient_penalty=0.01), []
    classes = torch.arange(16) % 10
    for step in range(1, 31):
        real, fake = images(16, seed=step) * 0.5 + 0.3, images(16, seed=-step) * 0.5 - 0.3
        losses.append(float(judge(real, fake, classes, classes)[1]["discriminator"]))
        judge.learn(step)
    assert losses[-1] < 0.3 < losses[0]
    assert judge.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3, rel=0.01)
    real, fake = (judge.discriminator(images(16, seed=77) * 0.5 + shift, classes)[1].mean(1) for shift in (0.3, -0.3))
    assert real.min() > fake.max()


def test_the_term_reaches_the_decoder_and_not_the_discriminator() -> None:
    judge, layer = adversary(), torch.ones((), requires_grad=True)
    classes = torch.arange(4)
    term, _ = judge(images(4), images(4, seed=1) * layer, classes, classes)
    term.backward()
    assert layer.grad is not None and layer.grad.abs() > 0
    assert all(parameter.grad is None for parameter in judge.parameters)


def test_float16_is_left_to_others() -> None:
    """Gradients per pixel would vanish in it: the verdict is that of float32."""
    judge, classes = adversary(), torch.arange(4)
    exact = judge(images(4), images(4, seed=1), classes, classes)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(judge(images(4), images(4, seed=1), classes, classes)[0], exact)
